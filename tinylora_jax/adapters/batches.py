"""Groups modules of equal shape for `factorize`, so that few programs are compiled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from tinylora_jax.adapters.quantized import exact
from tinylora_jax.adapters.spec import TinyLoRA
from tinylora_jax.adapters.svd import lower_svds
from tinylora_jax.adapters.svd_device import mesh_of, spread
from tinylora_jax.adapters.targets import Module, Target, leaves_by_path, select

BATCH_BYTES = 2**30  # of matrices that are decomposed together


def lower_factorize(
    params: Any, spec: TinyLoRA, method: str = "auto", max_batch_bytes: int = BATCH_BYTES
) -> Iterator[jax.stages.Lowered]:
    """Lowers the programs that `factorize` would run, to compile them in advance.

    The arguments are those of `factorize`; `params` may hold `jax.ShapeDtypeStruct`s, for weights on one device.
    """
    leaves, parts = leaves_by_path(params), batches(select(params, spec.targets), max_batch_bytes)
    yield from lower_svds(svd_shapes(leaves, parts, spec.rank), method)
    for batch in parts:
        arguments, place = stack_arguments(leaves, batch)
        yield oriented_stack.lower(*arguments, place=place)


def batches(modules: Sequence[Module], max_bytes: int) -> list[list[Module]]:
    """Groups modules of equal shape into batches of similar size, with bounded float32 weights."""
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
    """Number of triplets to compute for a module: one extra, to check that the others are well determined."""
    return min(rank + 1, *module.shape)


def svd_shapes(
    leaves: Mapping[str, Any], parts: Sequence[Sequence[Module]], rank: int
) -> Iterable[tuple[jax.ShapeDtypeStruct, int]]:
    """The distinct shapes of batches, with the number of triplets to compute for each."""

    def describe(batch: Sequence[Module]) -> jax.ShapeDtypeStruct:
        (arrays, _), place = stack_arguments(leaves, batch)
        dtype = jax.eval_shape(exact, leaves[batch[0].path]).dtype
        return jax.ShapeDtypeStruct((len(arrays), *batch[0].shape[::-1]), dtype, sharding=place)

    return dict.fromkeys((describe(batch), num_triplets(batch[0], rank)) for batch in parts)


def stack_arguments(
    leaves: Mapping[str, Any], batch: Sequence[Module]
) -> tuple[tuple[tuple[Any, ...], tuple[tuple[Target, int | None], ...]], NamedSharding | None]:
    """The arguments of `oriented_stack` for a batch, and the sharding of its result.

    On a mesh the last module is repeated until every device has the same number.
    """
    mesh = mesh_of(leaves[batch[0].path])
    padded = [*batch, *batch[-1:] * (-len(batch) % (mesh.size if mesh else 1))]
    arrays, where = tuple(leaves[m.path] for m in padded), tuple((m.target, m.layer) for m in padded)
    return (arrays, where), mesh and spread(mesh)


@partial(jax.jit, static_argnames=("where", "place"))
def oriented_stack(
    leaves: tuple[Any, ...],
    where: tuple[tuple[Target, int | None], ...],
    place: NamedSharding | None = None,
) -> Float[Array, "modules out in"]:
    """Stacks the weights of modules, each `[out, in]`, which is one layer of its leaf.

    Args:
      leaves: leaf that holds each module.
      where: target and layer index of each module.
      place: sharding of the result; None lets the compiler choose.
    """
    if place is not None:  # XLA gathers the weights anyway, and warns unless this is explicit
        leaves = jax.lax.with_sharding_constraint(leaves, NamedSharding(place.mesh, PartitionSpec()))
    pairs = zip(leaves, where, strict=True)
    stacked = jnp.stack([_oriented(leaf, target)[layer or 0] for leaf, (target, layer) in pairs])
    return stacked if place is None else jax.lax.with_sharding_constraint(stacked, place)


def _oriented(leaf: Any, target: Target) -> jax.Array:
    """A leaf as `[layers, out, in]`, its input and output axes flattened; exact if it is quantized."""
    leaf = exact(leaf)
    order = [target.axes(word) for word in ("layer", "out", "in")]
    sizes = [math.prod(leaf.shape[axis] for axis in axes) for axes in order]
    return jnp.transpose(leaf, sum(order, ())).reshape(sizes)
