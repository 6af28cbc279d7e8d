"""Trains an adapter by GRPO.

    python -m experiments.grpo --config=experiments/configs/demo.py --workdir=/tmp/tinylora-demo
    python -m experiments.grpo --config=experiments/configs/gsm8k_qwen2_5_7b.py --workdir=… --config.adapter.u=4

Any field of the config can be overridden. The run is saved after every step: Ctrl-C, SIGTERM or a crash, and
the same command continues it to the same bits. The last line printed is the result as one JSON object, which
is also in `workdir/summary.json`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import app, flags, logging
from grain import DatasetIterator
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from experiments import hosts
from experiments.answering import Answers, answer, lower_answer, step_key
from experiments.cli import fail, parse_flags, reporting_errors, tell, use_compilation_cache
from experiments.compilation import compile_together
from experiments.evaluate import evaluate, lower_evaluation
from experiments.hosts import is_first, on_first
from experiments.learning import Learner, answers_page
from experiments.meshes import active_mesh, plan_streams, use_mesh
from experiments.plot import try_plot
from experiments.setup import ConfigError, Specs, Task, as_json, load_task, make_prompts, parse
from experiments.stopping import Stopped, StopRequests
from experiments.workdir import Workdir
from tinylora_jax.data import Prompt, load_questions, make_pipeline, padded_width
from tinylora_jax.fetch import fetch
from tinylora_jax.io.adapter_file import read_adapter, save_adapter
from tinylora_jax.io.fingerprint import base_fingerprint
from tinylora_jax.training import Gradient, Plan, TrainState, init_state

Totals = dict[str, float]

_SUMMARY = ("batch_size", "samples", "max_new_tokens", "template", "reward", "dtype", "seed")  # kept in adapter.json


class Trainer(Learner):
    """One run's fixed parts, and the step they make: rollout, grading, update.

    Args:
      config: of the run.
      specs: the same, parsed.
      task: the model.
      prompts: to train on.
      steps: length of the learning-rate schedule, in rollouts.
      stop: asked between the phases of a step.
    """

    def __init__(
        self, config: ConfigDict, specs: Specs, task: Task, prompts: Sequence[Prompt], steps: int, stop: StopRequests
    ):
        self.config, self.stop, self.width = config, stop, padded_width(prompts)
        self.optimizer = optimizer_of(specs, steps)
        super().__init__(task, Gradient(plan_of(config, specs, task, self.width)), self.optimizer, config.samples)

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        return self.placed(init_state(self.task.policy.init(), self.optimizer))

    def placed(self, state: TrainState) -> TrainState:
        """A state of the host on every device."""
        mesh = active_mesh()
        return jax.device_put(state, None if mesh is None else NamedSharding(mesh, PartitionSpec()))

    def lower(self, state: TrainState) -> Iterator[jax.stages.Lowered]:
        """The programs of a step, to be compiled before the first."""
        yield lower_answer(
            self.task, state.v, self.config.batch_size, self.width, self.task.sampling, self.config.samples
        )
        yield from super().lower(state)

    def step(
        self, state: TrainState, index: int, prompts: Sequence[Prompt]
    ) -> tuple[TrainState, dict[str, float], Answers]:
        """One rollout of a batch of prompts and the updates on it.

        Raises:
          TrainingError: the loss, the gradient or v is not finite.
        """
        key = step_key(self.config.seed, "train", index)
        answers = answer(self.task, state.v, prompts, key, self.task.sampling, self.config.samples, self.width)
        self.stop.check()
        return *self.learn(state, answers, index), answers


def optimizer_of(specs: Specs, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of so many rollouts."""
    updates = steps * specs.grpo.updates_per_rollout
    return dataclasses.replace(specs.optimizer, total_updates=updates).transform()


def plan_of(config: ConfigDict, specs: Specs, task: Task, width: int) -> Plan:
    """What the update of a run is compiled for; `width` is that of its padded prompts."""
    bounds = (config.batch_size, width, config.samples, config.max_new_tokens)
    shapes, streams = plan_streams(active_mesh(), *bounds, specs.grpo.stream_tokens)
    return Plan(task.model, specs.grpo, config.temperature, config.max_new_tokens, shapes, streams)


def num_steps(config: ConfigDict, num_prompts: int) -> int:
    """Rollouts of a run.

    Raises:
      ConfigError: there are fewer prompts than a batch needs.
    """
    steps = num_prompts // config.batch_size * config.epochs
    steps = min(steps, config.max_steps) if config.max_steps else steps
    if steps < 1:
        raise ConfigError(f"config.batch_size={config.batch_size} is more than the {num_prompts} prompts; lower it")
    return steps


def train(
    trainer: Trainer, data: DatasetIterator, steps: int, folder: Workdir, started: float
) -> tuple[TrainState, Totals]:
    """Runs the steps that are still to do, each saved when it is done.

    Returns:
      The final state, and totals over the whole run, interruptions included.
    """
    config, state = trainer.config, trainer.initial_state()
    totals = {"wall_s": 0.0, "tokens": 0, "rollout_s": 0.0}
    saved = folder.restore(state)
    if saved is not None:
        state, record = trainer.placed(saved[0]), saved[1]
        data.set_state(record["data"])
        totals = record["totals"]
        tell(f"continuing after step {int(state.step)} of {steps}")
    first, before = int(state.step), totals["wall_s"]
    folder.start(first)
    quiet = not is_first()
    with closing(folder), tqdm(total=steps, initial=first, desc="training", unit="step", disable=quiet) as bar:
        for index in range(first, steps):
            trainer.stop.check()
            prompts = next(data)
            state, metrics, answers = trainer.step(state, index, prompts)
            totals["tokens"] += answers.num_tokens
            totals["rollout_s"] += metrics["rollout_s"]
            totals["wall_s"] = before + time.perf_counter() - started
            page = answers_page(prompts, answers, config.samples, config.samples_kept)
            due = (index + 1) % config.checkpoint_every == 0 or index + 1 == steps
            record = {"data": data.get_state(), "totals": totals} if due else None
            folder.keep(index, state, record, metrics, page)
            shown = {"reward": "reward", "length": "length", "tok/s": "tokens_per_s"}
            bar.set_postfix({label: f"{metrics[name]:.3g}" for label, name in shown.items()}, refresh=False)
            bar.update()
    return state, totals


def run(config: ConfigDict, workdir: Path, stop: StopRequests) -> dict[str, Any]:
    """Trains one adapter, from the config to the summary; continues what the workdir holds.

    Args:
      config: see `experiments/configs/base.py`.
      workdir: see `RunLog`.
      stop: says when to stop early.

    Returns:
      The summary.
    """
    started = time.perf_counter()
    specs = parse(config)
    folder = Workdir(workdir, as_json(config))
    done = folder.read("summary.json")
    if done is not None:
        tell(f"{workdir} is complete; choose another --workdir to train again")
        return done
    train_questions, eval_questions = load_questions(specs.train_data), load_questions(specs.eval_data)
    num_steps(config, len(train_questions))  # refuses too few before the slow part
    task = load_task(config, specs)
    prompts = make_prompts(config, train_questions, task)
    questions = make_prompts(config, eval_questions, task)
    steps = num_steps(config, len(prompts))
    trainer = Trainer(config, specs, task, prompts, steps, stop)
    folder.claim()
    how = {"batch_size": config.eval_batch_size, "samples": config.eval_samples}
    initial = trainer.initial_state()
    tell("compiling")
    compile_together(chain(trainer.lower(initial), lower_evaluation(task, initial.v, questions, **how)))

    before = folder.read("eval_before.json")
    if before is None:
        before, _ = evaluate(task, initial.v, questions, seed=config.seed, between=stop.check, **how)
        folder.write("eval_before.json", before)
    tell(f"before training: {json.dumps(before)}")

    data = make_pipeline(prompts, config.batch_size, config.seed, config.epochs)
    state, totals = train(trainer, data, steps, folder, started)
    finished = time.perf_counter()

    factors = fetch(task.policy.factors)

    fingerprint = base_fingerprint(task.policy.params)
    about = {"steps": steps, "eval_before": before, "config": {name: config[name] for name in _SUMMARY}}
    about["config"] |= {"train_data": config.train_data.source, "learning_rate": config.optimizer.learning_rate}

    def save_and_read() -> list[list[float]]:  # what is evaluated is what was saved, in its 26 bytes
        save_adapter(workdir / "adapter", factors, state.v, task.name, config.save_dtype, fingerprint, **about)
        return read_adapter(workdir / "adapter")[1].tolist()

    saved = np.asarray(on_first(save_and_read), np.float32)
    after, _ = evaluate(task, saved, questions, seed=config.seed, between=stop.check, **how)
    summary = {
        "model": task.name,
        "params": factors.num_params,
        "bytes_bf16": 2 * factors.num_params,
        "steps": steps,
        "eval_before": before,
        "eval_after": after,
        "wall_s": round(totals["wall_s"] + time.perf_counter() - finished, 1),
        "generated_tokens_per_s": round(totals["tokens"] / totals["rollout_s"], 1),
    }
    folder.write("summary.json", summary)
    return summary


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    logging.set_verbosity(logging.WARNING)  # Orbax reports every save at INFO
    if not FLAGS.workdir:
        fail("--workdir is empty; name a folder for the run")
    workdir = Path(FLAGS.workdir)
    stop = StopRequests()
    with reporting_errors(workdir):
        hosts.connect(FLAGS)
        try:
            with use_mesh(parse(FLAGS.config).mesh):
                summary = run(FLAGS.config, workdir, stop)
        except Stopped as stopped:
            if is_first():
                print(f"stopped by {stopped}; the same command continues the run in {workdir}", flush=True)
            raise SystemExit(stopped.exit_code) from None
    if is_first():
        try_plot(workdir)
        print(json.dumps(summary))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    config_flags.DEFINE_config_file("config", None, "What to train, and how.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder of the run: created, or continued.")
    hosts.define_flags()
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
