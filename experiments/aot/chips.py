"""TPU topologies by name, and the published limits of their chips."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from tinylora_jax.extras import install_command


@dataclass(frozen=True)
class Chip:
    """One JAX device of a TPU generation: a chip, or half of one on tpu7x.

    Attributes:
      kind: name of the TPU generation in a topology, such as `v5e`.
      hbm_bytes: size of its memory, in bytes.
      bandwidth: memory bandwidth, bytes per second.
      flops: bfloat16 operations per second.
      clock: clock rate in Hz, which converts XLA's cycles to seconds.
      ici: bandwidth around a ring of neighbours in bytes per second, both directions together.
      topologies: available slices, smallest first.
      at_once: number of programs to compile in parallel; None for the number of cores.
    """

    kind: str
    hbm_bytes: float
    bandwidth: float
    flops: float
    clock: float
    ici: float
    topologies: tuple[str, ...]
    at_once: int | None = None


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
# cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}. tpu7x has two devices a chip. Clocks: the matrix units' sizes and the
# peak rates give those of v5e, v5p and v6e; that of tpu7x is not published, and is the one at which XLA's estimate of
# a large copy reaches the same share of the bandwidth as on v5e. libtpu of jax 0.10.2 dies of a segmentation fault when
# it compiles several decompositions for tpu7x at once, and compiles each of them by itself.
CHIPS = {
    chip.kind: chip
    for chip in (
        Chip("v5e", 16e9, 819e9, 197e12, 1.5e9, 100e9, _FLAT),
        Chip("v6e", 32e9, 1640e9, 918e12, 1.75e9, 224e9, _FLAT),
        Chip("v5p", 95e9, 2765e9, 459e12, 1.75e9, 200e9, _CUBE),
        Chip("tpu7x", 96e9, 7370e9 / 2, 2307e12 / 2, 2.36e9, 200e9, _CUBE, at_once=1),
    )
}


@dataclass(frozen=True)
class Topology:
    """A slice: its chips, and its devices as JAX describes them on a machine without TPUs."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]


class TopologyError(ValueError):
    """A topology name is unknown, or its compiler is not installed."""


def _nearest(chip: Chip, wanted: str) -> str:
    """The slice whose number of chips is closest to that in a name."""
    try:
        count = math.prod(int(n) for n in wanted.split("x"))
    except ValueError:
        count = 1
    size = lambda layout: math.prod(int(n) for n in layout.split("x"))
    return min(chip.topologies, key=lambda layout: abs(math.log(size(layout) / max(count, 1))))


def topology(name: str) -> Topology:
    """Looks up a topology such as `v5e:2x4`; `v5e:1x1` is one chip.

    Raises:
      TopologyError: the name is unknown (the message gives the nearest one), or the compiler is not installed.
    """
    kind, _, layout = name.partition(":")
    if kind not in CHIPS:
        raise TopologyError(f"topology {name!r}: expected one of {', '.join(CHIPS)} before the colon, as in v5e:2x4")
    chip = CHIPS[kind]
    alone = layout in ("1", "1x1", "1x1x1")
    asked = chip.topologies[0] if alone else layout
    # Several processes may load libtpu at once, because none of them uses a TPU.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{asked}")
    except jax.errors.JaxRuntimeError as error:
        if "libtpu" in str(error):
            raise TopologyError(f"libtpu does not load ({error}); run: {install_command('tpu')}") from error
        near = f"{kind}:{_nearest(chip, layout)}"
        raise TopologyError(f"topology {name!r} does not exist; the nearest is {near} ({error})") from error
    except (RuntimeError, ImportError) as error:
        raise TopologyError(f"the TPU compiler is not installed ({error}); run: {install_command('tpu')}") from error
    devices = tuple(found.devices)
    return Topology(name, chip, devices[:1] if alone else devices)


def larger(name: str) -> Sequence[str]:
    """Larger topologies: more chips of the same kind, smallest first, then chips with more memory."""
    kind, _, layout = name.partition(":")
    size = lambda text: math.prod(int(n) for n in text.split("x"))
    chip = CHIPS[kind]
    own = [f"{kind}:{other}" for other in chip.topologies if size(other) > size(layout)]
    return [*own, *(f"{c.kind}:{c.topologies[0]}" for c in CHIPS.values() if c.hbm_bytes > chip.hbm_bytes)]
