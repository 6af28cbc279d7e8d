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
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from tinylora_jax.adapters import Adapted
from tinylora_jax.adapters.policy import Trained
from tinylora_jax.models.sharding import AXES, abstract_everywhere, split_microbatch, split_rows
from tinylora_jax.training.batch import Batch, Microbatch, empty_microbatch, pack
from tinylora_jax.training.grpo import SUMS, Metrics, Plan, grpo_loss
from tinylora_jax.training.losses import token_weights
from tinylora_jax.training.natural import FisherTransformation, fisher_matrix
from tinylora_jax.training.state import TrainState

Totals = tuple[jax.Array, Metrics, Trained]
"""Loss, sums of metrics over tokens, and gradient: of the batch, or with a leading axis of one entry per prompt."""


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
_POWER = "power"  # name of the sum of squared coefficients, see `training.natural`


class Update:
    """One optimizer step along the gradient of an objective over a batch of completions of any length.

    There are two jitted programs. `accumulate` adds the gradient of a microbatch; it is compiled for every shape of
    the plan with the first batch, so that no later call compiles. `apply` is the optimizer step.

    Args:
      plan: static sizes and settings for which the programs are compiled, see `plan_update`.
      optimizer: optax transformation of v. For a `FisherTransformation` the gradients of prompts are accumulated apart.
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
        self.by_prompt = isinstance(optimizer, FisherTransformation)
        self._uncompiled = {(shape.rows, shape.places) for shape in plan.shapes}
        accumulate = _accumulate_by_prompt if self.by_prompt else _accumulate
        self.accumulate = jax.jit(partial(accumulate, plan, objective.loss), donate_argnums=0)
        self._optimize_with(optimizer, point)

    def with_optimizer(
        self, optimizer: optax.GradientTransformation, point: Callable[[Trained], Trained] | None = None
    ) -> Update:
        """Creates an update with another optimizer and point, which shares this update's compiled gradient.

        Raises:
          ValueError: only one of the two optimizers needs the gradients of prompts apart.
        """
        if isinstance(optimizer, FisherTransformation) != self.by_prompt:
            raise ValueError("Update: optimizers with one gradient must all have the method 'natural', or none of them")
        other = copy.copy(self)
        other._optimize_with(optimizer, point)
        return other

    def _optimize_with(
        self, optimizer: optax.GradientTransformation, point: Callable[[Trained], Trained] | None
    ) -> None:
        self.optimizer, self.point = optimizer, jax.jit(point) if point else lambda v: v
        # The gradient of all weights takes gigabytes, so its memory is reused. At another point its size may differ.
        donated = () if point or self.by_prompt else 1
        self.apply = jax.jit(partial(_apply, optimizer, point), donate_argnums=donated)

    def __call__(self, state: TrainState, policy: Adapted, batch: Batch) -> tuple[TrainState, Metrics]:
        """Returns the next state and scalar metrics; `state.step`, which counts rollouts, is unchanged."""
        return self.apply(state, self.gradient(self.point(state.v), policy, batch))

    def gradient(self, v: Trained, policy: Adapted, batch: Batch) -> Totals:
        """Computes loss, sums of metrics and gradient of a batch.

        Raises:
          ValueError: gradients of prompts cannot be computed apart for this policy or number of prompts.
        """
        plan = self.plan
        if self.by_prompt:
            _check_by_prompt(plan, policy, len(batch.lengths))
        weights = token_weights(batch.mask, plan.grpo.loss_type, plan.max_tokens)
        wanted = np.asarray(batch.advantages) != 0
        wanted = wanted.any(axis=2) if wanted.ndim == 3 else wanted
        if plan.grpo.kl_coef or not plan.grpo.skip_without_signal or not wanted.any():
            wanted = None
        total = self.zeros(v)
        for microbatch in pack(batch, weights, plan.shapes, plan.sequences, wanted, self.by_prompt):
            total = self.accumulate(total, v, policy, microbatch)
            self._uncompiled.discard(microbatch.packing.tokens_at.shape[1:])
        # A later batch may need shapes that the first one does not: compile them now, with empty microbatches.
        for microbatch in empty_microbatches(plan, self.by_prompt) if self._uncompiled else ():
            if microbatch.packing.tokens_at.shape[1:] in self._uncompiled:
                total = self.accumulate(total, v, policy, microbatch)
        self._uncompiled.clear()
        return total

    def zeros(self, v: Trained) -> Totals:
        """Loss, sums of metrics and gradient before the first microbatch."""
        zero: Callable[[], Float[Array, ""]] = lambda: jnp.zeros((), jnp.float32)
        if self.by_prompt:
            apart = jax.tree.map(lambda x: jnp.zeros((self.plan.prompts, *x.shape), x.dtype), v)
            return zero(), {name: zero() for name in (*self.objective.sums, _POWER)}, apart
        return zero(), {name: zero() for name in self.objective.sums}, jax.tree.map(jnp.zeros_like, v)

    def lower(self, state: TrainState, policy: Adapted) -> Iterator[jax.stages.Lowered]:
        """Lowers all programs, to compile them in advance.

        Args:
          state: training state, or its shapes.
          policy: policy, or its shapes.
        """
        point = abstract_everywhere(jax.eval_shape(self.point, state.v))
        total = abstract_everywhere(jax.eval_shape(self.zeros, point))
        for microbatch in empty_microbatches(self.plan, self.by_prompt):
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


def _accumulate_by_prompt(
    plan: Plan, loss: Loss, total: Totals, v: Trained, policy: Adapted, microbatch: Microbatch
) -> Totals:
    """Adds the loss, metrics and gradients of the prompts of one microbatch to the totals."""
    microbatch = split_microbatch(microbatch)
    # Each token gets a copy of v: a prompt's gradient is the sum over its tokens and those of its completions.
    shape = microbatch.tokens.shape
    own = jax.tree.map(lambda x: split_rows(jnp.broadcast_to(x, (*shape, *x.shape)), AXES), v)
    (value, sums), grad = jax.value_and_grad(loss, has_aux=True)(own, plan, policy, microbatch)
    # A product instead of a scatter-add, which on a GPU depends on the order of additions.
    belongs = jax.nn.one_hot(microbatch.prompt, plan.prompts)
    grad = jax.tree.map(lambda g: jnp.einsum("stp,st...->p...", belongs, g, precision="highest"), grad)
    coefficients = jnp.where(microbatch.mask, microbatch.weights * microbatch.advantages, 0.0)
    sums = {**sums, _POWER: jnp.sum(coefficients**2)}
    return jax.tree.map(jnp.add, total, (value, sums, grad))


def _check_by_prompt(plan: Plan, policy: Adapted, prompts: int) -> None:
    """Raises an error if the gradients of prompts cannot be computed apart."""
    if not policy.rows_apart:
        raise ValueError(
            "Optimizer: method 'natural' needs an adapter that may differ between tokens (TinyLoRA, LoRA-XS), got"
            f" {type(policy).__name__}; use method 'adam'"
        )
    if prompts != plan.prompts:
        raise ValueError(f"Update: expected a batch of Plan.prompts={plan.prompts} prompts, got {prompts}")


def _apply(
    optimizer: optax.GradientTransformation,
    point: Callable[[Trained], Trained] | None,
    state: TrainState,
    total: Totals,
) -> tuple[TrainState, Metrics]:
    """Applies the optimizer step to accumulated totals, and turns metric sums into means over tokens."""
    loss, sums, grad = total
    extra: dict[str, jax.Array] = {}
    if isinstance(optimizer, FisherTransformation):
        grad, extra["fisher"] = _of_prompts(point, state.v, grad, sums[_POWER])
    elif point:
        (grad,) = jax.vjp(point, state.v)[1](grad)
    with jax.numpy_dtype_promotion("standard"):  # optax raises Python floats to the power of traced counts
        updates, opt_state = optimizer.update(grad, state.opt_state, state.v, **extra)
    v = optax.apply_updates(state.v, updates)
    tokens = jnp.maximum(sums["tokens"], 1)
    metrics = {name: value / tokens for name, value in sums.items() if name not in ("tokens", _POWER)}
    metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grad), "v_norm": optax.tree.norm(v)}
    if extra:
        step, _ = ravel_pytree(updates)
        metrics["step_kl"] = 0.5 * jnp.einsum("i,ij,j->", step, extra["fisher"], step, precision="highest")
    return TrainState(v, opt_state, state.step), metrics


def _of_prompts(
    point: Callable[[Trained], Trained] | None, v: Trained, apart: Trained, power: jax.Array
) -> tuple[Trained, Float[Array, "n n"]]:
    """The gradient of v and the Fisher matrix from the gradients of prompts, each with a leading axis of prompts."""
    if point:
        (apart,) = jax.vmap(jax.vjp(point, v)[1])(apart)
    rows = jnp.concatenate([x.reshape(x.shape[0], -1) for x in jax.tree.leaves(apart)], axis=1)
    return jax.tree.map(lambda x: x.sum(axis=0), apart), fisher_matrix(rows, power)


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


def empty_microbatches(plan: Plan, by_prompt: bool = False) -> list[Microbatch]:
    """Creates an empty microbatch for every shape of a plan, with or without the prompts of tokens."""
    fields: dict[str, Any] = {"old": plan.grpo.updates_per_rollout > 1, "ref": bool(plan.grpo.kl_coef)}
    fields["by_prompt"] = by_prompt
    return [empty_microbatch(shape, plan.sequences, **fields) for shape in plan.shapes]
