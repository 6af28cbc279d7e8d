"""PEFT's own code makes of our files, and we of PEFT's, the same logits."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel, TinyLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from tinylora_jax.adapters import TinyLoRA, apply, delta, factorize, init, merge
from tinylora_jax.io.hf_config import parse_config
from tinylora_jax.io.peft import PeftError, export_lora, export_tinylora, import_tinylora
from tinylora_jax.io.weights import LazyTensor, build_tree
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
        hidden, _ = forward(self.config, params, jnp.asarray(TOKENS))
        return np.asarray(logits(self.config, params, hidden))


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


BROKEN = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "cannot be read"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is not a JSON object"),
    "LoRA": (lambda f: change(f, peft_type="LORA"), "peft_type 'LORA', expected 'TINYLORA'"),
    "another rank": (lambda f: change(f, r=3), "not of shape|not of rank 3"),
    "another tying": (lambda f: change(f, weight_tying=0.0), "have vectors 0 to 76, the file has 38"),
    "a layer is missing": (lambda f: without(f, "layers.10."), "some modules may be missing"),
    "B is missing": (lambda f: without(f, "layers.3.mlp.up_proj.tinylora_B"), "of model.layers.3.mlp.up_proj are not"),
    "bias": (lambda f: change(f, bias="all"), "bias set"),
    "old and without P": (
        lambda f: (without(f, "tinylora_P"), change(f, peft_version="0.19.1")),
        "PEFT 0.19.1 drew it from a seed that it did not keep",
    ),
    "truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_faithfully_is_refused(qwen2, folder, case):
    damage, expected = BROKEN[case]
    damage(folder)
    with pytest.raises(PeftError, match=expected):
        import_tinylora(folder, qwen2.params)


def test_another_model_is_refused(folder, tmp_path):
    other = Base(tmp_path / "other", Qwen2Config(**SIZES | {"intermediate_size": 48}))
    with pytest.raises(PeftError, match="the base model has"):
        import_tinylora(folder, other.params)


def test_other_weights_than_linear_maps_are_not_written(qwen2, tmp_path):
    factors = factorize(qwen2.params, TinyLoRA(targets=("lm_head/kernel",)))
    with pytest.raises(PeftError, match="lm_head/kernel is not one of the linear maps"):
        export_tinylora(tmp_path / "peft", factors, init(factors), "base")
