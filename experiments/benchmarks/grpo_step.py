"""Seconds of a whole GRPO step of a config, real prompts and answers of natural lengths, and of the way to the first.

python -m experiments.benchmarks.grpo_step --config=experiments/configs/demo.py --steps=3
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Sequence

import jax
from absl import app, flags
from ml_collections import config_flags

from experiments.benchmarks import common
from experiments.cli import parse_flags, reporting_errors, use_compilation_cache
from experiments.grpo import Trainer
from experiments.launch import launch
from experiments.setup import make_prompts, parse
from experiments.shapes import matrix_params
from experiments.stopping import StopRequests
from tinylora_jax.data import load_questions, make_pipeline

FLAGS = flags.FLAGS


def seconds_since_launch() -> float:
    """Seconds since this process began, the interpreter's start included (Linux; elsewhere since its CPU clock)."""
    try:
        return time.time() - os.stat(f"/proc/{os.getpid()}").st_ctime
    except OSError:
        return time.process_time()


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    with reporting_errors():
        config = FLAGS.config
        specs = parse(config)
        specs = dataclasses.replace(specs, train_data=dataclasses.replace(specs.train_data, limit=FLAGS.questions))
        questions = load_questions(specs.train_data)
        with launch(config, specs) as start:
            prompts = make_prompts(config, questions, start.outline)
            trainer = Trainer(config, specs, start.outline, prompts, FLAGS.steps + 1, StopRequests())
            trainer.task = task = start.finish(trainer.lower(trainer.state_outline()))
        ready = seconds_since_launch()
        data = make_pipeline(prompts, config.batch_size, config.seed, epochs=1 + FLAGS.steps)
        state, steps, tokens = trainer.initial_state(), [], []
        for index in range(1 + FLAGS.steps):
            started = time.perf_counter()
            state, metrics, _, generated = trainer.step(state, index, next(data))
            steps.append(metrics | {"step_s": time.perf_counter() - started})
            tokens.append(generated)
            if index == 0:
                first = seconds_since_launch()
        median = {name: statistics.median(step[name] for step in steps[1:]) for name in steps[0]}
        matrices, rate = matrix_params(task.model), common.matrix_rate(jax.numpy.dtype(config.dtype))
        peak = common.peak_bytes()
    generated = statistics.median(tokens[1:])
    common.report(
        "GRPO step",
        {
            "model": task.name,
            "dtype": config.dtype,
            "parameters": task.policy.num_params,
            "prompts × samples, longest": f"{config.batch_size} × {config.samples}, {config.max_new_tokens}",
            "steps": FLAGS.steps,
            "mean length": median["length"],
            "seconds": median["step_s"],
            "of these, rollout": median["rollout_s"],
            "of these, update": median["update_s"],
            "of these, grading and the rest": median["step_s"] - median["rollout_s"] - median["update_s"],
            "generated tokens per second of rollout": median["tokens_per_s"],
            "slot efficiency": median["slot_efficiency"],
            "groups without signal, not differentiated": median["groups_without_signal"],
            "difference of a token's probability, rollout and update": median["delta_prob"],
            "floor of the update: 4·N·generated tokens at the matrix rate, seconds": 4 * matrices * generated / rate,
            "seconds from launch to the factorized model, all programs compiled": ready,
            "seconds from launch to the first trained step": first,
            "peak memory, GB": peak and peak / 1e9,
        },
    )


if __name__ == "__main__":
    common.define_flags()
    config_flags.DEFINE_config_file("config", None, "As for experiments.grpo.", lock_config=True)
    flags.mark_flags_as_required(["config"])
    flags.DEFINE_integer("steps", 5, "Timed steps after the first.", lower_bound=1)
    flags.DEFINE_integer("questions", None, "Questions to read; None reads all.", lower_bound=1)
    app.run(main, flags_parser=parse_flags)
