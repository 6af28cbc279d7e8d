"""Offsets through export, generate and sweep, against transformers and PEFT."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from experiments import evaluate, export, grpo, sweep
from experiments.common.prompting import load
from tinylora_jax.adapters import LoRA, adapt, biases, norm_scales, steering
from tinylora_jax.io import load_pretrained, open_adapter, open_trained, save_trained
from tinylora_jax.io.adapter import AdapterError, base_fingerprint
from tinylora_jax.io.hf._export import describe_config
from tinylora_jax.io.peft import PeftError
from tinylora_jax.models import forward, logits

# PEFT uses a name that transformers deprecates.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (".is_gradient_checkpointing:FutureWarning", ".lora_bias=True.", "Unsupported layer type")  # of a norm
]
TOKENS = np.arange(1, 13).reshape(2, 6) % 90
QKV = (r".*/[qkv]_proj/kernel",)
SPECS = {"steering": steering(), "bias": biases(), "qkv": biases(QKV), "norm": norm_scales()}


@pytest.fixture(scope="module")
def model(model_folder):
    return load_pretrained(str(model_folder), "float32")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A folder with every method's offsets, and v."""
    rng, found = np.random.default_rng(3), {}
    for name, spec in SPECS.items():
        policy = adapt(model.params, spec)
        v = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), policy.init())
        folder = tmp_path_factory.mktemp(name) / "adapter"
        stored = save_trained(folder, model, policy, v, base_fingerprint(model.params), steps=1)
        jax.tree.map(np.testing.assert_array_equal, stored, v)
        found[name] = SimpleNamespace(folder=folder, policy=policy, v=v)
    return found


def ours(model, params):
    return logits(model.config, params, forward(model.config, params, jnp.asarray(TOKENS, jnp.int32))[0])


def theirs(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("method", list(SPECS))
def test_transformers_gives_the_logits_of_the_merged_model(method, saved, model, model_folder, tmp_path):
    each = saved[method]
    export.export(each.folder, "merged", tmp_path / "merged", str(model_folder))
    expected = ours(model, each.policy(each.v))
    assert np.abs(expected - ours(model, model.params)).max() > 0.1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(theirs(loaded), expected, atol=2e-4)
    again = load_pretrained(str(tmp_path / "merged"), "float32")
    np.testing.assert_allclose(ours(again, again.params), expected, atol=2e-4)
    kinds = {"steering": "llama", "bias": "llama"}  # Qwen2 has biases of q, k and v only
    assert loaded.config.model_type == kinds.get(method, "qwen2") and again.stop_tokens == model.stop_tokens


@pytest.mark.parametrize(
    ("method", "to"), [("steering", "peft-lora"), ("bias", "peft-lora"), ("norm", "peft-ln-tuning")]
)
def test_peft_gives_the_same_logits(method, to, saved, model, model_folder, tmp_path):
    each = saved[method]
    export.export(each.folder, to, tmp_path / "peft", str(model_folder))
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "peft")
    np.testing.assert_allclose(theirs(adapted), ours(model, each.policy(each.v)), atol=2e-4)


def test_lora_with_a_frozen_is_plain_lora_for_peft(model, model_folder, tmp_path):
    policy = adapt(model.params, LoRA(rank=2, freeze_a=True, seed=5, targets=(".*/(up|q|down)_proj/kernel",)))
    v = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.shape[0]), x.shape), policy.init())
    stored = save_trained(tmp_path / "lora", model, policy, v, base_fingerprint(model.params))
    jax.tree.map(np.testing.assert_array_equal, stored, v)
    opened = open_trained(tmp_path / "lora")
    expected = ours(model, policy(v))
    np.testing.assert_array_equal(ours(model, opened.policy(model.params, "auto")(opened.v)), expected)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    np.testing.assert_allclose(theirs(PeftModel.from_pretrained(base, tmp_path / "lora")), expected, atol=2e-4)
    # If A in the file is not the seed's, both matrices come from the file.
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({name: 2 * x if "lora_A" in name else x for name, x in load_file(path).items()}, path)
    both = open_trained(tmp_path / "lora")
    assert all(set(pair) == {"left", "right"} for pair in both.v.values())


@pytest.mark.parametrize(
    ("method", "to", "message"),
    [
        ("norm", "peft-lora", "no form for the scale of a norm .*; use peft-ln-tuning or merged"),
        ("bias", "peft-ln-tuning", "no form for an offset of outputs .*; use peft-lora or merged"),
        ("bias", "tinylora", "cannot contain .*; choose merged or peft-lora or peft-ln-tuning"),
    ],
)
def test_a_format_that_cannot_contain_them(method, to, message, saved, model_folder, tmp_path):
    with pytest.raises((PeftError, ValueError), match=message):
        export.export(saved[method].folder, to, tmp_path / "out", str(model_folder))
    assert not (tmp_path / "out").exists()


def test_a_qwen3_has_no_biases_in_its_mlp(tiny):
    from tinylora_jax.io.hf._offsets import biased_config

    config = tiny("qwen3").config
    with pytest.raises(ValueError, match="offsets of down_proj: Qwen3 has no such biases .*; peft-lora"):
        biased_config(config, ["layers/0/mlp/down_proj/kernel"])
    attention = biased_config(config, ["layers/0/self_attn/o_proj/kernel", "norm/scale"])
    assert describe_config(attention)["attention_bias"] and describe_config(attention)["model_type"] == "qwen3"


def test_they_answer_in_one_batch(saved, model, model_folder):
    names = [str(saved[name].folder) for name in ("steering", "norm")]
    answering = load(str(model_folder), ["base", *names], jnp.float32, "plain")
    weights, tokens = answering.weights(1), jnp.asarray(np.repeat(TOKENS[:1], 3, axis=0), jnp.int32)
    found = logits(model.config, weights, forward(model.config, weights, tokens)[0])
    alone = [model.params, *(saved[name].policy(saved[name].v) for name in ("steering", "norm"))]
    for row, params in enumerate(alone):
        np.testing.assert_allclose(found[row], ours(model, params)[0], atol=1e-5)


@pytest.mark.slow  # two runs
def test_members_of_three_methods_share_one_program(config, stop, tmp_path):
    config.max_steps = 3
    summary = sweep.run(config, ["method=steering,bias,norm"], tmp_path / "sweep", stop)
    assert {row["member"]: row["params"] for row in summary["members"]} == {
        "method=steering": 64,
        "method=bias": 448,
        "method=norm": 160,
    }
    config.method = "norm"
    alone = grpo.run(config, tmp_path / "alone", stop)
    member = tmp_path / "sweep" / "members" / "method=norm"
    theirs, ours = (open_trained(folder / "adapter").v for folder in (member, tmp_path / "alone"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), theirs, ours)
    assert max(float(np.abs(x).max()) for x in ours.values()) > 1e-2
    assert json.loads((member / "summary.json").read_text())["eval_after"] == alone["eval_after"]
    assert evaluate.run(config, member / "adapter")[0]["strict"] == alone["eval_after"]["strict"]


def altered(text):
    return lambda folder: (folder / "offsets.json").write_text(text((folder / "offsets.json").read_text()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (altered(lambda text: text.replace('"format_version": 1', '"format_version": 9')), "version 9; this library"),
        (altered(lambda text: text[:-4]), "is not JSON"),
        (altered(lambda text: text.replace('"sha256": "', '"sha256": "0')), "was altered"),
        (altered(lambda text: text.replace('"dtype": "float32"', '"dtype": 3')), "is malformed"),
        (lambda folder: (folder / "offsets.safetensors").write_bytes(b"x"), "was altered"),
        (lambda folder: (folder / "offsets.safetensors").unlink(), "is missing"),
    ],
)
def test_damaged_folders(saved, tmp_path, spoil, message):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in saved["bias"].folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    open_trained(folder)
    spoil(folder)
    with pytest.raises(AdapterError, match=message):
        open_trained(folder)


def test_only_commands_that_know_offsets_take_them(saved, other_model_folder):
    with pytest.raises(AdapterError, match="holds offsets .*, but a TinyLoRA adapter is expected here"):
        open_adapter(saved["bias"].folder)
    other = load_pretrained(str(other_model_folder), "float32")
    with pytest.raises(AdapterError, match="this base model differs in"):
        open_trained(saved["bias"].folder).policy(other.params, "auto")
