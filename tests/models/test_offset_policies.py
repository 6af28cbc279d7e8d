"""Laws of offsets in the decoder: the base model at v = 0, and one policy in prefill, decoding, rollout and update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.adapters import LoRA, TinyLoRA, adapt, biases, joint_spec, norm_scales, steering
from tinylora_jax.io.hf import quantize_maps
from tinylora_jax.models import KVCache, forward, fused, logits
from tinylora_jax.rollout import Sampling, generate
from tinylora_jax.training import GRPO, Batch, Plan, score, sequence_shapes

SPECS = {"steering": steering(), "bias": biases(), "norm": norm_scales(), "frozen": LoRA(rank=2, freeze_a=True)}
SPECS["one layer"] = TinyLoRA(targets=("layers/1/.*kernel",))  # TinyLoRA on chosen layers
TOKENS = np.random.default_rng(0).integers(0, 97, (3, 7)).astype(np.int32)
PROMPTS, LENGTHS, SIX = TOKENS[:, :3], np.array([3, 2, 1], np.int32), Sampling(max_new_tokens=6)


def filled(v, scale=0.2):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), jnp.float32), v)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_zeros_are_the_base_model(family, full_logits, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), family.params)
    base = full_logits(family.config, params, TOKENS)
    for name in ("steering", "bias", "norm"):
        policy = adapt(params, SPECS[name])
        found = full_logits(family.config, policy(policy.init()), TOKENS)
        if name == "norm" and dtype == "bfloat16" and family.config.qk_norm:
            # XLA joins the norm of queries with their rotation, and keeps more than bfloat16 in between.
            np.testing.assert_allclose(found, base, atol=0.1)
        else:
            np.testing.assert_array_equal(found, base)
        assert np.abs(full_logits(family.config, policy(filled(policy.init())), TOKENS) - base).max() > 0.1


FAST = ("steering", "bias", "norm")  # the others are kernels that many tests run
METHODS = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SPECS if name not in FAST)]
SLOW = [("norm", "int8"), ("bias", "int4"), ("frozen", "int8"), ("frozen", "none"), ("one layer", "none")]
CASES = [*((method, "none") for method in FAST), ("bias", "int8")]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize(("method", "scheme"), CASES)
def test_cached_decoding_is_the_full_forward(tiny, full_logits, method, scheme):
    config, params = tiny("qwen3")
    policy = adapt(quantize_maps(params, scheme), SPECS[method])
    weights = policy(filled(policy.init()))
    expected = full_logits(config, weights, TOKENS)
    joined = fused(weights)
    tokens = jnp.asarray(TOKENS)
    hidden, cache = forward(config, joined, tokens[:, :6], cache=KVCache.empty(config, 3, 8, jnp.float32))
    last, _ = forward(config, joined, tokens[:, 6:], jnp.full((3,), 6, jnp.int32), cache)
    found = logits(config, joined, jnp.concatenate([hidden, last], axis=1))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_rollout_samples_from_the_policy_that_is_trained(tiny, method):
    config, params = tiny("qwen3")
    policy = adapt(params, SPECS[method])
    v = filled(policy.init())
    drawn = answers(config, policy(v))
    mask = (np.arange(6) < np.asarray(drawn.lengths)[:, None]).reshape(3, 1, 6)
    tokens, logprobs = (np.asarray(x).reshape(3, 1, 6) for x in (drawn.tokens, drawn.logprobs))
    batch = Batch(PROMPTS, LENGTHS, tokens, mask, logprobs, np.ones((3, 1), np.float32))
    plan = Plan(config, GRPO(remat="off"), 1.0, 6, sequence_shapes(3, 3, 1, 6, 64))
    np.testing.assert_allclose(np.where(mask, score(plan, policy, v, batch), 0), logprobs, atol=1e-4)
    base = score(plan, policy, policy.init(), batch)
    assert np.abs(np.where(mask, base, 0) - logprobs).max() > 1e-2


def test_every_row_is_answered_as_if_alone(tiny):
    """Rows with a steering vector, with biases, and with neither, in one batch with fewer slots than rows."""
    config, params = tiny("qwen3")
    specs = [steering(), biases(), norm_scales()]
    whole = adapt(params, joint_spec(specs[0], specs))
    policies = [adapt(params, spec) for spec in specs]
    own = [filled(policy.init(), 0.4) for policy in policies]
    points = [whole.point(policy, v) for policy, v in zip(policies, own, strict=True)]
    together = answers(config, whole(jax.tree.map(lambda *x: jnp.stack(x), *points)), slots=2)
    for row, (policy, v) in enumerate(zip(policies, own, strict=True)):
        alone = answers(config, policy(v))
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[row])
        np.testing.assert_allclose(together.logprobs[row], alone.logprobs[row], atol=1e-4)
    assert np.any(together.tokens != answers(config, params).tokens)


def answers(config, weights, slots=0):
    key, ids = jax.random.key(0), jnp.arange(3, dtype=jnp.uint32)
    return generate(config, weights, ids, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), key, SIX, 1, slots)


def test_the_numbers_of_qwen2_5_1_5b():
    """28 layers, width 1,536, 256 outputs of k and v, 8,960 of gate and up."""
    from tinylora_jax.io.hf import param_shapes
    from tinylora_jax.models import ModelConfig

    config = ModelConfig(151_936, 1536, 8960, 28, 12, 2, 128, qkv_bias=True, tie_embeddings=True)
    shapes = param_shapes(config, jnp.bfloat16)
    count = lambda spec: jax.eval_shape(lambda params: adapt(params, spec), shapes).num_params
    assert count(steering()) == 28 * 1536 == 43_008
    assert count(biases()) == 28 * (3 * 1536 + 2 * 256 + 2 * 8960) == 645_120
    assert count(norm_scales()) == 57 * 1536 == 87_552
    assert count(LoRA(rank=1, freeze_a=True)) == 645_120 and count(LoRA(rank=1)) == 1_154_048
