"""The training state, and the optimizer that updates it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from tinylora_jax.adapters.policy import Trained
from tinylora_jax.training.natural import FisherTransformation, natural

_LEAST_DAMPING = 1e-3  # with less, rounding of float32 could make the damped matrix of 4,096 numbers indefinite


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All data that training changes: under 1 KB for 13 parameters.

    Attributes:
      v: trained parameters, float32 whatever the model's dtype (Fig 4 of the paper): `[groups, u]`, or a tree of arrays
        for LoRA and full fine-tuning. With `Optimizer(precision="bfloat16")` the values are rounded to bfloat16.
      opt_state: optimizer state, float32.
      step: number of rollouts used so far, int32 scalar.
    """

    v: Trained
    opt_state: optax.OptState
    step: jax.Array


@dataclass(frozen=True)
class Optimizer:
    """AdamW or the natural gradient, with a learning-rate schedule.

    Attributes:
      learning_rate: peak learning rate; not used by `natural` with a `kl_radius`, whose steps the schedule scales.
      schedule: `constant`, `linear` or `cosine` (the last two decay to zero at `total_updates`).
      warmup_updates: number of updates of the linear warm-up, which starts one increment above zero.
      total_updates: length of the schedule, in updates.
      weight_decay: decoupled weight decay; it pulls v towards the base model.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      max_grad_norm: largest gradient norm, to which larger ones are clipped; 0 never clips.
      precision: `float32`, or `bfloat16` to round v after every update (Fig 4 compares them); updates smaller than half
        of the last of v's 8 bits are then lost.
      method: `adam`, or `natural` for the natural gradient of at most 4,096 numbers, see `training.natural`.
      kl_radius: KL divergence of a step of `natural`, in nats per token; 0 uses the learning rate instead.
      damping: damping of `natural`, in units of the mean eigenvalue of the Fisher matrix.
      fisher_decay: decay rate of the Fisher matrix of `natural`.
    """

    learning_rate: float
    schedule: str = "constant"
    warmup_updates: int = 0
    total_updates: int = 1
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    max_grad_norm: float = 1.0
    precision: str = "float32"
    method: str = "adam"
    kl_radius: float = 1e-4
    damping: float = 0.1
    fisher_decay: float = 0.9

    def __post_init__(self):
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"Optimizer: learning_rate must be finite and > 0, got {self.learning_rate}")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"Optimizer: schedule {self.schedule!r}: expected 'constant', 'linear' or 'cosine'")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"Optimizer: precision {self.precision!r}: expected 'float32' or 'bfloat16'")
        if not 0 <= self.warmup_updates <= self.total_updates:
            raise ValueError(
                f"Optimizer: warmup_updates={self.warmup_updates} must be between 0 and"
                f" total_updates={self.total_updates}"
            )
        if self.method not in ("adam", "natural"):
            raise ValueError(f"Optimizer: method {self.method!r}: expected 'adam' or 'natural'")
        bounds = dict.fromkeys(("b1", "b2", "fisher_decay"), 1.0)
        bounds |= dict.fromkeys(("weight_decay", "max_grad_norm", "kl_radius", "damping"), math.inf)
        for name, bound in bounds.items():
            if not 0 <= getattr(self, name) < bound:
                raise ValueError(f"Optimizer: {name} must be >= 0 and below {bound}, got {getattr(self, name)}")
        if self.damping < _LEAST_DAMPING:
            raise ValueError(f"Optimizer: damping must be at least {_LEAST_DAMPING}, got {self.damping}")
        if self.needs_fisher and self.weight_decay:
            raise ValueError(
                f"Optimizer: weight_decay={self.weight_decay} needs method 'adam'; set it to 0 for 'natural'"
            )

    @property
    def needs_fisher(self) -> bool:
        """Whether the transformation is a `FisherTransformation`."""
        return self.method == "natural"

    def learning_rates(self) -> optax.Schedule:
        """The learning rate as a function of the update's index."""
        rest = max(1, self.total_updates - self.warmup_updates)
        main = {
            "constant": optax.constant_schedule(self.learning_rate),
            "linear": optax.linear_schedule(self.learning_rate, 0.0, rest),
            "cosine": optax.cosine_decay_schedule(self.learning_rate, rest),
        }[self.schedule]
        if self.warmup_updates == 0:
            return main
        # The warm-up starts one increment above zero: an update at rate 0 would waste a rollout.
        warmup = lambda count: self.learning_rate * (count + 1) / (self.warmup_updates + 1)
        return optax.join_schedules([warmup, main], [self.warmup_updates])

    def transform(self) -> optax.GradientTransformation:
        """The optax transformation."""
        clip = optax.clip_by_global_norm(self.max_grad_norm) if self.max_grad_norm else optax.identity()
        rounded = [_ROUNDED] if self.precision == "bfloat16" else []
        if self.needs_fisher:
            return FisherTransformation(*optax.chain(clip, self._natural(), *rounded))
        adam = optax.adamw(self.learning_rates(), self.b1, self.b2, weight_decay=self.weight_decay)
        return optax.chain(clip, adam, *rounded)

    def _natural(self) -> optax.GradientTransformationExtraArgs:
        rates = self.learning_rates()
        share = (lambda count: rates(count) / self.learning_rate) if self.kl_radius else rates
        return natural(share, self.kl_radius, self.damping, self.fisher_decay, self.b1)


def _to_bfloat16(updates: Trained, v: Trained | None) -> Trained:
    """Adjusts updates so that v lands on the nearest bfloat16 values."""
    near = lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # XLA may drop a pair of casts
    return jax.tree.map(lambda update, x: near(x + update) - x, updates, v)


_ROUNDED = optax.stateless(_to_bfloat16)


def init_state(v: Trained, optimizer: optax.GradientTransformation) -> TrainState:
    """Creates the training state before the first step.

    Args:
      v: initial parameters: `policy.init()`, or an adapter's vector.
      optimizer: optax transformation of `Update`, such as `Optimizer(1e-4).transform()`.

    Returns:
      The state: v in float32, a new optimizer state, step 0.
    """
    v = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), v)
    return TrainState(v, optimizer.init(v), jnp.zeros((), jnp.int32))
