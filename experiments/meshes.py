"""How a run lies on its devices."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import jax
from jax.sharding import Mesh

from tinylora_jax.models.sharding import DATA, FSDP, MeshSpec
from tinylora_jax.training import stream_shapes
from tinylora_jax.training.batch import Shape

_ROOM = 2  # places in a row for each token: a TPU computes all of them, where a GPU skips those of no token


def parse_mesh(text: str) -> MeshSpec:
    """`data,fsdp,tensor`, such as 1,1,8.

    Raises:
      ValueError: the text is not three integers.
    """
    try:
        data, fsdp, tensor = (int(part) for part in text.split(","))
        return MeshSpec(data, fsdp, tensor)
    except ValueError as error:
        raise ValueError(
            f"--mesh={text}: expected data,fsdp,tensor as three integers, such as 1,1,8 ({error})"
        ) from error


def use_mesh(spec: MeshSpec) -> AbstractContextManager:
    """The mesh of all devices, around everything that a run computes; nothing at all for a single device."""
    devices = jax.devices()
    mesh = spec.make(devices)
    return jax.set_mesh(mesh) if len(devices) > 1 else nullcontext()


def active_mesh() -> Mesh | None:
    """The mesh in use."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def plan_streams(
    mesh: Mesh | None, prompts: int, prompt_tokens: int, samples: int, completion_tokens: int, stream_tokens: int
) -> tuple[tuple[Shape, ...], int]:
    """The shapes of an update's streams, and how many of them run at once.

    One for every device, shorter ones if it takes that to give each of them something; where even the shortest are
    too many for the longest rollout, one for every group of devices that share a layer's weights.
    """
    bounds = (prompts, prompt_tokens, samples, completion_tokens)
    if mesh is None:
        return stream_shapes(*bounds, stream_tokens), 1
    whole = prompts * (prompt_tokens + samples * completion_tokens)
    for streams in (mesh.size, mesh.shape[DATA] * mesh.shape[FSDP]):
        shapes = stream_shapes(*bounds, min(stream_tokens, -(-whole // streams)), _ROOM)
        if shapes[-1].tokens * streams <= 2 * whole:
            break
    return shapes, streams


def describe(mesh: Mesh | None) -> Sequence[int]:
    """The sizes of the axes: data, fsdp, tensor."""
    return (1, 1, 1) if mesh is None else tuple(mesh.shape.values())
