"""One update, as jitted programs that differentiate only v."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from tinylora_jax.models.sharding import abstract_everywhere, split_microbatch
from tinylora_jax.training.batch import Batch, Microbatch, empty_microbatch, pack
from tinylora_jax.training.grpo import SUMS, Metrics, Plan, grpo_loss
from tinylora_jax.training.losses import token_weights
from tinylora_jax.training.state import TrainState

Totals = tuple[jax.Array, Metrics, Trained]
"""Loss, sums of metrics over tokens, and gradient."""


Loss = Callable[[Trained, Plan, Adapted, Microbatch], tuple[jax.Array, Metrics]]
"""Function from v, the plan, the policy and a microbatch to a scalar loss and sums of metrics over tokens."""


@dataclass(frozen=True)
class Objective:
    """The loss to minimize, and its metrics.

    Attributes:
      loss: loss function of a microbatch, such as `grpo_loss`.
      sums: names of the metric sums that it returns, including `tokens`.
    """

    loss: Loss
    sums: tuple[str, ...]


GRPO_OBJECTIVE = Objective(grpo_loss, SUMS)


class Update:
    """One optimizer step along the gradient of an objective over a batch of completions of any length.

    There are two jitted programs. `accumulate` adds the gradient of a microbatch; it is compiled for every shape of
    the plan with the first batch, so that no later call compiles. `apply` is the optimizer step.

    Args:
      plan: static sizes and settings for which the programs are compiled, see `plan_update`.
      optimizer: optax transformation of v.
      objective: loss to minimize, and its metrics.
      point: function from the trained parameters to the policy's v; None for the identity. Different adapters of one
        rank are points of one space (`coordinates`), and so can share one gradient program.
    """

    def __init__(
        self,
        plan: Plan,
        optimizer: optax.GradientTransformation,
        objective: Objective = GRPO_OBJECTIVE,
        point: Callable[[Trained], Trained] | None = None,
    ):
        self.plan, self.objective = plan, objective
        self._uncompiled = {(shape.rows, shape.places) for shape in plan.shapes}
        self.accumulate = jax.jit(partial(_accumulate, plan, objective.loss), donate_argnums=0)
        self._optimize_with(optimizer, point)

    def with_optimizer(
        self, optimizer: optax.GradientTransformation, point: Callable[[Trained], Trained] | None = None
    ) -> Update:
        """Creates an update with another optimizer and point, which shares this update's compiled gradient."""
        other = copy.copy(self)
        other._optimize_with(optimizer, point)
        return other

    def _optimize_with(
        self, optimizer: optax.GradientTransformation, point: Callable[[Trained], Trained] | None
    ) -> None:
        self.optimizer, self.point = optimizer, jax.jit(point) if point else lambda v: v
        # The gradient of all weights takes gigabytes, so its memory is reused. At another point its size may differ.
        self.apply = jax.jit(partial(_apply, optimizer, point), donate_argnums=() if point else 1)

    def __call__(self, state: TrainState, policy: Adapted, batch: Batch) -> tuple[TrainState, Metrics]:
        """Returns the next state and scalar metrics; `state.step`, which counts rollouts, is unchanged."""
        return self.apply(state, self.gradient(self.point(state.v), policy, batch))

    def gradient(self, v: Trained, policy: Adapted, batch: Batch) -> Totals:
        """Computes loss, sums of metrics and gradient of a batch."""
        plan = self.plan
        weights = token_weights(batch.mask, plan.grpo.loss_type, plan.max_tokens)
        wanted = np.asarray(batch.advantages) != 0
        if plan.grpo.kl_coef or not plan.grpo.skip_without_signal or not wanted.any():
            wanted = None
        total = self.zeros(v)
        for microbatch in pack(batch, weights, plan.shapes, plan.sequences, wanted):
            total = self.accumulate(total, v, policy, microbatch)
            self._uncompiled.discard(microbatch.packing.tokens_at.shape[1:])
        # A later batch may need shapes that the first one does not: compile them now, with empty microbatches.
        for microbatch in empty_microbatches(plan) if self._uncompiled else ():
            if microbatch.packing.tokens_at.shape[1:] in self._uncompiled:
                total = self.accumulate(total, v, policy, microbatch)
        self._uncompiled.clear()
        return total

    def zeros(self, v: Trained) -> Totals:
        """Loss, sums of metrics and gradient before the first microbatch."""
        zero: Callable[[], Float[Array, ""]] = lambda: jnp.zeros((), jnp.float32)
        return zero(), {name: zero() for name in self.objective.sums}, jax.tree.map(jnp.zeros_like, v)

    def lower(self, state: TrainState, policy: Adapted) -> Iterator[jax.stages.Lowered]:
        """Lowers all programs, to compile them in advance.

        Args:
          state: training state, or its shapes.
          policy: policy, or its shapes.
        """
        point = abstract_everywhere(jax.eval_shape(self.point, state.v))
        total = abstract_everywhere(jax.eval_shape(self.zeros, point))
        for microbatch in empty_microbatches(self.plan):
            yield self.accumulate.lower(total, point, policy, microbatch)
        yield self.apply.lower(state, total)


def _accumulate(plan: Plan, loss: Loss, total: Totals, v: Trained, policy: Adapted, microbatch: Microbatch) -> Totals:
    """Adds the loss, metrics and gradient of one microbatch to the totals."""
    # Each sequence gets a copy of v, and the gradients are summed at the end: devices exchange only one gradient of v.
    microbatch = split_microbatch(microbatch)
    spread = plan.sequences > 1 and policy.rows_apart
    own = jax.tree.map(lambda x: jnp.broadcast_to(x, (plan.sequences, *x.shape)), v) if spread else v
    (value, sums), grad = jax.value_and_grad(loss, has_aux=True)(own, plan, policy, microbatch)
    grad = jax.tree.map(lambda g, x: g.reshape(-1, *x.shape).sum(axis=0), grad, v)
    return jax.tree.map(jnp.add, total, (value, sums, grad))


def _apply(
    optimizer: optax.GradientTransformation,
    point: Callable[[Trained], Trained] | None,
    state: TrainState,
    total: Totals,
) -> tuple[TrainState, Metrics]:
    """Applies the optimizer step to accumulated totals, and turns metric sums into means over tokens."""
    loss, sums, grad = total
    if point:
        (grad,) = jax.vjp(point, state.v)[1](grad)
    with jax.numpy_dtype_promotion("standard"):  # optax raises Python floats to the power of traced counts
        updates, opt_state = optimizer.update(grad, state.opt_state, state.v)
    v = optax.apply_updates(state.v, updates)
    tokens = jnp.maximum(sums["tokens"], 1)
    metrics = {name: value / tokens for name, value in sums.items() if name != "tokens"}
    metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grad), "v_norm": optax.tree.norm(v)}
    return TrainState(v, opt_state, state.step), metrics


class DivergenceError(ArithmeticError):
    """An update is not finite.

    Attributes:
      values: metrics of the update that are not finite.
    """

    def __init__(self, values: Mapping[str, float]):
        self.values = dict(values)
        super().__init__(f"the update is not finite ({self.values}); lower the learning rate or max_grad_norm")


def finite_metrics(metrics: Metrics, among: Sequence[str] = ()) -> dict[str, float]:
    """Waits for the metrics of an update, and raises an error if it diverged.

    Args:
      metrics: metrics of `Update`, on the device.
      among: names of the metrics that must be finite; empty for all of them.

    Returns:
      The metrics as Python numbers.

    Raises:
      DivergenceError: one of them is not finite.
    """
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    shown = {name: values[name] for name in among or values}
    if not all(map(math.isfinite, shown.values())):
        raise DivergenceError(shown)
    return values


def empty_microbatches(plan: Plan) -> list[Microbatch]:
    """Creates an empty microbatch for every shape of a plan."""
    fields: dict[str, Any] = {"old": plan.grpo.updates_per_rollout > 1, "ref": bool(plan.grpo.kl_coef)}
    return [empty_microbatch(shape, plan.sequences, **fields) for shape in plan.shapes]
