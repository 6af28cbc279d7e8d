"""Measures a step of several runs in one program, compared with a single run.

python -m experiments.benchmarks.population --config=experiments/configs/demo.py --members=4 --steps=2
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from experiments.benchmarks import common
from experiments.common.cli import use_compilation_cache
from experiments.common.compilation import compile_together
from experiments.common.opening import parse_flags
from experiments.common.population import Population, joint, member_configs
from experiments.common.specs import parse
from experiments.common.task import load_task, make_prompts
from tinylora_jax.adapters import adapt
from tinylora_jax.data import load_questions, make_pipeline, padded_width

FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    with common.measuring():
        config = FLAGS.config
        specs = parse(config)
        whole = joint(config, [config])
        task = load_task(config, specs, lambda params, svd: adapt(params, whole, svd))
        prompts = make_prompts(config, load_questions(specs.train_data), task)
        rows, seconds = {}, {}
        for count in dict.fromkeys((1, FLAGS.members)):
            configs = member_configs(config, [{"seed": seed} for seed in range(count)])
            population = Population(configs, specs, task, padded_width(prompts), FLAGS.steps + 1)
            states = population.initial_states()
            compile_together(population.lower(task, states))
            data = {
                name: make_pipeline(prompts, own.batch_size, own.seed, 1 + FLAGS.steps) for name, own in configs.items()
            }
            times, tokens = [], 0
            for index in range(1 + FLAGS.steps):
                batches = {name: next(iterator) for name, iterator in data.items()}
                started = time.perf_counter()
                found = population.step(task, states, index, batches, list(configs))
                times.append(time.perf_counter() - started)
                states = {name: result[0] for name, result in found.items()}
                tokens = sum(result[2].num_tokens for result in found.values())
            seconds[count] = statistics.median(times[1:])
            rows[f"members: {count}, seconds a step"] = seconds[count]
            rows[f"members: {count}, tokens generated in the last"] = tokens
        rows["ratio"] = seconds[FLAGS.members] / seconds[1]
        about = {
            "model": task.name,
            "prompts × samples, longest": f"{config.batch_size} × {config.samples}, {config.max_new_tokens}",
            "slots": config.slots or "all",
            "steps": FLAGS.steps,
        }
        peak = common.peak_bytes()
        common.report("population", about | rows | {"peak memory, GB": peak and peak / 1e9})


if __name__ == "__main__":
    common.define_flags()
    config_flags.DEFINE_config_file("config", None, "Config file, as for experiments.grpo.", lock_config=True)
    flags.DEFINE_integer("members", 8, "Number of runs in one program.", lower_bound=2)
    flags.DEFINE_integer("steps", 3, "Number of timed steps after the first.", lower_bound=1)
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
