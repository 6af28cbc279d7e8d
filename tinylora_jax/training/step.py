"""One update: jitted programs in which only v is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tinylora_jax.adapters import Adapted
from tinylora_jax.adapters.policy import Trained
from tinylora_jax.models.sharding import outline_everywhere, split_streams
from tinylora_jax.training.batch import Batch, Streams, empty_part, pack
from tinylora_jax.training.grpo import SUMS, Metrics, Plan, grpo_loss
from tinylora_jax.training.losses import token_weights
from tinylora_jax.training.state import TrainState

Totals = tuple[jax.Array, Metrics, Trained]
"""Loss, sums of metrics over tokens, and gradient."""


@dataclass(frozen=True)
class Objective:
    """What is minimized.

    Attributes:
      loss: of (v, plan, policy, part), the loss and sums of metrics over tokens.
      sums: the names of these, `tokens` among them.
    """

    loss: Callable[[Trained, Plan, Adapted, Streams], tuple[jax.Array, Metrics]]
    sums: tuple[str, ...]


GRPO_OBJECTIVE = Objective(grpo_loss, SUMS)


class Gradient:
    """The gradient of an objective over a batch of any lengths, part by part.

    Args:
      plan: what to compile for.
      objective: what is minimized.

    `accumulate` is the jitted program. It is compiled for every shape of the plan when a batch is given first, so that
    no later call compiles.
    """

    def __init__(self, plan: Plan, objective: Objective = GRPO_OBJECTIVE):
        self.plan, self.objective = plan, objective
        self._uncompiled = {(shape.rows, shape.places) for shape in plan.shapes}

        def accumulate(total: Totals, v: Trained, policy: Adapted, part: Streams) -> Totals:
            # A vector for each stream, and their sum at the end: devices exchange one gradient of the size of v.
            part = split_streams(part)
            spread = plan.streams > 1 and policy.rows_apart
            own = jax.tree.map(lambda x: jnp.broadcast_to(x, (plan.streams, *x.shape)), v) if spread else v
            (loss, sums), grad = jax.value_and_grad(objective.loss, has_aux=True)(own, plan, policy, part)
            grad = jax.tree.map(lambda g, x: g.reshape(-1, *x.shape).sum(axis=0), grad, v)
            return jax.tree.map(jnp.add, total, (loss, sums, grad))

        self.accumulate = jax.jit(accumulate, donate_argnums=0)

    def __call__(self, v: Trained, policy: Adapted, batch: Batch) -> Totals:
        """Loss, sums of metrics and gradient of a batch."""
        plan = self.plan
        weights = token_weights(batch.mask, plan.grpo.loss_type, plan.max_tokens)
        wanted = np.asarray(batch.advantages) != 0
        if plan.grpo.kl_coef or not plan.grpo.skip_without_signal or not wanted.any():
            wanted = None
        total = self.zeros(v)
        for part in pack(batch, weights, plan.shapes, plan.streams, wanted):
            total = self.accumulate(total, v, policy, part)
            self._uncompiled.discard(part.packing.tokens_at.shape[1:])
        for part in empty_parts(plan) if self._uncompiled else ():  # shapes that the first batch does not need may be needed by the next
            if part.packing.tokens_at.shape[1:] in self._uncompiled:
                total = self.accumulate(total, v, policy, part)
        self._uncompiled.clear()
        return total

    def zeros(self, v: Trained) -> Totals:
        """Loss, sums of metrics and gradient before the first part."""
        zero: Callable[[], Float[Array, ""]] = lambda: jnp.zeros((), jnp.float32)
        return zero(), {name: zero() for name in self.objective.sums}, jax.tree.map(jnp.zeros_like, v)

    def lower(self, v: Trained, policy: Adapted) -> Iterator[jax.stages.Lowered]:
        """The program for every shape of the plan, lowered."""
        total = outline_everywhere(jax.eval_shape(self.zeros, v))
        for part in empty_parts(self.plan):
            yield self.accumulate.lower(total, v, policy, part)


def make_update(
    optimizer: optax.GradientTransformation, point: Callable[[Trained], Trained] | None = None
) -> Callable[[TrainState, Totals], tuple[TrainState, Metrics]]:
    """The jitted step of an optimizer along accumulated totals; metrics over tokens become their means.

    It does not advance `state.step`, which counts rollouts.

    Args:
      optimizer: optax transformation of v.
      point: where the gradient was taken, as a function of v; None: at v.
    """

    # Of all weights the gradient alone is gigabytes; one taken at another point has no room for v.
    @partial(jax.jit, donate_argnums=() if point else 1)
    def update(state: TrainState, total: Totals) -> tuple[TrainState, Metrics]:
        loss, sums, grad = total
        if point:
            (grad,) = jax.vjp(point, state.v)[1](grad)
        with jax.numpy_dtype_promotion("standard"):  # optax raises Python floats to traced counts
            updates, opt_state = optimizer.update(grad, state.opt_state, state.v)
        v = optax.apply_updates(state.v, updates)
        tokens = jnp.maximum(sums["tokens"], 1)
        metrics = {name: value / tokens for name, value in sums.items() if name != "tokens"}
        metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grad), "v_norm": optax.tree.norm(v)}
        return TrainState(v, opt_state, state.step), metrics

    return update


class Step:
    """The gradient of an objective with respect to v, summed over streams, then one optimizer step.

    Args:
      gradient: of the objective.
      optimizer: optax transformation of v.
      point: the policy's v as a function of what is trained; None: itself. Different adapters of one rank are points
        of one space (`coordinates`), and so share the program of one gradient.
    """

    def __init__(
        self,
        gradient: Gradient,
        optimizer: optax.GradientTransformation,
        point: Callable[[Trained], Trained] | None = None,
    ):
        self.gradient, self.update = gradient, make_update(optimizer, point)
        self.point = jax.jit(point) if point else lambda v: v

    def __call__(self, state: TrainState, policy: Adapted, batch: Batch) -> tuple[TrainState, Metrics]:
        """The next state and scalar metrics of a batch."""
        return self.update(state, self.gradient(self.point(state.v), policy, batch))

    def lower(self, state: TrainState, policy: Adapted) -> Iterator[jax.stages.Lowered]:
        """All programs, lowered, to be compiled before they are needed."""
        point = outline_everywhere(jax.eval_shape(self.point, state.v))
        yield from self.gradient.lower(point, policy)
        yield self.update.lower(state, outline_everywhere(jax.eval_shape(self.gradient.zeros, point)))


def empty_parts(plan: Plan) -> list[Streams]:
    """A part without a token for every shape of a plan."""
    fields: dict[str, Any] = {"old": plan.grpo.updates_per_rollout > 1, "ref": bool(plan.grpo.kl_coef)}
    return [empty_part(shape, plan.streams, **fields) for shape in plan.shapes]
