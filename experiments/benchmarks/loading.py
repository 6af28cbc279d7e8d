"""Measures host memory and seconds to load weights onto a mesh, with each process loading its shards.

python -m experiments.benchmarks.loading --model=/data/qwen2.5-7b --mesh=1,1,8

On several hosts, add the flags of `experiments.common.opening.define_multihost`. On a CPU the shards are in host memory
too, so the peak is compared with the shards plus the largest tensor. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
from absl import app, flags

from experiments.benchmarks import common
from experiments.common import multihost
from experiments.common.cli import reporting_errors
from experiments.common.meshes import parse_mesh, use_mesh
from experiments.common.opening import define_multihost, parse_flags
from tinylora_jax.io import open_pretrained
from tinylora_jax.models import active_mesh, param_shardings
from tinylora_jax.multihost import is_first

FLAGS = flags.FLAGS
T = TypeVar("T")
_EVERY_S = 0.005  # seconds between two memory measurements


def memory_in_use() -> int:
    """Anonymous memory of this process, in bytes; the kernel can drop pages of mapped files."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


def peak_of(work: Callable[[], T]) -> tuple[T, int]:
    """The result of `work`, and its peak of additional memory, in bytes."""
    before, most, done = memory_in_use(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(_EVERY_S):
            most = max(most, memory_in_use())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
        most = max(most, memory_in_use())
    finally:
        done.set()
        watcher.join()
    return result, max(most - before, 0)


def bytes_here(params: Any) -> int:
    """Bytes of a tree's shards on this process's devices."""
    return sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    with reporting_errors():
        multihost.connect(FLAGS)
        with use_mesh(parse_mesh(FLAGS.mesh), common.devices()):
            mesh = active_mesh()
            place = mesh and partial(param_shardings, mesh)
            opened = open_pretrained(FLAGS.model, common.dtype(), quantize=FLAGS.quantize)

            def read() -> Any:
                with opened.reading(place) as reading:
                    return jax.block_until_ready(reading.result())

            started = time.perf_counter()
            model, peak = peak_of(read)
            seconds = time.perf_counter() - started
            leaves = jax.tree.leaves(model)
            here, largest = bytes_here(model), max(leaf.nbytes for leaf in leaves)
            rows = {
                "model": FLAGS.model,
                "dtype": common.dtype().name,
                "quantize": FLAGS.quantize,
                "process": f"{jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} devices",
                "seconds": seconds,
                "all weights, MB": sum(leaf.nbytes for leaf in leaves) / 1e6,
                "this process's shards, MB": here / 1e6,
                "largest tensor, MB": largest / 1e6,
                "memory in use at most, MB": peak / 1e6,
                "over shards and largest tensor": peak / (here + largest),
            }
    if is_first():
        common.report("loading", rows)


if __name__ == "__main__":
    common.define_flags()
    define_multihost()
    app.run(main, flags_parser=parse_flags)
