"""Measures a GRPO step with real prompts and natural lengths, and the time until the first step.

python -m experiments.benchmarks.grpo_step --config=experiments/configs/demo.py --steps=3
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from experiments.benchmarks import common
from experiments.common.architectures import matrix_params
from experiments.common.cli import use_compilation_cache
from experiments.common.launch import launch
from experiments.common.opening import parse_flags
from experiments.common.preemption import StopRequests
from experiments.common.runs import data_of
from experiments.common.specs import parse
from experiments.common.task import Task, make_prompts
from experiments.grpo import Trainer
from tinylora_jax.data import load_questions

FLAGS = flags.FLAGS
_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "traced, all threads together",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowered, all threads together",
    "/jax/core/compile/backend_compile_duration": "compiled or read from the cache, all threads together",
    "/jax/compilation_cache/cache_retrieval_time_sec": "read from the cache, all threads together",
}


def seconds_since_launch() -> float:
    """Seconds since the start of this process, including the interpreter (on Linux; elsewhere its CPU time)."""
    try:
        return time.time() - os.stat(f"/proc/{os.getpid()}").st_ctime
    except OSError:
        return time.process_time()


@contextmanager
def compile_events() -> Iterator[dict[str, float]]:
    """Adds up what JAX reports of its compilations inside the `with` block; a trace within another counts twice."""
    total: dict[str, float] = {}

    def listen(event: str, seconds: float, **more: str | int) -> None:
        if event in _EVENTS:
            total[_EVENTS[event]] = total.get(_EVENTS[event], 0.0) + seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield total
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class Timed(NamedTuple):
    """Timings of a few steps of a run.

    Attributes:
      task: model with its reward and sampling settings.
      median: medians over the steps after the first, of every metric, of `step_s` and of generated `tokens`.
      ready_s: seconds from launch to the factorized model with all programs compiled.
      first_s: seconds from launch to the first finished step.
      start: seconds of each part of the launch, by name.
    """

    task: Task
    median: Mapping[str, float]
    ready_s: float
    first_s: float
    start: Mapping[str, float]


def timed_steps(config: ConfigDict, steps: int, questions: int | None) -> Timed:
    """Runs steps of a config on the current mesh, and times those after the first.

    Args:
      config: run configuration.
      steps: number of timed steps.
      questions: number of questions to read; None reads all.
    """
    parts = {"interpreter and imports": seconds_since_launch()}
    specs = parse(config)
    specs = dataclasses.replace(specs, train_data=dataclasses.replace(specs.train_data, limit=questions))
    loaded = load_questions(specs.train_data)
    with launch(config, specs) as start:
        prompts = make_prompts(config, loaded, start.abstract)
        trainer = Trainer(config, specs, start.abstract, prompts, steps + 1, StopRequests())
        parts["questions, headers and prompts"] = seconds_since_launch() - parts["interpreter and imports"]
        with compile_events() as events:
            task = start.finish(trainer.lower(start.abstract, trainer.abstract_state(start.abstract.policy)))
    ready = first = seconds_since_launch()
    data = data_of(config, prompts, epochs=1 + steps)
    state, found = trainer.initial_state(task.policy), []
    for index in range(1 + steps):
        started = time.perf_counter()
        state, metrics, _, generated = trainer.step(task, state, index, data)
        found.append(metrics | {"step_s": time.perf_counter() - started, "tokens": generated})
        first = seconds_since_launch() if index == 0 else first
    median = {name: statistics.median(step[name] for step in found[1:]) for name in found[0]}
    return Timed(task, median, ready, first, parts | start.seconds | events)


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    with common.measuring():
        config, count = FLAGS.config, len(common.devices())
        task, median, ready, first, parts = timed_steps(config, FLAGS.steps, FLAGS.questions)
        matrices, rate = matrix_params(task.model), common.matrix_rate(jax.numpy.dtype(config.dtype))
        peak = common.peak_bytes()
    floor = 4 * matrices * median["tokens"] / rate / count
    common.report(
        "GRPO step",
        {
            "model": task.name,
            "dtype": config.dtype,
            "parameters": task.policy.num_params,
            "prompts × samples, longest": f"{config.batch_size} × {config.samples}, {config.max_new_tokens}",
            "slots": task.slots or "all",
            "steps": FLAGS.steps,
            "mean length": median["length"],
            "seconds": median["step_s"],
            "of these, rollout": median["rollout_s"],
            "of these, update": median["update_s"],
            "of these, grading and the rest": median["step_s"] - median["rollout_s"] - median["update_s"],
            "generated tokens per second of rollout": median["tokens_per_s"],
            "generated tokens per second of rollout, a device": median["tokens_per_s"] / count,
            "slot efficiency": median["slot_efficiency"],
            "groups without signal, not differentiated": median["groups_without_signal"],
            "difference of a token's probability, rollout and update": median["delta_prob"],
            "floor of the update: 4·N·generated tokens at the matrix rate of all devices, seconds": floor,
            "seconds from launch to the factorized model, all programs compiled": ready,
            "seconds from launch to the first trained step": first,
            **{f"launch: {part}, seconds": seconds for part, seconds in parts.items()},
            "peak memory of a device, GB": peak and peak / 1e9,
        },
    )


if __name__ == "__main__":
    common.define_flags()
    config_flags.DEFINE_config_file("config", None, "Config file, as for experiments.grpo.", lock_config=True)
    flags.mark_flags_as_required(["config"])
    flags.DEFINE_integer("steps", 5, "Number of timed steps after the first.", lower_bound=1)
    flags.DEFINE_integer("questions", None, "Number of questions to read. Default: all.", lower_bound=1)
    app.run(main, flags_parser=parse_flags)
