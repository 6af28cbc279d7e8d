"""PEFT's own code makes of our files, and we of PEFT's, the same logits."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel, TinyLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from tinylora_jax.adapters import TinyLoRA, apply, delta, factorize, init, merge
from tinylora_jax.io._trained import open_adapter
from tinylora_jax.io.adapter._file import load_adapter, save_adapter
from tinylora_jax.io.adapter._fingerprint import base_fingerprint
from tinylora_jax.io.hf._config import parse_config
from tinylora_jax.io.hf._weights import LazyTensor, build_tree
from tinylora_jax.io.peft._export import export_lora, export_tinylora
from tinylora_jax.io.peft._tinylora import PeftError, import_tinylora
from tinylora_jax.models import forward, logits

SIZES = {
    "vocab_size": 89,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 11,  # the eleventh layer comes after the second in numbers, not in letters
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
CONFIGS = {"qwen2": Qwen2Config(**SIZES), "llama": LlamaConfig(**SIZES), "qwen3": Qwen3Config(**SIZES, head_dim=8)}
# PEFT uses a name that transformers deprecates, and warns of each way to store or redraw P.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning", "ignore:Specified to")
TOKENS = np.random.default_rng(0).integers(0, 89, (2, 12))


@partial(jax.jit, static_argnums=0)
def run(config, params, tokens):
    return logits(config, params, forward(config, params, tokens)[0])


class Base:
    """A random model in both libraries, on disk for PEFT."""

    def __init__(self, folder, config):
        torch.manual_seed(0)
        self.folder = folder
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tensors = {name: x.numpy() for name, x in self.torch().state_dict().items()}
        lazy = {name: LazyTensor(x.shape, lambda x=x: x) for name, x in tensors.items()}
        self.config = parse_config(json.loads((folder / "config.json").read_text()))
        self.params = build_tree(self.config, lazy, jnp.float32)

    def torch(self):
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def ours(self, params):
        return np.asarray(run(self.config, params, jnp.asarray(TOKENS)))


def theirs(model):
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS)).logits.numpy()


@pytest.fixture(scope="module", params=CONFIGS)
def base(request, tmp_path_factory):
    return Base(tmp_path_factory.mktemp(request.param) / "model", CONFIGS[request.param])


def adapter(base, **spec):
    """Factors, and a vector that changes the logits by a lot."""
    factors = factorize(base.params, TinyLoRA(**spec))
    rng = np.random.default_rng(1)
    return factors, jnp.asarray(rng.standard_normal(init(factors).shape), jnp.float32)


@pytest.mark.parametrize("tying", ["tiled", "structured"])
@pytest.mark.parametrize("write", [export_tinylora, export_lora])
def test_peft_loads_what_is_exported(base, tmp_path, tying, write):
    factors, v = adapter(base, u=3, n_tie=6, tying=tying)  # 77 modules do not divide into sixes
    write(tmp_path / "peft", factors, v, "base")
    got = theirs(PeftModel.from_pretrained(base.torch(), tmp_path / "peft").eval())
    expected = base.ours(apply(base.params, factors, v))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(expected - base.ours(base.params)).max() > 0.05


def trained(base, folder, **config):
    """A folder that PEFT itself saved, and its model's logits."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base.torch(), TinyLoraConfig(**{"r": 2, "u": 3, "target_modules": targets} | config))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "tinylora_v" in name:
            parameter.data.normal_()
    model.save_pretrained(folder)
    return theirs(model.eval())


@pytest.mark.parametrize("weight_tying", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("save_projection", [True, False])
def test_peft_folders_are_read(base, tmp_path, weight_tying, save_projection):
    folder = tmp_path / "peft"
    expected = trained(base, folder, weight_tying=weight_tying, save_projection=save_projection)
    factors, v = import_tinylora(folder, base.params)
    np.testing.assert_allclose(base.ours(apply(base.params, factors, v)), expected, atol=1e-4)
    np.testing.assert_allclose(base.ours(merge(base.params, factors, v)), expected, atol=1e-4)
    assert v.shape == (max(1, round(77 * (1 - weight_tying))), 3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("weight_tying", [0.0, 0.6])
def test_peft_folders_become_ours(base, tmp_path, weight_tying, save_projection, dtype):
    expected = trained(base, tmp_path / "peft", weight_tying=weight_tying, save_projection=save_projection)
    params = jax.tree.map(lambda x: x.astype(dtype), base.params)  # of which PEFT's directions are not quite
    factors, v = open_adapter(tmp_path / "peft").own(params)
    save_adapter(tmp_path / "ours", factors, v, "base", "float32", base_fingerprint(params))
    loaded = load_adapter(tmp_path / "ours", params)
    np.testing.assert_allclose(base.ours(apply(base.params, *loaded)), expected, atol=1e-4)
    assert np.abs(expected - base.ours(base.params)).max() > 0.05
    groups = max(1, round(77 * (1 - weight_tying)))
    assert v.shape == (-(-77 // (77 // groups)), 3), "PEFT's last group, if it is longer, is several of ours"
    description = json.loads((tmp_path / "ours" / "adapter.json").read_text())
    assert description["format_version"] == 3 and len(description["factors"]["projections"]) == 77
    assert len(description["factors"]["modules"]) < 16 or dtype == jnp.bfloat16, "of most, P alone travels"


def test_our_own_adapter_comes_back_without_its_p(base, tmp_path):
    factors, v = adapter(base, u=2)
    export_tinylora(tmp_path / "peft", factors, v, "base")
    save_adapter(tmp_path / "ours", *open_adapter(tmp_path / "peft").own(base.params), "base", "float32")
    again, same = load_adapter(tmp_path / "ours", base.params)
    np.testing.assert_array_equal(same, v)
    assert json.loads((tmp_path / "ours" / "adapter.json").read_text())["format_version"] == 2
    for path, leaf in factors.leaves.items():
        np.testing.assert_array_equal(again.leaves[path].P, leaf.P)


def test_directions_that_are_not_the_weight_s_do_not_become_ours(qwen2, folder):
    mixed = lambda x: x + 0.2 * x.abs().max() * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    set_tensor(folder, UP + "A", mixed)  # near enough to be read, and used as they are
    adapter = open_adapter(folder)
    adapter.factors(qwen2.params, "auto")
    with pytest.raises(PeftError, match="peft cannot be expressed in .*layers/3/mlp/up_proj/kernel: the given factors"):
        adapter.own(qwen2.params)


def test_an_adapter_comes_back(base, tmp_path):
    factors, v = adapter(base, n_tie=13)
    export_tinylora(tmp_path / "peft", factors, v, "base")
    again = delta(*import_tinylora(tmp_path / "peft", base.params))
    for path, update in delta(factors, v).items():
        np.testing.assert_allclose(again[path], update, atol=1e-6)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return Base(tmp_path_factory.mktemp("refused") / "model", CONFIGS["qwen2"])


@pytest.fixture(scope="module")
def saved(qwen2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "peft"
    trained(qwen2, folder, weight_tying=0.5)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "peft"))


def change(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def without(folder, what):
    path = folder / "adapter_model.safetensors"
    save_file({name: x for name, x in load_file(path).items() if what not in name}, path)


def write_header(folder, edit):
    """Rewrites the header of the safetensors file by a function of its JSON, and leaves the numbers where they are."""
    path = folder / "adapter_model.safetensors"
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    edit(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[end:])


def set_tensor(folder, name, edit):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: edit(x).contiguous() if n.endswith(name) else x for n, x in tensors.items()}, path)


def config_text(text):
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def announce(length, size):
    """A file that says how long its header is, and is a hole of so many bytes."""

    def damage(folder):
        with open(folder / "adapter_model.safetensors", "r+b") as file:
            file.write(length.to_bytes(8, "little"))
            file.truncate(size)

    return damage


def replaced(make):
    def damage(folder):
        path = folder / "adapter_model.safetensors"
        path.unlink()
        make(path)

    return damage


UP = "base_model.model.model.layers.3.mlp.up_proj.tinylora_"
BROKEN = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "a folder of weights": (replaced(Path.mkdir), "is missing"),
    "a pipe": (replaced(os.mkfifo), "is missing"),
    "a link to nothing": (replaced(lambda path: path.symlink_to("/nowhere/at/all")), "is missing"),
    "not JSON": (config_text("{"), "expected a JSON object"),
    "a list": (config_text("[]"), "expected a JSON object, got list"),
    "deep JSON": (config_text('{"a":' * 100_000), "expected a JSON object"),
    "long JSON": (lambda f: os.truncate(f / "adapter_config.json", 2**40), "of at most 1048576 bytes"),
    "a million numbers": (config_text('{"r":[' + "0," * 2**20), "of at most 1048576 bytes"),
    "a number of a million digits": (config_text('{"r":' + "9" * 10**6 + "}"), "expected a JSON object"),
    "LoRA": (lambda f: change(f, peft_type="LORA"), "peft_type 'LORA', expected 'TINYLORA'"),
    "another rank": (lambda f: change(f, r=3), "not of shape"),
    "r is huge": (lambda f: change(f, r=10**30), "r=1000.*expected integers r, u >= 1"),
    "r is true": (lambda f: change(f, r=True), "r=True"),
    "u is text": (lambda f: change(f, u="3"), "u='3'"),
    "P is huge": (lambda f: change(f, r=1000, u=1000), "u=1000; .*at most 1048576"),
    "seed": (lambda f: change(f, projection_seed=1.5), "projection_seed=1.5"),
    "tying is NaN": (lambda f: change(f, weight_tying=float("nan")), "weight_tying=nan"),
    "tying is true": (lambda f: change(f, weight_tying=True), "weight_tying=True"),
    "base": (lambda f: change(f, base_model_name_or_path=[1]), r"base_model_name_or_path=\[1\]"),
    "another tying": (lambda f: change(f, weight_tying=0.0), "need vectors 0 to 76, but the file has 38"),
    "another u": (lambda f: change(f, u=2), "not of shape"),
    "a layer is missing": (lambda f: without(f, "layers.10."), "some modules may be missing"),
    "B is missing": (lambda f: without(f, UP + "B"), "tinylora_B of model.layers.3.mlp.up_proj has shape none"),
    "P is missing": (lambda f: without(f, UP + "P"), "some tinylora_P are missing"),
    "A has one axis": (lambda f: set_tensor(f, UP + "A", lambda x: x[:, 0]), r"tinylora_A of .* has shape \(2,\)"),
    "B is transposed": (
        lambda f: set_tensor(f, UP + "B", lambda x: x.T),
        r"has shape \(2, 40\), but the base .*\(40, 2",
    ),
    "A is not finite": (
        lambda f: set_tensor(f, UP + "A", lambda x: x / 0),
        "up_proj.tinylora_A holds numbers that are",
    ),
    "v is not finite": (
        lambda f: set_tensor(f, "v.3", lambda x: x * np.inf),
        "tinylora_v.3 holds numbers that are not",
    ),
    "v is a matrix": (lambda f: set_tensor(f, "v.3", lambda x: x[None]), r"tinylora_v.3 has shape \(1, 3\)"),
    "integers": (lambda f: set_tensor(f, UP + "A", lambda x: x.int()), "has dtype I32, expected one of F64"),
    "A of another matrix": (
        lambda f: set_tensor(f, UP + "A", torch.randn_like),
        "singular directions differ from this",
    ),
    "unknown tensors": (
        lambda f: save_file(
            {"x": torch.ones(1)} | load_file(f / "adapter_model.safetensors"), f / "adapter_model.safetensors"
        ),
        "contains x, expected only updates of linear maps",
    ),
    "bias": (lambda f: change(f, bias="all"), "bias set"),
    "old and without P": (
        lambda f: (without(f, "tinylora_P"), change(f, peft_version="0.19.1")),
        "PEFT 0.19.1 did not store the seed that generated it",
    ),
    "truncated": (lambda f: announce(1000, 1200)(f), "header does not parse"),
    "cut": (
        lambda f: os.truncate(f / "adapter_model.safetensors", (f / "adapter_model.safetensors").stat().st_size - 9),
        "truncated or corrupt",
    ),
    "a header beyond the file": (announce(2**62, 2**12), "expected a header of 4611686018427387904 bytes"),
    "a header of a gigabyte": (announce(2**30, 2**31), "the header has 1073741824 bytes, expected at most"),
    "a header of nothing": (announce(2**20, 2**21), "header does not parse"),
    "tensors that overlap": (
        lambda f: write_header(f, lambda h: h[UP + "A"].update(data_offsets=h[UP + "B"]["data_offsets"])),
        "not a valid safetensors file",
    ),
    "a shape that is too large": (
        lambda f: write_header(f, lambda h: h[UP + "A"].update(shape=[2, 2**40])),
        "not a valid safetensors file",
    ),
    "a shape beyond all numbers": (
        lambda f: write_header(f, lambda h: h[UP + "A"].update(shape=[2**40, 2**40])),
        "not a valid safetensors file",
    ),
    "offsets that are text": (
        lambda f: write_header(f, lambda h: h[UP + "A"].update(data_offsets="ab")),
        "header does not parse",
    ),
    "a header that is a list": (lambda f: announce(2, 10)(f), "header does not parse"),
    "names of other things": (
        lambda f: write_header(f, lambda h: h.update({"base_model.model.../../x.tinylora_A": h.pop(UP + "A")})),
        "expected linear maps of blocks, got ../../x",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_faithfully_is_refused(qwen2, folder, case):
    damage, expected = BROKEN[case]
    damage(folder)
    tracemalloc.start()
    with pytest.raises(ValueError, match=expected) as error:
        import_tinylora(folder, qwen2.params)
    assert tracemalloc.get_traced_memory()[1] < 2**24, "16 MB are enough to find out"
    tracemalloc.stop()
    assert len(str(error.value)) < 600


def test_files_of_0_19_are_read_with_the_p_inside(qwen2, folder):
    # It drew the same P for every module, and only the file tells.
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    shared = next(x for name, x in tensors.items() if name.endswith("tinylora_P"))
    save_file({n: shared.clone() if n.endswith("tinylora_P") else x for n, x in tensors.items()}, path)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["peft_version"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    factors, v = import_tinylora(folder, qwen2.params)
    expected = theirs(PeftModel.from_pretrained(qwen2.torch(), folder).eval())
    np.testing.assert_allclose(qwen2.ours(apply(qwen2.params, factors, v)), expected, atol=1e-4)


OF_0_19 = """
import sys, torch, peft
from peft import TinyLoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
assert peft.__version__.startswith("0.19."), peft.__version__
base, folder, tokens = sys.argv[1:]
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = get_peft_model(model, TinyLoraConfig(r=2, u=3, weight_tying=0.6, target_modules=targets)).eval()
for name, parameter in model.named_parameters():
    if "tinylora_v" in name:
        parameter.data.normal_()
model.save_pretrained(folder)
with torch.no_grad():
    torch.save(model(torch.load(tokens)).logits, tokens)
"""


@pytest.mark.slow
@pytest.mark.skipif("TINYLORA_PEFT_0_19" not in os.environ, reason="TINYLORA_PEFT_0_19 names no pip --target folder")
def test_files_that_0_19_wrote(base, tmp_path):
    torch.save(torch.as_tensor(TOKENS), tmp_path / "tokens")
    arguments = [str(base.folder), str(tmp_path / "peft"), str(tmp_path / "tokens")]
    env = os.environ | {"PYTHONPATH": os.environ["TINYLORA_PEFT_0_19"]}
    subprocess.run([sys.executable, "-c", OF_0_19, *arguments], env=env, check=True)
    factors, v = import_tinylora(tmp_path / "peft", base.params)
    expected = torch.load(tmp_path / "tokens").numpy()
    np.testing.assert_allclose(base.ours(apply(base.params, factors, v)), expected, atol=1e-4)
    save_adapter(tmp_path / "ours", *open_adapter(tmp_path / "peft").own(base.params), "base", "float32")
    loaded = load_adapter(tmp_path / "ours", base.params)
    np.testing.assert_allclose(base.ours(apply(base.params, *loaded)), expected, atol=1e-4)
    assert np.abs(expected - base.ours(base.params)).max() > 0.05


def test_another_model_is_refused(folder, tmp_path):
    other = Base(tmp_path / "other", Qwen2Config(**SIZES | {"intermediate_size": 48}))
    with pytest.raises(PeftError, match="but the base model needs"):
        import_tinylora(folder, other.params)


def test_the_same_shapes_of_another_model_are_refused(folder, qwen2, tmp_path):
    params = jax.tree.map(lambda x: jnp.roll(x, 7, axis=0), qwen2.params)
    with pytest.raises(PeftError, match="differ from this model's in .* of 77 weights .*load it with its own base"):
        import_tinylora(folder, params)


def test_another_precision_of_the_same_model_is_not(folder, qwen2):
    import_tinylora(folder, jax.tree.map(lambda x: x.astype(jnp.bfloat16), qwen2.params))


def test_other_weights_than_linear_maps_are_not_written(qwen2, tmp_path):
    factors = factorize(qwen2.params, TinyLoRA(targets=("lm_head/kernel",)))
    with pytest.raises(PeftError, match="lm_head/kernel is not one of the linear maps"):
        export_tinylora(tmp_path / "peft", factors, init(factors), "base")
