"""Selects the weights of a tree to adapt, orders them, and ties those that share a vector."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from tinylora_jax.adapters.quantized import is_quantized

LINEAR_MAPS = tuple(
    rf"(.*/)?{name}/kernel" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)
"""The seven linear maps of a transformer block, which the paper adapts."""

_MOST_LISTED = 20


@dataclass(frozen=True)
class Target:
    """Selects leaves by path and describes their axes.

    Attributes:
      path: regular expression, matched in full against the leaf's path such as `layers/3/mlp/up_proj/kernel`.
      layout: one word per axis: `in`, `out` or `layer`. Inputs and outputs may each span several axes:
        `in out out` is a query kernel `[hidden, heads, head_dim]`, `layer in out` a stack of kernels,
        `out in` a torch weight.
    """

    path: str
    layout: str = "in out"

    def __post_init__(self):
        words = self.layout.split()
        if set(words) - {"in", "out", "layer"} or not {"in", "out"} <= set(words) or words.count("layer") > 1:
            raise ValueError(
                f"layout {self.layout!r} of target {self.path!r}: expected one word per axis, each"
                " 'in' or 'out' and at most one 'layer', such as 'in out' or 'layer in out out'"
            )
        re.compile(self.path)

    def axes(self, word: str) -> tuple[int, ...]:
        """Positions of the axes that carry `word`."""
        return tuple(i for i, name in enumerate(self.layout.split()) if name == word)

    @property
    def is_ordered(self) -> bool:
        """Whether the axes are layers, then inputs, then outputs, as unmerged weights need them."""
        words = self.layout.split()
        return words == sorted(words, key=("layer", "in", "out").index)


@dataclass(frozen=True)
class Module:
    """One adapted linear map: a leaf, or one layer of a stacked leaf.

    Attributes:
      path: path of the leaf.
      target: the target that selected it.
      layer: index on the leaf's `layer` axis; None for an unstacked leaf.
      shape: `(in, out)` after flattening.
    """

    path: str
    target: Target
    layer: int | None
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        """Unique name, which also seeds the module's projections: the path, plus `[layer]` if stacked."""
        return module_name(self.path, self.layer)

    @property
    def kind(self) -> str:
        """The path without its numbers; the same projection has the same kind in every layer."""
        return "/".join("*" if part.isdigit() else part for part in self.path.split("/"))

    @property
    def depth(self) -> tuple[int, ...]:
        """The numbers in the path, then the stacked layer index: the sort key for layers."""
        numbers = tuple(int(part) for part in self.path.split("/") if part.isdigit())
        return numbers if self.layer is None else (*numbers, self.layer)


def module_name(path: str, layer: int | None) -> str:
    """The name of a leaf that is one module, or of one layer of a stacked leaf."""
    return path if layer is None else f"{path}[{layer}]"


def path_string(path: Sequence[Any]) -> str:
    """Joins a JAX key path with slashes: `layers/3/mlp/up_proj/kernel`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _paths(tree: Any) -> list[str]:
    """The paths of a tree's leaves, without any box around a leaf.

    A box is a node whose only leaf is its `value`, such as an NNX variable or a Linen `Partitioned`. Boxed and plain
    weights therefore have the same names, and so the same P. A quantized kernel is one leaf.
    """
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)[0]]
    leaves_inside = Counter(path[:depth] for path in paths for depth in range(len(path)))
    boxed = lambda path: path[-1:] == (jax.tree_util.GetAttrKey("value"),) and leaves_inside[path[:-1]] == 1
    return [path_string(path[:-1] if boxed(path) else path) for path in paths]


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Maps each path to its leaf, in the tree's order; a box around a leaf is not part of its path."""
    return dict(zip(_paths(tree), jax.tree.leaves(tree, is_leaf=is_quantized), strict=True))


def map_by_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Replaces each leaf of a tree with `function(path, leaf)`."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_quantized)
    return structure.unflatten(map(function, _paths(tree), leaves))


def natural(path: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts layer 2 before layer 10, whatever the container's own order."""
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in path.split("/"))


def select(params: Any, targets: Sequence[Target]) -> tuple[Module, ...]:
    """Finds the adapted modules of a tree, ordered by depth, then by target, then by path.

    This order determines which modules share a vector. It does not depend on how the tree's containers order
    their keys.

    Args:
      params: any pytree of arrays (or of `jax.ShapeDtypeStruct`).
      targets: patterns of the leaves to adapt; a leaf belongs to the first target that matches it.

    Returns:
      The modules; a stacked leaf gives one module per layer.

    Raises:
      ValueError: a target matches nothing, or a leaf's rank does not fit its target's layout.
    """
    leaves = leaves_by_path(params)
    found: list[tuple[tuple, Module]] = []
    matched: set[str] = set()
    problems: list[str] = []
    for rank, target in enumerate(targets):
        paths = [p for p in leaves if p not in matched and re.fullmatch(target.path, p)]
        if not paths:
            problems.append(f"target {target.path!r} matches no leaf, apart from those of earlier targets")
        matched.update(paths)
        for path in paths:
            shape = np.shape(leaves[path])  # () for a leaf that is not an array, such as an Equinox activation
            if len(shape) != len(target.layout.split()):
                problems.append(f"{path} has shape {shape}, but its target's layout is {target.layout!r}")
                continue
            size = tuple(math.prod(shape[axis] for axis in target.axes(word)) for word in ("in", "out"))
            layers = range(shape[target.axes("layer")[0]]) if target.axes("layer") else (None,)
            for layer in layers:
                module = Module(path, target, layer, size)
                found.append(((module.depth, rank, natural(path)), module))
    if problems:
        some = ", ".join(sorted(leaves, key=natural)[:8])
        if len(problems) > _MOST_LISTED:
            problems[_MOST_LISTED:] = [f"… and {len(problems) - _MOST_LISTED} more"]
        raise ValueError("cannot select modules to adapt:\n  " + "\n  ".join(problems) + f"\nThe tree has: {some}, …")
    return tuple(module for _, module in sorted(found, key=lambda pair: pair[0]))


def tie_groups(modules: Sequence[Module], n_tie: int, tying: str) -> tuple[int, ...]:
    """Assigns each module to a tie group, whose vector it uses (§6.5 of the paper).

    `tiled` ties modules that are adjacent in depth, whatever their type: ceil(N / n_tie) groups.
    `structured` ties modules of the same type in adjacent layers: Σ over types of ceil(layers / n_tie) groups.

    Args:
      modules: modules in the order given by `select`.
      n_tie: number of modules per group.
      tying: `tiled` or `structured`.

    Returns:
      One group index per module.
    """
    if tying == "tiled":
        return tuple(i // n_tie for i in range(len(modules)))
    by_kind: dict[str, list[int]] = {}
    for i, module in enumerate(modules):
        by_kind.setdefault(module.kind, []).append(i)
    groups = [0] * len(modules)
    first = 0
    for members in by_kind.values():
        for j, i in enumerate(members):
            groups[i] = first + j // n_tie
        first += math.ceil(len(members) / n_tie)
    return tuple(groups)
