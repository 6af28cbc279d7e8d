"""Measures a GRPO step on 1, 2, … devices: speed-up for equal work, efficiency for n-fold work.

python -m experiments.benchmarks.scaling --config=experiments/configs/demo.py --devices=1,2,4 --steps=3
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from experiments.benchmarks import common
from experiments.benchmarks.grpo_step import timed_steps
from experiments.common.cli import reporting_errors, use_compilation_cache
from experiments.common.opening import parse_flags
from experiments.common.progress import tell
from experiments.common.wording import counted
from tinylora_jax.models import AXES, MeshSpec

FLAGS = flags.FLAGS
WORK = {"same": "the same work", "n-fold": "n-fold work"}
_PHASES = {"step_s": "seconds", "rollout_s": "rollout", "update_s": "update"}


def adapter_spec(axis: str, count: int) -> MeshSpec:
    """The mesh with all its devices on one axis."""
    return MeshSpec(**{name: count if name == axis else 1 for name in AXES})


def measure(config: ConfigDict, axis: str, count: int, work: str) -> dict[str, float]:
    """Seconds of a step and its phases on a number of devices."""
    config = config.copy_and_resolve_references()
    config.batch_size *= count // min(map(int, FLAGS.devices)) if work == "n-fold" else 1
    tell(f"{counted(count, 'device')}, {config.batch_size} x {config.samples} completions")
    chosen = jax.devices()[:count]
    with common.use_devices(adapter_spec(axis, count), chosen):
        median = timed_steps(config, FLAGS.steps, FLAGS.questions).median
    gc.collect()  # frees the weights of this mesh for those of the next
    return {**{phase: median[phase] for phase in _PHASES}, "tokens_per_s": median["tokens"] / median["step_s"]}


def table(found: dict[tuple[str, int], dict[str, float]]) -> dict[str, Any]:
    """Builds the table: seconds, and speed-up and efficiency relative to the fewest devices."""
    rows: dict[str, Any] = {}
    for (work, count), phases in found.items():
        name, least = f"{counted(count, 'device')}, {WORK[work]}", min(n for w, n in found if w == work)
        one, more = found[work, least], count / least
        for phase, said in _PHASES.items():
            rows[f"{name}: {said}"] = phases[phase]
        ratio = one["step_s"] / phases["step_s"]
        rows[f"{name}: tokens per second of a step, a device"] = phases["tokens_per_s"] / count
        if work == "same":
            rows[f"{name}: speed-up"], rows[f"{name}: efficiency"] = ratio, ratio / more
        else:
            rows[f"{name}: times the seconds of {least}"], rows[f"{name}: efficiency"] = 1 / ratio, ratio
    return rows


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    with reporting_errors():
        counts = sorted({int(count) for count in FLAGS.devices})
        if counts[0] < 1 or counts[-1] > jax.device_count():
            raise ValueError(f"--devices={','.join(FLAGS.devices)}: expected 1 to {jax.device_count()} devices")
        FLAGS.mesh = ",".join(str(counts[-1] if name == FLAGS.axis else 1) for name in AXES)
        least = measure(FLAGS.config, FLAGS.axis, counts[0], "same")
        seconds = {(work, counts[0]): least for work in FLAGS.work}
        for case in ((work, count) for work in FLAGS.work for count in counts[1:]):
            seconds[case] = measure(FLAGS.config, FLAGS.axis, case[1], case[0])
    config = FLAGS.config
    about = {
        "model": config.model,
        "dtype": config.dtype,
        "axis": FLAGS.axis,
        "prompts × samples, longest": f"{config.batch_size} × {config.samples}, {config.max_new_tokens}",
        "steps": FLAGS.steps,
    }
    common.report("scaling", about | table(seconds))


if __name__ == "__main__":
    common.define_flags()
    config_flags.DEFINE_config_file("config", None, "Config file, as for experiments.grpo.", lock_config=True)
    flags.mark_flags_as_required(["config"])
    flags.DEFINE_list("devices", ["1", "2"], "Numbers of devices to measure.")
    flags.DEFINE_enum("axis", "data", AXES, "Mesh axis over which devices are spread.")
    flags.DEFINE_multi_enum("work", list(WORK), list(WORK), "Equal total batch, or equal prompts per device.")
    flags.DEFINE_integer("steps", 3, "Number of timed steps after the first.", lower_bound=1)
    flags.DEFINE_integer("questions", None, "Number of questions to read. Default: all.", lower_bound=1)
    app.run(main, flags_parser=parse_flags)
