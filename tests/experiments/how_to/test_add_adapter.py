"""How to add an adapter: a policy that turns the frozen weights and a small array into weights."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tinylora_jax import Policy, init
from tinylora_jax.adapters.targets import map_by_path
from tinylora_jax.rollout import Sampling, generate
from tinylora_jax.training import GRPO, Batch, Optimizer, Plan, Update, init_state, score, sequence_shapes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gains(Policy):
    """W (1 + v): a number scales the maps of its tie group. `factors` says which maps, and who shares."""

    def __call__(self, v):
        def scaled(path, leaf):
            part = self.factors.leaves.get(path)
            return leaf if part is None else leaf * (1 + v[part.groups[0], 0])

        return map_by_path(scaled, self.params)


PROMPTS = np.array([[5, 6, 7], [8, 9, 10]], np.int32)
LENGTHS = np.array([3, 3], np.int32)
SIX = Sampling(max_new_tokens=6)


def answers(model, weights):
    key, ids = jax.random.key(0), jnp.arange(2, dtype=jnp.uint32)
    return generate(model.config, weights, ids, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), key, SIX, 2)


def test_add_gains(qwen2, policy):
    gains = Gains(policy.params, policy.factors)
    v = init(gains.factors)
    drawn = answers(qwen2, gains(v))
    np.testing.assert_array_equal(drawn.tokens, answers(qwen2, policy.params).tokens)  # v = 0 is the base model

    shape = (2, 2, 6)  # prompts, samples, tokens
    advantages = np.array([[1, -1], [-1, 1]], np.float32)
    mask = np.arange(6) < np.asarray(drawn.lengths).reshape(2, 2, 1)
    tokens, logprobs = (np.asarray(x).reshape(shape) for x in (drawn.tokens, drawn.logprobs))
    batch = Batch(PROMPTS, LENGTHS, tokens, mask, logprobs, advantages)

    plan = Plan(qwen2.config, GRPO(remat="off"), 1.0, 6, sequence_shapes(2, 3, 2, 6, 64))
    optimizer = Optimizer(learning_rate=0.05).transform()
    state, step = init_state(v, optimizer), Update(plan, optimizer)
    wanted = lambda v: np.sum(score(plan, gains, v, batch) * advantages[..., None])
    before = wanted(v)
    for _ in range(3):
        state, metrics = step(state, gains, batch)
    assert metrics["grad_norm"] > 0 and wanted(state.v) > before  # what was better has become likelier
