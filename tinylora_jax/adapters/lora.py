"""LoRA (arXiv 2106.09685), a baseline that trains two matrices per module.

    ΔW = (α / r) B A        B `[out, r]` starts at zero, A `[r, in]` random

With `freeze_a` only B is trained (LoRA-FA, arXiv 2308.03303). A then follows from the seed and the leaf's path.

The matrices are stored as the fields `right` = Aᵀ and `left` = B of an `AdaptedKernel`, so that an adapted model runs
through the same `matmul` as with TinyLoRA.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from tinylora_jax.adapters.kernel import AdaptedKernel
from tinylora_jax.adapters.quantized import dense, exact
from tinylora_jax.adapters.targets import LINEAR_MAPS, Target, leaves_by_path, map_by_path, select

Matrices = dict[str, dict[str, Any]]
"""By leaf path: `right` `[in, rank]` and `left` `[out, rank]`, float32, with a leading axis of layers if stacked.

With `freeze_a`, v holds `left` alone."""


@dataclass(frozen=True)
class LoRA:
    """A frozen description of the LoRA matrices to train.

    Attributes:
      rank: r, the rank of the update.
      alpha: α, the numerator of the update's scale α / r.
      targets: regular expressions over leaf paths, or `Target`s laid out `layer… in… out…`.
      seed: seed of the random matrices A.
      freeze_a: whether A keeps its random values, so that only B is trained.

    >>> LoRA(rank=0)
    Traceback (most recent call last):
    ...
    ValueError: LoRA needs rank >= 1, got 0
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str | Target, ...] = LINEAR_MAPS
    seed: int = 0
    freeze_a: bool = False

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LoRA needs rank >= 1, got {self.rank!r}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"LoRA needs a finite alpha > 0, got {self.alpha!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"LoRA needs an integer seed >= 0, got {self.seed!r}")
        if not isinstance(self.freeze_a, bool):
            raise ValueError(f"LoRA needs freeze_a to be True or False, got {self.freeze_a!r}")
        if not self.targets or isinstance(self.targets, str):
            raise ValueError(f"LoRA targets {self.targets!r}: expected a tuple of patterns or Targets, not empty")
        object.__setattr__(self, "targets", tuple(t if isinstance(t, Target) else Target(t) for t in self.targets))

    needs_svd = False

    @property
    def scale(self) -> float:
        """The scale of the update, α / r."""
        return self.alpha / self.rank


def _sizes(params: Any, spec: LoRA) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Leading axes, number of inputs and number of outputs of every adapted leaf.

    Raises:
      ValueError: a kernel is not laid out `layer… in… out…`.
    """
    modules, shapes = select(params, spec.targets), leaves_by_path(params)
    found = {}
    for module in modules:
        if not module.target.is_ordered:
            raise ValueError(f"{module.path} is laid out {module.target.layout!r}; LoRA needs 'layer in out' order")
        leading = tuple(shapes[module.path].shape[axis] for axis in module.target.axes("layer"))
        found[module.path] = leading, *module.shape
    return found


def _uniform(key: jax.Array, leading: tuple[int, ...], num_in: int, rank: int) -> jax.Array:
    """A random Aᵀ, uniform in ±1/√in as in PEFT (Kaiming, a = √5)."""
    bound = num_in**-0.5
    return jax.random.uniform(key, (*leading, num_in, rank), jnp.float32, -bound, bound)


def frozen_right(path: str, seed: int, leading: tuple[int, ...], num_in: int, rank: int) -> jax.Array:
    """Aᵀ of a leaf with `freeze_a`. It depends on no other leaf, so a saved adapter finds it again by its path."""
    return _uniform(jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode())), leading, num_in, rank)


def init_lora(params: Any, spec: LoRA) -> Matrices:
    """The trained matrices of the base model: A random, unless it is frozen, and B zero."""
    key, found = jax.random.key(spec.seed), {}
    for index, (path, (leading, num_in, num_out)) in enumerate(_sizes(params, spec).items()):
        left = jnp.zeros((*leading, num_out, spec.rank), jnp.float32)
        found[path] = {"left": left}
        if not spec.freeze_a:
            found[path]["right"] = _uniform(jax.random.fold_in(key, index), leading, num_in, spec.rank)
    return found


def complete(params: Any, spec: LoRA, matrices: Matrices) -> Matrices:
    """Both matrices of every leaf: the trained ones, and A from the seed if it is frozen.

    Raises:
      ValueError: the matrices do not fit this tree and rank.
    """
    _check(params, spec, matrices)
    if not spec.freeze_a:
        return matrices
    sizes = {path: (leading, num_in) for path, (leading, num_in, _) in _sizes(params, spec).items()}
    right = lambda path: frozen_right(path, spec.seed, *sizes[path], spec.rank)
    return {path: {"right": right(path), "left": pair["left"]} for path, pair in matrices.items()}


def apply_lora(params: Any, spec: LoRA, matrices: Matrices) -> Any:
    """Replaces every adapted weight with an `AdaptedKernel`.

    Raises:
      ValueError: the matrices do not fit this tree and rank.
    """
    matrices = complete(params, spec, matrices)
    core = spec.scale * jnp.eye(spec.rank, dtype=jnp.float32)

    def wrap(path: str, leaf: Any) -> Any:
        if path not in matrices:
            return leaf
        right, left = matrices[path]["right"], matrices[path]["left"]
        return AdaptedKernel(leaf, right, jnp.broadcast_to(core, (*right.shape[:-2], *core.shape)), left)

    return map_by_path(wrap, params)


def merge_lora(params: Any, spec: LoRA, matrices: Matrices) -> Any:
    """Replaces every adapted weight with W + ΔW, dense and in its own dtype."""
    matrices = complete(params, spec, matrices)

    def add(path: str, leaf: Any) -> jax.Array:
        if path not in matrices:
            return dense(leaf)
        right, left = matrices[path]["right"], matrices[path]["left"]
        update = spec.scale * jnp.matmul(right, jnp.swapaxes(left, -1, -2), precision="highest")
        return (exact(leaf).astype(jnp.float32) + update.reshape(leaf.shape)).astype(leaf.dtype)

    return map_by_path(add, params)


def _check(params: Any, spec: LoRA, matrices: Matrices) -> None:
    expected = {
        path: {"left": (*leading, num_out, spec.rank)}
        | ({} if spec.freeze_a else {"right": (*leading, num_in, spec.rank)})
        for path, (leading, num_in, num_out) in _sizes(params, spec).items()
    }
    shapes = {path: {name: x.shape for name, x in pair.items()} for path, pair in matrices.items()}
    wrong = [path for path in sorted(expected | shapes) if expected.get(path) != shapes.get(path)]
    if wrong:
        raise ValueError(
            f"{len(wrong)} LoRA matrices do not fit this tree at rank {spec.rank}: {', '.join(wrong[:5])}; the first"
            f" has {shapes.get(wrong[0], 'none')}, expected {expected.get(wrong[0], 'none')}"
        )
