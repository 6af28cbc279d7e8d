"""How to add a model family: say what its config.json leaves out, and compare the logits with transformers'."""

import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from tinylora_jax.io.hf import _config as hf_config
from tinylora_jax.io.hf._weights import LazyTensor, build_tree
from tinylora_jax.models import forward, logits

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 89}


def test_add_mistral(monkeypatch):
    # In the library: an entry of `_DEFAULTS` in tinylora_jax/io/hf/_config.py, the values that transformers gives to
    # absent fields. Mistral is Llama's decoder; what another family does differently becomes a field of `ModelConfig`.
    defaults = {**hf_config._DEFAULTS["llama"], "num_key_value_heads": 8, "intermediate_size": 14336}
    monkeypatch.setitem(hf_config._DEFAULTS, "mistral", defaults)

    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None, initializer_range=0.3)
    ).eval()
    config = hf_config.parse_config(theirs.config.to_dict())
    tensors = {name: LazyTensor(tuple(x.shape), x.numpy) for name, x in theirs.state_dict().items()}
    params = build_tree(config, tensors, jnp.float32)

    tokens = np.random.default_rng(0).integers(0, 89, (2, 12))
    ours = logits(config, params, forward(config, params, jnp.asarray(tokens, jnp.int32))[0])
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs(torch.tensor(tokens)).logits.numpy(), atol=2e-4)
