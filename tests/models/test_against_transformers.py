"""Logits equal those of transformers on random tiny models of every family and rope kind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from tinylora_jax.io.hf._config import parse_config
from tinylora_jax.io.hf._weights import LazyTensor, build_tree
from tinylora_jax.models import forward, logits
from tinylora_jax.models.rope import cos_sin

SIZES = {
    "vocab_size": 89,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.1}  # with these, dimensions ramp
ORIGINAL = {"original_max_position_embeddings": 16}  # the test's rows are three times as long

CASES = {
    "qwen2-tied": Qwen2Config(
        **SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
    "qwen2-yarn": Qwen2Config(
        **{**SIZES, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
        tie_word_embeddings=False,
        rope_parameters={**YARN, **ORIGINAL, "rope_theta": 100.0},
    ),
    "qwen3": Qwen3Config(
        **SIZES, head_dim=16, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e5}
    ),
    "qwen3-yarn-bias": Qwen3Config(
        **SIZES,
        head_dim=48,
        attention_bias=True,
        tie_word_embeddings=False,
        rope_parameters={**YARN, **ORIGINAL, "rope_theta": 150.0, "attention_factor": 0.8},
    ),
    "llama-llama3": LlamaConfig(
        **SIZES,
        head_dim=8,
        rms_norm_eps=1e-3,
        tie_word_embeddings=False,
        rope_parameters={**LLAMA3, **ORIGINAL, "rope_theta": 5e5},
    ),
    "llama-linear-bias": LlamaConfig(
        **SIZES,
        attention_bias=True,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 2e4},
    ),
    "smollm": LlamaConfig(
        **{**SIZES, "num_key_value_heads": 4},
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    ),
}


def random_model(hf_config):
    """A float32 transformers model in which no parameter has a neutral value."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif "embed" in name:
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    return model


def load(model):
    tensors = {
        name: LazyTensor(tuple(t.shape), lambda t=t: t.detach().numpy()) for name, t in model.state_dict().items()
    }
    config = parse_config(model.config.to_dict())
    return config, build_tree(config, tensors, jnp.float32)


run = jax.jit(
    lambda config, params, tokens: logits(config, params, forward(config, params, tokens)[0]), static_argnums=0
)
TOKENS = np.random.default_rng(0).integers(0, 89, (2, 48))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    model = random_model(CASES[case])
    config, params = load(model)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits.numpy()
    tokens = jnp.asarray(TOKENS, jnp.int32)
    got = run(config, params, tokens)
    assert expected.std() > 0.5, "the model must say something"
    assert np.abs(got - expected).max() <= 1e-4

    # Another theta is another model: it must reach the logits.
    other = dataclasses.replace(config, rope=dataclasses.replace(config.rope, theta=config.rope.theta * 3))
    assert np.abs(run(other, params, tokens) - expected).max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_every_field_of_the_rope_matters(case):
    config = parse_config(CASES[case].to_dict())
    positions = jnp.arange(48)[None]
    angles = lambda rope: np.concatenate(cos_sin(rope, config.head_dim, positions))
    used = {
        "default": ["theta"],
        "linear": ["theta", "factor"],
        "llama3": ["theta", "factor", "original_max_positions", "low_freq_factor", "high_freq_factor"],
        "yarn": ["theta", "factor", "original_max_positions", "beta_fast", "beta_slow", "attention_factor"],
    }[config.rope.kind]
    for name in used:
        value = getattr(config.rope, name)
        changed = dataclasses.replace(config.rope, **{name: type(value)(value * 3)})
        if name == "beta_slow":
            changed = dataclasses.replace(config.rope, beta_slow=value / 3)
        if name == "low_freq_factor":
            changed = dataclasses.replace(config.rope, low_freq_factor=value / 3)
        assert np.abs(angles(changed) - angles(config.rope)).max() > 1e-3, name
