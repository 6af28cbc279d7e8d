"""The Qwen2 of google-tunix, which is also an independent oracle for our decoder.

    pip install --no-deps google-tunix==0.1.7

Its model needs JAX and Flax alone; `import tunix` itself wants its trainers' twenty other packages.
"""

import importlib
import importlib.util
import sys
import types
import warnings

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.benchmarks import tunix_peer
from tinylora_jax import Target, TinyLoRA, factorize, merge
from tinylora_jax.models import ModelConfig, Rope, forward, init_params, logits

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Flax, about Tunix's code

SIZES = {"num_layers": 2, "vocab_size": 61, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
OUR_SIZES = SIZES | {"hidden_size": 24, "intermediate_size": 40, "rope": Rope(theta=1e6)}
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 61, (2, 7)), jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.arange(7), (2, 7))
CAUSAL = jnp.broadcast_to(jnp.tril(jnp.ones((7, 7), bool)), (2, 7, 7))


@pytest.fixture(scope="module")
def qwen2():
    """Tunix's module of the model, imported without `tunix/__init__.py`."""
    spec = importlib.util.find_spec("tunix")
    if spec is None:
        pytest.skip("pip install --no-deps google-tunix==0.1.7")
    always_shard = flax.config.flax_always_shard_variable  # Tunix sets it for the whole process
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        bare = types.ModuleType("tunix")
        bare.__path__ = list(spec.submodule_search_locations)
        patch.setitem(sys.modules, "tunix", bare)
        yield importlib.import_module("tunix.models.qwen2.model")
    flax.config.update("flax_always_shard_variable", always_shard)


@pytest.fixture(scope="module")
def model(qwen2, random_weights):
    """A small one."""
    config = qwen2.ModelConfig(
        **SIZES, embed_dim=24, hidden_dim=40, rope_theta=1_000_000, norm_eps=1e-6, use_tied_embedding=True
    )
    return random_weights(nnx.eval_shape(lambda: qwen2.Qwen2(config, rngs=nnx.Rngs(0))))


def logits_of(model):
    """Tunix's own forward, which mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        return model(TOKENS, POSITIONS, None, CAUSAL)[0]


def loss_of(model):
    """Mean surprise of the next tokens."""
    logprobs = jax.nn.log_softmax(logits_of(model)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logprobs, TOKENS[:, 1:, None], axis=-1))


TARGETS = (
    Target("layers/.*/[qkv]_proj/w", "in out out"),  # [width, heads, head_dim]
    Target("layers/.*/o_proj/w", "in in out"),  # [heads, head_dim, width]
    Target("layers/.*/(gate|up|down)_proj/kernel"),
)


def test_tunixs_qwen2(check_laws, matrix, model):
    factors = factorize(model, TinyLoRA(u=2, n_tie=4, targets=TARGETS))
    # Its einsums multiply by arrays alone, so the weights are merged inside the compiled step.
    step = jax.jit(jax.value_and_grad(lambda v: loss_of(merge(model, factors, v))))

    attention = [f"attn/{name}_proj/w" for name in "kqvo"]
    mlp = [f"mlp/{name}_proj/kernel" for name in ("down", "gate", "up")]
    num_in = lambda name: 2 if "o_proj" in name else 1
    matrices = [matrix(f"layers/{i}/{name}", num_in=num_in(name)) for i in range(2) for name in attention + mlp]
    check_laws(model, factors, matrices, loss_of, step)


@pytest.mark.parametrize("family", [{"qkv_bias": True, "tie_embeddings": True}, {}], ids=["qwen2", "llama"])
def test_our_decoder_gives_tunixs_logits(qwen2, random_weights, family):
    """Two implementations of one architecture: base, and merged."""
    config = ModelConfig(**OUR_SIZES, **family)
    params = random_weights(jax.eval_shape(lambda: init_params(config)))
    ours = jax.jit(lambda params: logits(config, params, forward(config, params, TOKENS)[0]))
    factors = factorize(params, TinyLoRA(u=2, n_tie=4))
    for v in (0.0, 0.3):
        adapted = merge(params, factors, jnp.full((factors.num_groups, 2), v))
        expected = jax.jit(logits_of)(tunix_peer.qwen2(config, adapted))
        np.testing.assert_allclose(ours(adapted), expected, atol=2e-4)


def test_what_tunixs_qwen2_lacks_is_refused():
    config = ModelConfig(**OUR_SIZES, qk_norm=True, o_bias=True)
    with pytest.raises(ValueError, match="no qk_norm, o_bias: choose"):
        tunix_peer.named_as_theirs(config, {})


def test_tunix_masks_no_token_of_a_prompt():
    """Its padding is recognized by the token alone."""
    tokenizer = tunix_peer.Tokenizer({"a": [9, 1], "b": [7]}, (8,), 10, str)
    assert tokenizer.pad_id() == 6 and tokenizer.encode("a") == [9, 1]
    assert [tokenizer.decode([1, 2]), tokenizer.lengths] == ["[1, 2]", [2]]
