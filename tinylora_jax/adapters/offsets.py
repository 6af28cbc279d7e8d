"""Baselines that train a few vectors: steering vectors, biases alone, and the scales of norms alone.

    y = x·W + b        b `[out]` for every selected kernel, added to its outputs
    y = x ⊙ (s + b)    b `[width]` for every selected scale of a norm

All vectors start at zero, which is the base model. Every set of offsets is a point of one space, that of all its
vectors, so different sets decode and train in one program.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinylora_jax.adapters.quantized import dense
from tinylora_jax.adapters.shifted import Shifted
from tinylora_jax.adapters.targets import LINEAR_MAPS, Target, leaves_by_path, map_by_path, natural

Vectors = dict[str, Any]
"""By leaf path: b, float32 `[out]`, with a leading axis of layers if stacked, and before that one of rows if given."""

LAYER_OUTPUTS = (r"(.*/)?down_proj/kernel",)
"""The maps whose outputs are added to the residual stream at the end of a layer."""

NORMS = (r"(.*/)?\w*norm/scale",)
"""The scales of all norms: of a layer's two inputs, the final one, and those of queries and keys in Qwen3."""

KINDS = ("outputs", "layers", "scales", "both")
_MOST_LISTED = 8


@dataclass(frozen=True)
class Offsets:
    """A frozen description of the vectors to train.

    Attributes:
      targets: regular expressions over leaf paths, or `Target`s laid out `layer… in… out…` for kernels.
      kind: kind of leaves that the targets may select: `outputs` of kernels, outputs of `layers` (the kernels of
        `LAYER_OUTPUTS`), `scales` of norms, or `both` outputs and scales.

    >>> Offsets(kind="norms")
    Traceback (most recent call last):
    ...
    ValueError: Offsets kind 'norms': expected one of outputs, layers, scales, both
    """

    targets: tuple[str | Target, ...] = LINEAR_MAPS
    kind: str = "outputs"

    needs_svd = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"Offsets kind {self.kind!r}: expected one of {', '.join(KINDS)}")
        if not self.targets or isinstance(self.targets, str):
            raise ValueError(f"Offsets targets {self.targets!r}: expected a tuple of patterns or Targets, not empty")
        object.__setattr__(self, "targets", tuple(t if isinstance(t, Target) else Target(t) for t in self.targets))


def steering(targets: tuple[str | Target, ...] = LAYER_OUTPUTS) -> Offsets:
    """One vector per layer, added to the residual stream at the layer's output.

    >>> len(steering().targets)
    1
    """
    return Offsets(targets)


def biases(targets: tuple[str | Target, ...] = LINEAR_MAPS) -> Offsets:
    """One vector per linear map, added to its outputs (BitFit, arXiv 2106.10199).

    Qwen has biases of q, k and v, and Llama has none. An offset of the outputs means the same for both.

    >>> len(biases().targets)
    7
    """
    return Offsets(targets)


def norm_scales(targets: tuple[str | Target, ...] = NORMS) -> Offsets:
    """One vector per norm, added to its scale (LN tuning, arXiv 2312.11420).

    >>> norm_scales().kind
    'scales'
    """
    return Offsets(targets, "scales")


def union(specs: Sequence[Offsets]) -> Offsets:
    """The spec that selects whatever one of the specs selects; a leaf keeps the layout of the first that selects it."""
    return Offsets(tuple(dict.fromkeys(target for spec in specs for target in spec.targets)), "both")


class _Selected(NamedTuple):
    """A leaf that gets an offset: its leading axes (the layers), and the size of its offset."""

    leading: tuple[int, ...]
    width: int


def selected(params: Any, spec: Offsets) -> dict[str, _Selected]:
    """Finds the leaves that a spec selects, in the order of depth.

    Raises:
      ValueError: a target matches nothing, or a leaf of another kind or layout (the message names them).
    """
    leaves, problems = leaves_by_path(params), []
    found: dict[str, _Selected] = {}
    for given in spec.targets:
        target = given if isinstance(given, Target) else Target(given)
        paths = [path for path in leaves if re.fullmatch(target.path, path)]
        if not paths:
            problems.append(f"target {target.path!r} matches no leaf")
        for path in paths:
            problem = _problem(path, np.shape(leaves[path]), target, spec.kind)
            if problem:
                problems.append(problem)
            elif path not in found:
                found[path] = _size(np.shape(leaves[path]), target)
    if problems:
        some = ", ".join(sorted(leaves, key=natural)[:_MOST_LISTED])
        lines = "\n  ".join(["cannot select what gets an offset:", *problems[:_MOST_LISTED]])
        raise ValueError(f"{lines}\nThe tree has: {some}, …")
    return {path: found[path] for path in sorted(found, key=natural)}


def _problem(path: str, shape: tuple[int, ...], target: Target, kind: str) -> str | None:
    """Says why a leaf cannot get an offset; None if it can."""
    if len(shape) == 1:
        if not path.endswith("scale"):
            return f"{path} is neither a kernel nor the scale of a norm; select the kernel beside it"
        return None if kind in ("scales", "both") else f"{path} is a norm's scale, but this trains offsets of outputs"
    if len(shape) != len(target.layout.split()):
        return f"{path} has shape {shape}, but its target's layout is {target.layout!r}"
    if not target.is_ordered:
        return f"{path} is laid out {target.layout!r}; an offset needs 'layer in out' order"
    if kind == "scales":
        return f"{path} is a kernel, but this trains the scales of norms; end the pattern in norm/scale"
    if kind == "layers" and not any(re.fullmatch(pattern, path) for pattern in LAYER_OUTPUTS):
        return f"{path} is not the output of a layer, which this trains; end the pattern in down_proj/kernel"
    return None


def _size(shape: tuple[int, ...], target: Target) -> _Selected:
    if len(shape) == 1:
        return _Selected((), shape[0])
    leading = tuple(shape[axis] for axis in target.axes("layer"))
    return _Selected(leading, math.prod(shape[axis] for axis in target.axes("out")))


def init_offsets(params: Any, spec: Offsets) -> Vectors:
    """The vectors of the base model: zeros."""
    return {path: jnp.zeros((*size.leading, size.width), jnp.float32) for path, size in selected(params, spec).items()}


def apply_offsets(params: Any, spec: Offsets, vectors: Vectors) -> Any:
    """Replaces every selected weight with a `Shifted`, which keeps the weight and its offset separate.

    Args:
      params: tree of weights.
      spec: description of the vectors.
      vectors: vectors by path, see `Vectors`; all have a leading axis of rows, or none has.

    Raises:
      ValueError: the vectors do not fit this tree.
    """
    sizes = selected(params, spec)
    rows = _check(sizes, vectors, rows_allowed=True)

    def wrap(path: str, leaf: Any) -> Any:
        if path not in vectors:
            return leaf
        offset = vectors[path]
        return Shifted(leaf, jnp.moveaxis(offset, 0, 1) if rows and sizes[path].leading else offset)

    return map_by_path(wrap, params)


def merge_offsets(params: Any, spec: Offsets, vectors: Vectors) -> Any:
    """Adds every vector to its norm's scale, or to the bias beside its kernel, in the dtype of that leaf.

    Raises:
      ValueError: the vectors do not fit this tree, or a kernel has no bias beside it (the message names it).
    """
    _check(selected(params, spec), vectors, rows_allowed=False)
    leaves = leaves_by_path(params)
    places = {path: path if len(np.shape(leaves[path])) == 1 else bias_of(path) for path in vectors}
    absent = [path for path, place in places.items() if place not in leaves]
    if absent:
        raise ValueError(
            f"{len(absent)} kernels have no bias to which their offset could be added ({', '.join(absent[:3])}, …); add"
            " biases of zero to the tree, or use the unmerged weights"
        )
    by_place = {place: vectors[path] for path, place in places.items()}

    def add(path: str, leaf: Any) -> jax.Array:
        if path not in by_place:
            return dense(leaf)
        return (leaf.astype(jnp.float32) + by_place[path].reshape(leaf.shape)).astype(leaf.dtype)

    return map_by_path(add, params)


def bias_of(path: str) -> str:
    """The path of the bias beside a kernel.

    >>> bias_of("layers/3/mlp/down_proj/kernel")
    'layers/3/mlp/down_proj/bias'
    """
    return re.sub(r"[^/]+$", "bias", path)


def _check(sizes: dict[str, _Selected], vectors: Vectors, rows_allowed: bool) -> int:
    """Raises for vectors that do not fit; returns the number of leading axes of rows, 0 or 1."""
    expected = {path: (*leading, width) for path, (leading, width) in sizes.items()}
    shapes = {path: tuple(np.shape(x)) for path, x in vectors.items()}
    rows = max((len(shape) - len(expected[path]) for path, shape in shapes.items() if path in expected), default=0)
    without = {path: shape[1:] for path, shape in shapes.items()} if rows == 1 and rows_allowed else shapes
    counts = {shape[0] for shape in shapes.values() if rows == 1}
    wrong = [path for path in sorted(expected | without) if expected.get(path) != without.get(path)]
    if wrong or len(counts) > 1:
        first = wrong[0] if wrong else next(iter(expected))
        raise ValueError(
            f"{len(wrong) or len(shapes)} offsets do not fit this tree: {', '.join(wrong[:5])}; {first} has shape"
            f" {shapes.get(first, 'none')}, expected {expected.get(first, 'none')}"
            f"{' (optionally with one leading axis of rows)' if rows_allowed else ''}"
        )
    return rows
