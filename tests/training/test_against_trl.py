"""Losses, gradients and advantages against TRL's own numbers, which `trl_numbers.py` stored, in packed sequences."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trl_numbers import CAP, CLIP_HIGH, CLIP_LOW, MAX_TOKENS, NUMBERS, WEIGHTS, G, N, T, arrays, cases, compute

from tinylora_jax.training import GRPO, Batch, group_advantages, pack, sequence_shapes, unpack
from tinylora_jax.training.grpo import loss_of_logprobs
from tinylora_jax.training.losses import decoupled_advantages, token_weights

P = 5
CASES = dict(cases())
INPUTS = arrays()
STORED = json.loads(NUMBERS.read_text())


def settings_of(loss, level, old, beta, mode=None, truncated=False):
    """Our settings for those of TRL: its `bnpo` is `dapo` in a batch that is not divided."""
    return GRPO(
        loss_type="dapo" if loss == "bnpo" else loss,
        importance_sampling_level=level,
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
        kl_coef=beta,
        tis_cap=CAP if mode else 0.0,
        tis_mode=mode or "token_truncate",
        mask_truncated_completions=truncated,
    )


def batch_of(old, beta, truncated=False, **_):
    """The inputs as a rollout, with NaN wherever nobody may look."""
    x = INPUTS
    mask = x["mask"] & x["stopped"][:, :, None] if truncated else x["mask"]
    seen = lambda name: np.where(mask, x[name], np.float32("nan"))
    return Batch(
        prompts=np.ones((N, P), np.int32),
        lengths=np.array([5, 1, 3], np.int32),
        completions=np.ones((N, G, T), np.int32),
        mask=mask,
        rollout_logprobs=seen("rollout"),
        advantages=x["advantages"],
        old_logprobs=seen("old") if old else None,
        ref_logprobs=seen("ref") if beta else None,
    )


def ours(grpo, batch, tokens=10_000, sequences=1):
    """Loss, gradient by the log-probabilities, and number of sequences. Without jit: the cases share their few ops."""
    weights = token_weights(batch.mask, grpo.loss_type, MAX_TOKENS)
    microbatches = list(pack(batch, weights, sequence_shapes(N, P, G, T, tokens), sequences))
    flat = INPUTS["logprobs"].reshape(-1)
    at = lambda m: np.where(m.mask, flat[m.source], np.float32("nan"))
    loss = lambda x, m: loss_of_logprobs(grpo, x, jnp.zeros_like(x), m)[0]
    found = [jax.value_and_grad(loss)(jnp.asarray(at(m)), jax.tree.map(jnp.asarray, m)) for m in microbatches]
    gradient = unpack(microbatches, [gradient for _, gradient in found], batch)
    return sum(float(value) for value, _ in found), gradient, len(microbatches) * sequences


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_trl(name):
    loss, gradient, _ = ours(settings_of(**CASES[name]), batch_of(**CASES[name]))
    expected, expected_gradient = STORED["losses"][name]
    assert loss == pytest.approx(expected, abs=2e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=2e-6)
    assert np.abs(gradient).max() > 1e-2


def test_the_cases_differ():
    """A case with the numbers of another one would test no option. On-policy, many have the same gradient."""
    own = {name: gradient for name, (_, gradient) in STORED["losses"].items() if "first" not in name}
    assert own["bnpo/token"] == own["dapo/token"]
    told = [json.dumps(gradient) for name, gradient in own.items() if not name.startswith("bnpo")]
    assert len(set(told)) == len(told)


@pytest.mark.parametrize("name", ["grpo/sequence", "cispo/sequence", "cispo/sequence/sequence_mask"])
@pytest.mark.parametrize("sequences", [1, 2])
def test_packing_does_not_divide_a_sum_over_a_completion(name, sequences):
    grpo, batch = settings_of(**CASES[name]), batch_of(**CASES[name])
    loss, gradient, whole = ours(grpo, batch)
    split, split_gradient, parts = ours(grpo, batch, tokens=20, sequences=sequences)
    assert parts >= 2 and whole == 1
    assert split == pytest.approx(loss, abs=2e-6)
    np.testing.assert_allclose(split_gradient, gradient, atol=2e-6)


def test_advantages_of_several_rewards_are_those_of_trl():
    rewards, weights = INPUTS["rewards"], np.array(WEIGHTS, np.float32)
    total = np.tensordot(weights, rewards, 1)
    found = {
        "sum_then_normalize/group": group_advantages(total),
        "sum_then_normalize/none": group_advantages(total, normalize_std=False),
        "normalize_then_sum/group": decoupled_advantages(rewards, WEIGHTS),
    }
    for name, expected in STORED["advantages"].items():
        np.testing.assert_allclose(found[name], expected, atol=1e-3 if "none" not in name else 1e-6, err_msg=name)
        others = np.delete(np.arange(N), 1)
        np.testing.assert_allclose(found[name][others], np.array(expected)[others], atol=3e-4, err_msg=name)
        assert (found[name][1] == 0).all() and np.abs(expected).max() > 0.5


def test_rewards_without_any_signal_teach_nothing_however_they_are_rounded():
    """The outer division would make advantages of size 1 from the rounding of a mean."""
    rewards = np.stack([np.full((3, 8), value, np.float32) for value in (0.1, 1.1, 0.7)])
    assert (decoupled_advantages(rewards, WEIGHTS) == 0).all()


@pytest.mark.slow
def test_the_stored_numbers_are_those_of_the_installed_trl():
    pytest.importorskip("trl")
    found = compute()
    for name, (loss, gradient) in found["losses"].items():
        stored, stored_gradient = STORED["losses"][name]
        assert loss == pytest.approx(stored, abs=1e-5), name
        np.testing.assert_allclose(gradient, stored_gradient, atol=1e-5, err_msg=name)
    for name, advantages in found["advantages"].items():
        np.testing.assert_allclose(advantages, STORED["advantages"][name], atol=1e-4, err_msg=name)
