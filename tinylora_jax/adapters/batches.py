"""How `factorize` goes about it: modules of equal shape together, by programs that shapes alone determine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinylora_jax.adapters.spec import TinyLoRA
from tinylora_jax.adapters.svd import lower_svds
from tinylora_jax.adapters.targets import Module, Target, leaves_by_path, select

BATCH_BYTES = 2**30  # of matrices decomposed together


def lower_factorize(
    params: Any, spec: TinyLoRA, method: str = "auto", max_batch_bytes: int = BATCH_BYTES
) -> Iterator[jax.stages.Lowered]:
    """The programs that `factorize` runs with these arguments, to be compiled before it.

    Args as those of `factorize`; shapes (`jax.ShapeDtypeStruct`) may stand for the weights, which one device has.
    """
    leaves, parts = leaves_by_path(params), batches(select(params, spec.targets), max_batch_bytes)
    yield from lower_svds(svd_shapes(leaves, parts, spec.rank), method)
    for batch in parts:
        yield oriented_stack.lower(*stack_arguments(leaves, batch))


def batches(modules: Sequence[Module], max_bytes: int) -> list[list[Module]]:
    """Modules of equal shape together, in batches of about equal size whose weights in float32 are bounded."""
    by_shape: dict[tuple[int, int], list[Module]] = {}
    for module in modules:
        by_shape.setdefault(module.shape, []).append(module)
    found = []
    for shape, members in by_shape.items():
        most = max(1, max_bytes // (4 * math.prod(shape)))
        size = -(-len(members) // -(-len(members) // most))
        found += [members[start : start + size] for start in range(0, len(members), size)]
    return found


def num_triplets(module: Module, rank: int) -> int:
    """How many triplets are computed of a module: one more than are used, to see whether those are determined."""
    return min(rank + 1, *module.shape)


def svd_shapes(
    leaves: Mapping[str, Any], parts: Sequence[Sequence[Module]], rank: int
) -> Iterable[tuple[jax.ShapeDtypeStruct, int]]:
    """The different shapes of batches, and how many triplets are computed of each."""
    shape = lambda batch: (len(batch), *batch[0].shape[::-1])
    dtype = lambda batch: jnp.result_type(leaves[batch[0].path])
    return dict.fromkeys(
        (jax.ShapeDtypeStruct(shape(batch), dtype(batch)), num_triplets(batch[0], rank)) for batch in parts
    )


def stack_arguments(
    leaves: Mapping[str, Any], batch: Sequence[Module]
) -> tuple[tuple[Any, ...], tuple[tuple[Target, int | None], ...]]:
    """The arguments of `oriented_stack` for a batch."""
    return tuple(leaves[m.path] for m in batch), tuple((m.target, m.layer) for m in batch)


@partial(jax.jit, static_argnames="where")
def oriented_stack(
    leaves: tuple[jax.Array, ...], where: tuple[tuple[Target, int | None], ...]
) -> Float[Array, "modules out in"]:
    """The weights of modules, each `[out, in]`: one layer of its leaf."""
    pairs = zip(leaves, where, strict=True)
    return jnp.stack([_oriented(leaf, target)[layer or 0] for leaf, (target, layer) in pairs])


def _oriented(leaf: jax.Array, target: Target) -> jax.Array:
    """A leaf as `[layers, out, in]`, its input and output axes flattened."""
    order = [target.axes(word) for word in ("layer", "out", "in")]
    sizes = [math.prod(leaf.shape[axis] for axis in axes) for axes in order]
    return jnp.transpose(leaf, sum(order, ())).reshape(sizes)
