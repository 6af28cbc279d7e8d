"""What vLLM and SGLang require of a LoRA folder, held against what `export_lora` and `save_lora` write.

The rules are those of vLLM's vllm/lora/peft_helper.py (required fields, features), vllm/lora/lora_model.py and utils.py
(files, names of tensors), vllm/config/lora.py (ranks), and of SGLang's python/sglang/srt/lora/lora_config.py and
utils.py (fields, target modules), read in November 2026.
"""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.serving import VLLM_RANKS, vllm_command
from tinylora_jax import factorize
from tinylora_jax.adapters import LoRA, LoRAPolicy, lora_xs
from tinylora_jax.io.hf._safetensors import open_safetensors
from tinylora_jax.io.peft import export_lora, save_lora

MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # linear layers of a block


def of_tinylora(folder, policy, v):
    export_lora(folder, policy.factors, v, "org/base")


def of_lora_xs(folder, policy, v):
    factors = factorize(policy.params, lora_xs(3))
    export_lora(folder, factors, jnp.full((factors.num_groups, 9), 0.1, jnp.float32), "org/base")


def of_lora(folder, policy, v):
    trained = LoRAPolicy(policy.params, LoRA(rank=4))
    save_lora(folder, trained.spec, jax.tree.map(lambda x: x + 1, trained.init()), "org/base")


@pytest.fixture(params=[of_tinylora, of_lora_xs, of_lora], ids=lambda make: make.__name__)
def folder(request, policy, v, tmp_path):
    request.param(tmp_path / "lora", policy, v)
    return tmp_path / "lora"


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def problems(config, max_lora_rank=16):
    """What vLLM's `PEFTHelper` and `validate_legal`, and SGLang's `LoRAConfig`, refuse in a config."""
    lacking = [name for name in ("r", "lora_alpha", "target_modules") if name not in config]
    if lacking:
        return [f"lacks {name}" for name in lacking]
    found = [name for name in ("modules_to_save", "use_dora", "use_rslora") if config.get(name)]
    found += ["rank"] if config["r"] > max_lora_rank else []
    found += ["bias"] if config.get("bias", "none") != "none" else []
    found += ["pattern"] if config.get("rank_pattern") or config.get("alpha_pattern") else []
    targets = config["target_modules"]  # SGLang takes the last part of each name; a text must be all or all-linear
    return found + (["targets"] if isinstance(targets, str) or {x.split(".")[-1] for x in targets} - MODULES else [])


def test_the_config_is_one_that_both_accept(folder):
    assert problems(config_of(folder)) == []
    assert config_of(folder)["peft_type"] == "LORA"


@pytest.mark.parametrize(
    "change",
    [{"use_dora": True}, {"bias": "all"}, {"r": 17}, {"modules_to_save": ["lm_head"]}, {"target_modules": "x"}],
)
def test_the_rules_can_fail(folder, change):
    assert len(problems(config_of(folder) | change)) == 1


def test_the_tensors_have_the_names_and_shapes_that_both_read(folder, policy):
    config, pairs = config_of(folder), {}
    with open_safetensors(folder / "adapter_model.safetensors") as tensors:
        for name, tensor in tensors.items():
            parts = name.split(".")
            assert parts[:2] == ["base_model", "model"] and parts[-2] in ("lora_A", "lora_B") and parts[-1] == "weight"
            assert parts[-3] in MODULES, "vLLM raises for any other"
            pairs.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = tensor.read()
    assert set(pairs) == set(config["target_modules"]) and len(pairs) == 14
    for name, pair in pairs.items():
        assert set(pair) == {"lora_A", "lora_B"}, name
        assert pair["lora_A"].shape[0] == pair["lora_B"].shape[1] == config["r"], name
        assert all(np.isfinite(x).all() and x.dtype == np.float32 for x in pair.values())
        _, _, layer, part, module = name.split(".")
        kernel = policy.params["layers"][int(layer)][part][module]["kernel"]
        assert (pair["lora_A"].shape[1], pair["lora_B"].shape[0]) == kernel.shape, name


def test_no_pickle_or_token_file_lies_beside_it(folder):
    """vLLM would take adapter_model.bin, and SGLang would add the tokens of added_tokens.json."""
    assert {path.name for path in folder.iterdir()} <= {
        *("adapter_config.json", "adapter_model.safetensors", "training.json")
    }


@pytest.mark.parametrize("rank, most", [(1, 1), (2, 8), (8, 8), (9, 16), (33, 64), (300, 320), (512, 512)])
def test_the_command_has_a_rank_that_vllm_takes(rank, most):
    (flag,) = [word for word in vllm_command("org/base", "/tmp/lora", rank) if word.startswith("--max-lora-rank=")]
    assert flag == f"--max-lora-rank={most}" and most in VLLM_RANKS


def test_vllm_itself_accepts_the_config(folder):
    helper = pytest.importorskip("vllm.lora.peft_helper", reason="vLLM is not installed").PEFTHelper
    helper.from_local_dir(str(folder), 4096).validate_legal(SimpleNamespace(max_lora_rank=16, bias_enabled=False))
