"""Tiny GGUF files, for the tests that read or damage them."""

from pathlib import Path

import gguf
import numpy as np

HEADS, KV_HEADS, HEAD_DIM, WIDTH, INNER, CONTEXT = 4, 2, 64, 32, 40, 131_072


def write_gguf(path: Path, family: str = "llama", tensors: dict | None = None, **metadata) -> Path:
    """A tiny model; a metadata value of None leaves the key out."""
    alphabet = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    tokens = [*alphabet, "he", "ll", "<|end|>"]
    own = {
        "context_length": CONTEXT,
        "embedding_length": WIDTH,
        "block_count": 1,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 500_000.0,
    }
    values = {f"{family}.{key}": value for key, value in own.items()} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["h e", "l l"],
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
    values |= metadata
    writer = gguf.GGUFWriter(path, family)
    for key, value in values.items():
        add = {
            str: writer.add_string,
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
        }
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    for name, array in (gguf_tensors(len(tokens)) if tensors is None else tensors).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(vocab_size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {
        "token_embd": (vocab_size, WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        "blk.0.attn_q": (q, WIDTH),
        "blk.0.attn_k": (kv, WIDTH),
        "blk.0.attn_v": (kv, WIDTH),
        "blk.0.attn_output": (WIDTH, q),
        "blk.0.ffn_gate": (INNER, WIDTH),
        "blk.0.ffn_up": (INNER, WIDTH),
        "blk.0.ffn_down": (WIDTH, INNER),
    }
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
