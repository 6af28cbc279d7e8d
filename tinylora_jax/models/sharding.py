"""One mesh for a chip or a pod, and the rules that place weights, caches and batches on it.

    data    rows of a batch
    fsdp    rows of a batch, and the axis of the weights that `tensor` does not split
    tensor  the outputs of q, k, v, gate and up, the inputs of o and down, the heads of the cache, and (with fsdp) the
            vocabulary

Decoding keeps the weights in place and moves activations. The update does the opposite: its streams are split over
all three axes, and each layer's weights are gathered when needed. An array axis is not split by a mesh axis that does
not divide it. Without a mesh (`jax.set_mesh`) these functions have no effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinylora_jax.adapters import Adapted, Factors, map_by_path, map_shared

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
_ROWS: ContextVar[tuple[str, ...]] = ContextVar("rows", default=(DATA,))
_INTO_TENSOR = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # their outputs are split
_FROM_TENSOR = ("o_proj", "down_proj")  # their inputs are


@dataclass(frozen=True)
class MeshSpec:
    """The sizes of the mesh's axes.

    Attributes:
      data: size of the axis that splits rows; 0 uses all devices left by the other axes.
      fsdp: size of the axis that splits rows and the weights' other axis.
      tensor: size of the axis that splits heads, MLP and vocabulary; 0 uses all devices left by a given `data`, else 1.
        (A run resolves 0 according to the memory of its devices.)

    >>> MeshSpec(tensor=4).resolve(8)
    MeshSpec(data=2, fsdp=1, tensor=4)
    >>> MeshSpec(data=2).resolve(8)
    MeshSpec(data=2, fsdp=1, tensor=4)
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 0

    def __post_init__(self):
        for name, least in ((DATA, 0), (FSDP, 1), (TENSOR, 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"MeshSpec: {name} must be an integer >= {least}, got {value!r}")

    def resolve(self, devices: int) -> MeshSpec:
        """Replaces zeros in `data` and `tensor` with sizes for this number of devices.

        Raises:
          ValueError: the product of the sizes is not the number of devices.
        """
        left_over = max(1, devices // (self.data * self.fsdp)) if self.data else 1
        tensor = self.tensor or left_over
        inner = self.fsdp * tensor
        data = self.data or devices // inner
        if data * inner != devices:
            fixed = self.fsdp * (self.tensor or 1)
            choice = f"data = {devices // fixed}" if self.tensor else f"a data that divides {devices // fixed}"
            advice = choice if devices % fixed == 0 else f"an fsdp × tensor that divides {devices}"
            shown = ", ".join(f"{name}={getattr(self, name) or 'auto'}" for name in AXES)
            raise ValueError(
                f"mesh {shown} does not fit the number of devices, {devices}; choose {advice}, or data=0 for the rest"
            )
        return replace(self, data=data, tensor=tensor)

    def make(self, devices: Sequence[jax.Device]) -> Mesh:
        """Builds the mesh of these devices in their order; neighbours share the `tensor` axis."""
        spec = self.resolve(len(devices))
        grid = np.asarray(devices, dtype=object).reshape(spec.data, spec.fsdp, spec.tensor)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def active_mesh() -> Mesh | None:
    """The devices of the surrounding `jax.set_mesh`; None without one."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def device_bytes() -> float | None:
    """Memory of a device available to JAX, in bytes; None if it is not reported, as on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def current_mesh() -> AbstractMesh | None:
    """The mesh of the surrounding `jax.set_mesh`, if it has these axes and more than one device.

    None inside `jax.shard_map`, where the program runs on a single device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.axis_names != AXES or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None
    return mesh


def rows_alone(prompts: int) -> bool:
    """Whether the mesh splits only rows, and this many prompts evenly, so that each device can generate alone."""
    mesh = current_mesh()
    return mesh is not None and not weights_are_split() and prompts % mesh.size == 0


def weights_are_split() -> bool:
    """Whether a kernel may be split over several devices."""
    mesh = current_mesh()
    return mesh is not None and mesh.size > mesh.shape[DATA]


def dividing(mesh: Mesh | AbstractMesh, axes: Sequence[str], size: int) -> tuple[str, ...]:
    """The longest prefix of the axes that splits `size` evenly."""
    taken: tuple[str, ...] = ()
    for axis in axes:
        if size % math.prod(mesh.shape[a] for a in (*taken, axis)):
            break
        taken = (*taken, axis)
    return taken


def partition(mesh: Mesh | AbstractMesh, shape: Sequence[int], *axes: Sequence[str]) -> P:
    """The partition of an array: the mesh axes for each of its axes, without those that do not divide it."""
    return P(*(dividing(mesh, names, size) or None for names, size in zip(axes, shape, strict=True)))


@contextmanager
def streams() -> Iterator[None]:
    """Context in which rows are streams of an update, split over every axis that divides them."""
    token = _ROWS.set(AXES)
    try:
        yield
    finally:
        _ROWS.reset(token)


def split_rows(x: jax.Array, rows: Sequence[str] | None = None) -> jax.Array:
    """Splits the first axis over the mesh axes `rows` (default: those of a batch), and no other axis."""
    mesh = current_mesh()
    if mesh is None:
        return x
    names = (_ROWS.get() if rows is None else rows, *((),) * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, partition(mesh, x.shape, *names))


def split_microbatch(microbatch: Any) -> Any:
    """Splits the first axis of every array of a microbatch over all axes that divide it."""
    return jax.tree.map(lambda x: split_rows(x, AXES), microbatch)


def split_features(x: jax.Array) -> jax.Array:
    """Splits the last axis over `tensor`, like the inputs of o and down, and the first axis as rows."""
    mesh = current_mesh()
    if mesh is None:
        return x
    rows = dividing(mesh, _ROWS.get(), x.shape[0])
    last = () if TENSOR in rows else (TENSOR,)
    return jax.lax.with_sharding_constraint(x, partition(mesh, x.shape, rows, *((),) * (x.ndim - 2), last))


def heads_axes(mesh: Mesh | AbstractMesh, rows: int, kv_heads: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes over which attention splits rows and heads.

    Heads are split over `tensor`. If it does not divide the kv heads, rows are split instead, and every device has all
    heads of its rows. If it does not divide the rows either, the devices of a `tensor` group do the same work.
    """
    first = _ROWS.get() if TENSOR in _ROWS.get() else (DATA, FSDP)
    taken = dividing(mesh, first, rows)
    if TENSOR in taken:
        return taken, ()
    if kv_heads % mesh.shape[TENSOR] == 0:
        return taken, (TENSOR,)
    return dividing(mesh, (*taken, TENSOR), rows), ()


def cache_shards(rows: int, kv_heads: int) -> int:
    """Number of parts into which `split_heads` splits the rows of a cache."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in heads_axes(mesh, rows, kv_heads)[0])


def split_heads(x: jax.Array, kv_heads: int, axis: int = 2) -> jax.Array:
    """Splits queries, keys or values for attention: rows on the first axis, heads or their features on `axis`."""
    mesh = current_mesh()
    if mesh is None:
        return x
    rows, heads = heads_axes(mesh, x.shape[0], kv_heads)
    names = [rows, *((),) * (x.ndim - 1)]
    names[axis] = heads
    return jax.lax.with_sharding_constraint(x, P(*(n or None for n in names)))


def look_up(table: jax.Array, tokens: jax.Array, tied: bool) -> jax.Array:
    """Looks up token embeddings, `[rows, seq, width]`.

    XLA by itself may gather the whole table. A table that is also the output head is split by vocabulary: each device
    looks up its own tokens and uses zeros for the others, and the results are summed. Any other table is split by
    features.
    """
    mesh = current_mesh()
    take = lambda table, tokens: jnp.take(table, tokens, axis=0)
    if mesh is None:
        return take(table, tokens)
    if not tied:
        own = partition(mesh, (*tokens.shape, table.shape[1]), (DATA,), (), (TENSOR, FSDP))
        return jax.lax.with_sharding_constraint(take(table, tokens), own)
    rows = dividing(mesh, _ROWS.get(), tokens.shape[0])
    place = partition(mesh, table.shape, *_leaf_axes("embedding", 2, tied=True))
    axes = vocabulary_axes(table.shape[0])
    if not axes or set(axes) & set(rows):
        return take(replicated(table), tokens)

    def own(table: jax.Array, tokens: jax.Array) -> jax.Array:
        local = tokens - jax.lax.axis_index(axes) * table.shape[0]
        found = (local >= 0) & (local < table.shape[0])
        taken = take(table, jnp.where(found, local, 0))
        return jax.lax.psum(jnp.where(found[..., None], taken, 0), axes)

    own_rows = P(rows or None, None)
    return jax.shard_map(own, in_specs=(place, own_rows), out_specs=own_rows, check_vma=False)(table, tokens)


def over_heads(call: Callable[..., Any], *arrays: Any) -> Any:
    """Calls a kernel on every device with its own rows and heads; XLA cannot split such a call and would gather.

    Args:
      call: kernel whose results all have axes (rows, …, heads, …).
      *arrays: arguments of the kernel, trees of arrays `[rows, seq, heads, head_dim]`, `[rows]`, or of two axes, which
        every device gets whole.
    """
    mesh = current_mesh()
    if mesh is None:
        return call(*arrays)
    leaves = jax.tree.leaves(arrays)
    kv_heads = min(x.shape[2] for x in leaves if x.ndim == 4)
    rows, heads = (axes or None for axes in heads_axes(mesh, leaves[0].shape[0], kv_heads))
    split = P(rows, None, heads, None)
    places = jax.tree.map(lambda x: {4: split, 2: P()}.get(x.ndim, P(rows)), arrays)
    return jax.shard_map(call, in_specs=places, out_specs=split, check_vma=False)(*arrays)


def vocabulary_axes(vocab: int) -> tuple[str, ...]:
    """The mesh axes that split the output head, and therefore the scores of a decoding step."""
    mesh = current_mesh()
    axes = () if mesh is None else dividing(mesh, (TENSOR, FSDP), vocab)
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def over_vocabulary(call: Callable[..., Any], scores: jax.Array, *of_rows: jax.Array) -> Any:
    """Calls `call(scores, *of_rows)` on every device with its part of the vocabulary.

    Args:
      call: function from `[rows, part of the vocabulary]` and arrays `[rows]` to arrays `[rows]`, which communicates
        between devices itself.
      scores: scores before softmax, `[rows, vocab]`.
      *of_rows: further arguments of the function, `[rows]`.
    """
    mesh = current_mesh()
    rows = dividing(mesh, (DATA,), scores.shape[0]) or None
    places = P(rows, vocabulary_axes(scores.shape[1])), *(P(rows) for _ in of_rows)
    return jax.shard_map(call, in_specs=places, out_specs=P(rows), check_vma=False)(scores, *of_rows)


def split_vocabulary(scores: jax.Array) -> jax.Array:
    """Splits the vocabulary of scores `[rows, vocab]` like that of the output head."""
    mesh = current_mesh()
    if mesh is None:
        return scores
    place = P(dividing(mesh, (DATA,), scores.shape[0]) or None, vocabulary_axes(scores.shape[1]) or None)
    return jax.lax.with_sharding_constraint(scores, place)


def gather_rows(x: jax.Array, kv_heads: int) -> jax.Array:
    """Gathers all rows of a cache on every device; heads stay split if `split_heads` splits them."""
    mesh = current_mesh()
    if mesh is None:
        return x
    _, heads = heads_axes(mesh, x.shape[0], kv_heads)
    return jax.lax.with_sharding_constraint(x, P(None, None, heads or None, None))


def replicated(weight: Any) -> Any:
    """Gathers a weight, adapted or not, on every device, if rows are split over all devices."""
    mesh = current_mesh()
    if mesh is None or TENSOR not in _ROWS.get():
        return weight
    return map_shared(lambda x: jax.lax.with_sharding_constraint(x, P()), weight)


def _kernel_axes(path: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that split the input and output axes of a kernel."""
    name = path.split("/")[-2] if "/" in path else ""
    if name == "lm_head":
        return (), (TENSOR, FSDP)
    if name in _INTO_TENSOR:
        return (FSDP,), (TENSOR,)
    return ((TENSOR,), (FSDP,)) if name in _FROM_TENSOR else ((), ())


def kernel_spec(mesh: Mesh, path: str, shape: Sequence[int]) -> P:
    """The partition `(input, output)` of a kernel of the decoder's tree, by path."""
    return partition(mesh, shape, *_kernel_axes(path))


def _leaf_axes(path: str, ndim: int, tied: bool) -> tuple[tuple[str, ...], ...]:
    kind = path.split("/")[-1]
    if kind == "kernel" and ndim == 2:
        return _kernel_axes(path)
    if kind == "embedding" and ndim == 2:
        # A tied table is split by vocabulary, so that scores need no sum over devices. Any other is split so that a
        # lookup needs no other device.
        return ((TENSOR, FSDP), ()) if tied else ((), (TENSOR, FSDP))
    return ((),) * ndim


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """Chooses the sharding of each weight of the decoder's tree.

    Args:
      mesh: mesh made by `MeshSpec.make`.
      params: tree of weights or of their `jax.ShapeDtypeStruct`s.
    """

    def place(path: str, leaf: Any) -> Any:
        axes = _leaf_axes(path, len(leaf.shape), tied="lm_head" not in params)
        # The scales of a quantized kernel have its axes, of size 1 where nothing can be split.
        return jax.tree.map(lambda part: NamedSharding(mesh, partition(mesh, part.shape, *axes)), leaf)

    return map_by_path(place, params)


def factor_shardings(mesh: Mesh, factors: Factors) -> Factors:
    """Chooses the shardings of factors: U like a kernel's outputs, V like its inputs, S and P replicated."""

    def place(path: str, leaf) -> Any:
        into, out = _kernel_axes(path)
        split = lambda x, axes: NamedSharding(mesh, partition(mesh, x.shape, (), axes, ()))
        everywhere = NamedSharding(mesh, P())
        return replace(leaf, U=split(leaf.U, out), S=everywhere, V=split(leaf.V, into), P=everywhere)

    return replace(factors, leaves={path: place(path, leaf) for path, leaf in factors.leaves.items()})


def policy_shardings(mesh: Mesh, policy: Adapted) -> Adapted:
    """Chooses the shardings of a policy's weights and of its factors, if any."""
    return policy.map_frozen(partial(param_shardings, mesh), partial(factor_shardings, mesh))


def abstract_everywhere(tree: Any, mesh: Mesh | None = None) -> Any:
    """The shapes of a tree that is replicated on a mesh (default: that of `jax.set_mesh`, if set)."""
    mesh = jax.sharding.get_mesh() if mesh is None else mesh
    return tree if mesh.empty else jax.tree.map(lambda x: abstract_at(x, NamedSharding(mesh, P())), tree)


def abstract_at(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array with the given sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
