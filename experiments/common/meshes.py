"""Places a run on its devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.common.fitting import fit, open_model, with_storage
from experiments.common.progress import tell, without_chatter
from experiments.common.wording import named
from experiments.configs import base
from tinylora_jax.models import AXES, MeshSpec, ModelConfig, active_mesh, device_bytes


def parse_mesh(text: str) -> MeshSpec:
    """Parses `data,fsdp,tensor`, such as 1,1,8.

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


def use_mesh(spec: MeshSpec, devices: Sequence[jax.Device] | None = None) -> AbstractContextManager:
    """Sets the mesh of these devices for the `with` block; no mesh for a single device.

    Args:
      spec: sizes of the mesh.
      devices: devices of the mesh; None for all devices.
    """
    devices = jax.devices() if devices is None else devices
    mesh = spec.make(devices)
    return on_mesh(mesh if len(devices) > 1 else None)


def find_devices() -> None:
    """Starts JAX's back end without what its libraries print meanwhile; call it after the hosts are connected."""
    with without_chatter():
        jax.devices()


def use_fitting_mesh(config: ConfigDict, spec: MeshSpec) -> AbstractContextManager:
    """`use_mesh` for a run; sizes that the config leaves open are chosen by the memory of the devices.

    Raises:
      FileNotFoundError, ValueError: the model cannot be opened, or the mesh does not fit the devices.
    """
    find_devices()
    memory, devices = device_bytes(), jax.devices()
    if len(devices) == 1 or memory is None or spec.tensor:
        return use_mesh(spec)
    opened = open_model(config.model, config.dtype, config.quantize)
    config = with_storage(config, opened.quantize)
    return use_mesh(fit(opened.abstract.config, config, spec, devices, memory, joins_kernels()).mesh)


def prompting_mesh(model: ModelConfig, dtype: str, quantize: str, max_new_tokens: int, spec: MeshSpec) -> Mesh | None:
    """Chooses the mesh on which a command without a config answers prompts; None for a single device.

    The sizes must fit the devices, see `MeshSpec.resolve`.

    Args:
      model: architecture of the model.
      dtype: dtype of the weights.
      quantize: storage of the weights.
      max_new_tokens: longest answer, in tokens.
      spec: sizes of the mesh; those left open are chosen by the memory of the devices, as for a run.
    """
    memory, devices = device_bytes(), jax.devices()
    if len(devices) == 1:
        return None
    if memory is not None and not spec.tensor:
        config = base.get_config()
        config.dtype, config.quantize, config.max_new_tokens = dtype, quantize, max_new_tokens
        config.batch_size = config.samples = config.eval_batch_size = 1
        spec = fit(model, config, spec, devices, memory, joins_kernels()).mesh
    return spec.make(devices)


def on_mesh(mesh: Mesh | None) -> AbstractContextManager:
    """Sets a mesh for the `with` block; None sets none."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def slots_of(config: ConfigDict, model: ModelConfig, quantize: str, members: int = 1) -> int:
    """Chooses the number of completions decoded at once (0 for all), and reports the placement on devices.

    Args:
      config: run configuration.
      model: architecture of the model.
      quantize: storage of its weights.
      members: number of members of a sweep, whose batches are decoded together.
    """
    memory, mesh = device_bytes(), active_mesh()
    if memory is None and jax.default_backend() != "cpu":  # unknown accelerator memory: all at once
        return config.slots
    devices = list(mesh.devices.flat) if mesh else jax.devices()[:1]
    stored = with_storage(config, quantize)
    found = fit(model, stored, MeshSpec(*describe(mesh)), devices, memory, joins_kernels(), members)
    if found.num_bytes is not None:
        sizes = ", ".join(f"{name}={size}" for name, size in dataclasses.asdict(found.mesh).items())
        rows = members * config.batch_size * config.samples
        tell(
            f"{len(devices)} × {devices[0].device_kind}, mesh {sizes}; {min(found.slots or rows, rows)} of {rows}"
            f" completions at once, about {found.num_bytes / 1e9:.0f} of {memory / 1e9:.0f} GB a device while decoding"
        )
    return found.slots


def joins_kernels() -> bool:
    """Whether decoding joins unsplit kernels, see `generate`."""
    return jax.default_backend() == "gpu"


def replicate(tree: Any) -> Any:
    """Copies arrays from the host or one device to every device of the current mesh."""
    mesh = active_mesh()
    return jax.device_put(tree, None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def mesh_words(mesh: Mesh) -> str:
    """The sizes of a mesh by axis, such as `data=2 fsdp=1 tensor=4`."""
    return named(dict(zip(AXES, describe(mesh), strict=True)))


def describe(mesh: Mesh | None) -> Sequence[int]:
    """The sizes of the axes data, fsdp and tensor."""
    return (1, 1, 1) if mesh is None else tuple(mesh.shape.values())
