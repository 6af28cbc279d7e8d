"""A run from its config to its summary, for any kind of trainer."""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from grain import DatasetIterator
from ml_collections import ConfigDict

from experiments.common import multihost
from experiments.common.cli import TrainingError, fail, reporting_errors, use_compilation_cache
from experiments.common.closing import emit, run_block
from experiments.common.eval_metrics import GRADES, scores
from experiments.common.launch import launch
from experiments.common.meshes import replicate, use_fitting_mesh
from experiments.common.opening import config_arguments
from experiments.common.places import mirrored, workdir_of
from experiments.common.preemption import Stopped, StopRequests
from experiments.common.progress import Steps, clear, tell, with_names
from experiments.common.specs import ConfigError, Specs, as_json, check_template, parse, points_per_prompt
from experiments.common.starting import device_words, start_block
from experiments.common.task import Task, load_graded_questions, make_prompts
from experiments.common.untrained import evaluate_untrained
from experiments.common.wording import WIDTH
from experiments.common.workdir import Workdir, discard
from experiments.evaluate import evaluate, lower_evaluation
from experiments.plot import try_plot
from tinylora_jax.adapters import Adapted, Trained
from tinylora_jax.data import Prompt, PromptQueue, Question, make_pipeline, padded_width
from tinylora_jax.io import log_picture, parse_loggers, save_trained
from tinylora_jax.io.adapter import base_fingerprint
from tinylora_jax.models import ModelConfig, abstract_everywhere, active_mesh, device_bytes
from tinylora_jax.multihost import is_first, on_first, to_host
from tinylora_jax.training import Bounds, DivergenceError, Plan, TrainState, init_state, plan_update

Totals = dict[str, float]

_SUMMARY = ("batch_size", "samples", "max_new_tokens", "template", "reward", "dtype", "seed")  # stored in adapter.json


class Stepped(NamedTuple):
    """The results of a step.

    Attributes:
      state: training state after the step.
      metrics: metrics to log.
      page: page of readable completions.
      tokens: number of generated tokens.
    """

    state: TrainState
    metrics: dict[str, float]
    page: str = ""
    tokens: int = 0


class Trainer(ABC):
    """The sizes, programs and optimizer of a run's steps, without weights.

    It is created from a task whose weights are still being read, and its steps take the loaded task: the programs are
    the same.

    Args:
      config: run configuration.
      specs: parsed run configuration.
      prompts: training prompts.
      steps: length of the learning-rate schedule, in steps.
      stop: stop requests, checked between the phases of a step.
    """

    def __init__(self, config: ConfigDict, specs: Specs, prompts: Sequence[Prompt], steps: int, stop: StopRequests):
        self.config, self.specs, self.stop = config, specs, stop
        self.width, self.optimizer = padded_width(prompts), optimizer_of(specs, steps)

    def initial_state(self, policy: Adapted) -> TrainState:
        """The state before the first step."""
        return replicate(init_state(policy.init(), self.optimizer))

    def abstract_state(self, policy: Adapted) -> TrainState:
        """The shapes and shardings of the initial state."""
        make = lambda policy: init_state(policy.init(), self.optimizer)
        return abstract_everywhere(jax.eval_shape(make, policy))

    @abstractmethod
    def lower(self, task: Task, state: TrainState) -> Iterator[jax.stages.Lowered]:
        """Lowers the programs of a step for a state or its shapes, to compile them in advance."""

    @abstractmethod
    def step(self, task: Task, state: TrainState, index: int, data: DatasetIterator) -> Stepped:
        """Runs one training step on the next prompts of the data.

        Raises:
          DivergenceError: the loss, the gradient or v is not finite.
        """


MakeTrainer = Callable[[ConfigDict, Specs, Task, Sequence[Prompt], int, StopRequests], Trainer]


def optimizer_of(specs: Specs, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run with a given number of rollouts."""
    updates = steps * specs.grpo.updates_per_rollout
    return dataclasses.replace(specs.optimizer, total_updates=updates).transform()


def plan_of(
    config: ConfigDict,
    specs: Specs,
    model: ModelConfig,
    width: int,
    samples: int | None = None,
    longest: int | None = None,
) -> Plan:
    """The plan of a run's update.

    Args:
      config: run configuration.
      specs: parsed run configuration.
      model: architecture.
      width: padded prompt length, in tokens.
      samples: number of completions per prompt; None for the configuration's value.
      longest: longest completion, in tokens; None for the configuration's value.
    """
    samples, longest = samples or config.samples, longest or config.max_new_tokens
    bounds = Bounds(config.batch_size, width, samples, longest)
    dtype = jnp.dtype(config.dtype)
    return plan_update(model, specs.grpo, config.temperature, bounds, dtype, active_mesh(), device_bytes())


def summary_of_config(config: ConfigDict) -> dict[str, Any]:
    """The part of a config that is stored in an adapter's description."""
    kept = {name: config[name] for name in _SUMMARY}
    return kept | {"train_data": config.train_data.source, "learning_rate": config.optimizer.learning_rate}


def num_steps(config: ConfigDict, num_prompts: int) -> int:
    """Number of rollouts of a run.

    Raises:
      ConfigError: there are fewer prompts than a batch needs.
    """
    steps = num_prompts // config.batch_size * config.epochs
    steps = min(steps, config.max_steps) if config.max_steps else steps
    if steps < 1:
        raise ConfigError(f"config.batch_size={config.batch_size} exceeds the {num_prompts} prompts; lower it")
    return steps


def questions_of(config: ConfigDict, specs: Specs) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Loads and checks the questions for training and evaluation, before the slow part of a run.

    Raises:
      ConfigError: there are fewer questions than a batch needs, the reward can never accept most of them, or the
        template asks for another format than the reward accepts.
    """
    check_template(config.template, config.reward)
    to_train = load_graded_questions(specs.train_data, config.reward)
    to_evaluate = load_graded_questions(specs.eval_data, config.reward)
    num_steps(config, len(to_train))
    return to_train, to_evaluate


def data_of(
    config: ConfigDict, prompts: Sequence[Prompt], epochs: int | None = None
) -> DatasetIterator[tuple[Prompt, ...]]:
    """The training prompts of a run: batches of whole epochs, or an endless `PromptQueue`.

    Args:
      config: run configuration.
      prompts: training prompts.
      epochs: number of epochs; None for the configuration's value.
    """
    if config.refill or config.min_draw < 1:
        return PromptQueue(prompts, config.batch_size, config.seed, config.samples, config.min_draw)
    return make_pipeline(prompts, config.batch_size, config.seed, epochs or config.epochs)


@contextmanager
def stoppable(workdir: Path, what: str) -> Iterator[StopRequests]:
    """Context of a training command: errors that a user can fix, and stop requests, end it with one message.

    Args:
      workdir: folder for the traceback of an error.
      what: noun for messages, such as `run`.
    """
    stop = StopRequests()
    with reporting_errors(workdir):
        try:
            yield stop
        except Stopped as stopped:
            if is_first():
                clear()
                text = f"stopped by {stopped}; the same command continues the {what} in"
                where = with_names(workdir)
                print(text, where, sep=" " if len(f"{text} {where}") < WIDTH else "\n  ", flush=True)
            raise SystemExit(stopped.exit_code) from None


def train(
    trainer: Trainer,
    task: Task,
    data: DatasetIterator,
    steps: int,
    folder: Workdir,
    started: float,
    judge: Callable[[Trained], dict[str, Any]],
    untrained: Callable[[], dict[str, Any]],
) -> tuple[TrainState, Totals]:
    """Runs the remaining steps and saves each one.

    The untrained model is evaluated after the first step, and not before it: the user sees a trained step a minute
    earlier. The answers are the same, because v is the initial one again.

    Args:
      trainer: trainer of the run.
      task: loaded task.
      data: batches of training prompts.
      steps: number of steps of the run.
      folder: folder of the run.
      started: time at which the run started.
      judge: function that evaluates trained parameters, for `config.evaluate_every`.
      untrained: function that returns the accuracies of the untrained model, from the folder if they are there.

    Returns:
      The final state, and totals over the whole run, including interrupted parts.
    """
    config, state = trainer.config, trainer.initial_state(task.policy)
    totals = {"wall_s": 0.0, "tokens": 0, "rollout_s": 0.0}
    saved = folder.restore(state)
    if saved is not None:
        state, record = replicate(saved[0]), saved[1]
        data.set_state(record["data"])
        totals = record["totals"]
        begun, now = record.get("devices", device_words()), device_words()
        moved = f"; it was saved on {begun}, and continues on {now}" if begun != now else ""
        tell(f"continuing after step {int(state.step)} of {steps}{moved}")
    first, before = int(state.step), totals["wall_s"]
    folder.start(first)
    with closing(folder), Steps(steps, first) as shown:
        for index in range(first, steps):
            trainer.stop.check()
            try:
                state, metrics, page, tokens = trainer.step(task, state, index, data)
            except DivergenceError as error:
                raise TrainingError.at_step(index, error) from error
            totals["tokens"] += tokens
            totals["rollout_s"] += metrics.get("rollout_s", 0.0)
            if config.evaluate_every and (index + 1) % config.evaluate_every == 0 and index + 1 < steps:
                # Before the step is saved: a run that is interrupted here repeats the step and its evaluation.
                with shown.aside():
                    found = judge(state.v)
                metrics |= {f"eval_{grade}": found[grade] for grade in GRADES}
                tell(f"after step {index + 1}: {scores(found)}")
            totals["wall_s"] = before + time.perf_counter() - started
            due = (index + 1) % config.checkpoint_every == 0 or index + 1 == steps
            record = {"data": data.get_state(), "totals": totals, "devices": device_words()} if due else None
            folder.keep(index, state, record, metrics, page)
            shown.step(metrics)
            if index == first:
                with shown.aside():
                    tell(f"before training: {scores(untrained())}")
        folder.flush()
    if first < steps:  # the evaluation after the only step counts too
        totals["wall_s"] = before + time.perf_counter() - started
    return state, totals


def run(
    config: ConfigDict,
    workdir: Path,
    stop: StopRequests,
    make_trainer: MakeTrainer,
    experiment: str,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Trains one adapter, from the config to the summary; continues a run in the workdir.

    Args:
      config: run configuration, see `experiments/configs/base.py`.
      workdir: folder of the run, see `RunLog`.
      stop: stop requests, checked between phases.
      make_trainer: class of the trainer, for rewards or for solutions.
      experiment: name of the experiment, `grpo` or `sft`; one cannot continue a workdir of the other.
      dry_run: whether to stop after saying what would run.

    Returns:
      The summary; empty for a dry run.
    """
    started, is_new = time.perf_counter(), not workdir.exists()
    specs = parse(config)
    folder = Workdir(workdir, as_json(config, experiment), specs.loggers)
    done = folder.read_json("summary.json")
    if done is not None:
        tell(f"{workdir} is complete; choose another --workdir to train again")
        return done
    train_questions, eval_questions = questions_of(config, specs)
    how = {"batch_size": config.eval_batch_size, "samples": config.eval_samples}
    with launch(config, specs, members=points_per_prompt(config)) as start:
        prompts = make_prompts(config, train_questions, start.abstract)
        questions = make_prompts(config, eval_questions, start.abstract)
        steps = num_steps(config, len(prompts))
        trainer = make_trainer(config, specs, start.abstract, prompts, steps, stop)
        abstract = trainer.abstract_state(start.abstract.policy)  # refuses more numbers than the optimizer takes
        count = {"training": len(prompts), "evaluation": len(questions)}
        tell(start_block(config, start.abstract, workdir, count, steps, experiment))
        if dry_run:
            if is_new:
                discard(workdir)
            return {}
        to_train = trainer.lower(start.abstract, abstract) if folder.saved_steps() < steps else ()
        task = start.finish(chain(to_train, lower_evaluation(start.abstract, abstract.v, questions, **how)))
    folder.claim()
    judge = partial(evaluate, task, prompts=questions, seed=config.seed, between=stop.check)
    # The initial v takes gigabytes in full fine-tuning, so it does not outlive its evaluation.
    untrained = partial(evaluate_untrained, folder, task, lambda: judge(v=replicate(task.policy.init()), **how))

    data = data_of(config, prompts)
    in_between = lambda v: judge(v=v, batch_size=config.eval_batch_size)[0]
    state, totals = train(trainer, task, data, steps, folder, started, in_between, untrained)
    finished = time.perf_counter()

    before = untrained()  # answers now only if the run was killed between its last step and this evaluation
    about = {"steps": steps, "eval_before": before, "config": summary_of_config(config)}
    folder.check()
    saved = _save(workdir / "adapter", task, state.v, config.save_dtype, about)
    after, answers = judge(v=replicate(saved), **how)
    folder.write_rows("answers_after.jsonl", answers)
    totals["wall_s"] += time.perf_counter() - finished
    summary = _summary(task, steps, before, after, totals)
    folder.write_json("summary.json", summary)
    return summary


def _summary(task: Task, steps: int, before: dict[str, Any], after: dict[str, Any], totals: Totals) -> dict[str, Any]:
    """The content of summary.json."""
    summary = {
        "model": task.name,
        "params": task.policy.num_params,
        "bytes_bf16": 2 * task.policy.num_params,
        "steps": steps,
        "eval_before": before,
        "eval_after": after,
        "wall_s": round(totals["wall_s"], 1),
    }
    if totals["rollout_s"]:
        summary["generated_tokens_per_s"] = round(totals["tokens"] / totals["rollout_s"], 1)
    return summary


def _save(folder: Path, task: Task, v: Trained, dtype: str, about: dict[str, Any]) -> Trained:
    """Saves the trained parameters, and returns them as saved, for a vector after rounding to its 26 bytes."""
    policy, v, fingerprint = task.policy_to_save(), to_host(v), base_fingerprint(task.policy.params)

    def write() -> list[Any] | None:
        saved = save_trained(folder, task.pretrained, policy, v, fingerprint, dtype, **about)
        if all(map(np.array_equal, jax.tree.leaves(saved), jax.tree.leaves(v))):
            return None  # large ones are saved in float32, so other processes already have them
        return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(saved)]

    found = on_first(write)
    leaves, structure = jax.tree.flatten(v)
    return v if found is None else jax.tree.unflatten(structure, [np.asarray(leaf, np.float32) for leaf in found])


def command_line(values: Any, run: Callable[[ConfigDict, Path, StopRequests, bool], dict[str, Any]]) -> None:
    """Runs a training command with parsed flags, from the run to its ending; a stop request ends the program.

    Args:
      values: values of the flags from `opening.define_run`.
      run: function from config, workdir, stop requests and `dry_run` to the summary, which is empty for a dry run.
    """
    use_compilation_cache()
    if not values.workdir:
        fail("--workdir is empty; name a folder for the run")
    workdir, text = workdir_of(values.workdir), None
    with stoppable(workdir, "run") as stop:
        multihost.connect(values)
        with mirrored(values.workdir, workdir, values.dry_run):
            with use_fitting_mesh(values.config, parse(values.config).mesh):
                summary = run(values.config, workdir, stop, values.dry_run)
            if summary and is_first():
                text = _ending(summary, workdir, values.config)
    if text is not None:
        emit(summary, text, values.json)


def _ending(summary: dict[str, Any], workdir: Path, config: ConfigDict) -> str:
    """Draws a finished run, shows the picture on its dashboards, and returns the text at the end of the command."""
    picture = try_plot(workdir)
    if picture is not None:
        log_picture(workdir, parse_loggers(config.logger), config.to_dict(), picture, summary["steps"])
    return run_block(summary, workdir, config_arguments(), picture)
