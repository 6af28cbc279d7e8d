"""Trains a population of adapters at once: one run for every combination of the given values.

    python -m experiments.sweep --config=demo --workdir=/tmp/sweep --vary=optimizer.learning_rate=5e-3,1.5e-2
    python -m experiments.sweep --config=demo --workdir=/tmp/sizes --vary=adapter.n_tie=1,17,210 --vary=seed=0,1
    python -m experiments.sweep --config=demo --workdir=/tmp/two --member=seed=0,adapter.u=2 --member=seed=1
    python -m experiments.sweep --config=demo --workdir=/tmp/maps --vary=targets=.*/q_proj/kernel,.*/up_proj/kernel

--vary trains all combinations of the given values; --member=field=value,field=value adds a single member. Every member
has the same prompts, noise and optimizer as in a separate run. All decode in one batch over the same frozen weights.
Members may differ in seed, targets, optimizer.* except its method, adapter.* except the rank, and method (`tinylora`,
`lora_xs`; or `steering`, `bias`, `norm`). A member that diverges is dropped. The sweep is saved after every step, and
the same command continues it. Each member has a folder in `members` with the contents of a run's workdir.
`summary.json` compares the members, and `curves.png` shows their rewards.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from absl import flags

    from experiments.common import opening

    opening.define_config("Config shared by all members: a name such as demo, or a file.")
    opening.define_path("workdir", "Folder or URL of the sweep, which is created or continued.", url=True)
    flags.DEFINE_multi_string("vary", [], "Train all combinations of field=value,value,…; may be repeated.")
    flags.DEFINE_multi_string("member", [], "Add one member field=value,field=value,…; may be repeated.")
    flags.DEFINE_bool("dry_run", False, "Show what would run, and stop before anything is computed.")
    opening.define_json()
    flags.mark_flag_as_required("workdir")
    opening.begin(__doc__)

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from experiments.common.answering import readable_page
from experiments.common.changes import example_lines, read_change
from experiments.common.cli import TrainingError, fail, use_compilation_cache
from experiments.common.closing import ask, block, emit, member_rows, next_lines, place_lines
from experiments.common.eval_metrics import Row, scores
from experiments.common.launch import launch
from experiments.common.meshes import find_devices
from experiments.common.opening import parse_flags
from experiments.common.places import mirrored, workdir_of
from experiments.common.population import (
    Member,
    Population,
    combinations,
    joint,
    member_configs,
    parse_member,
    parse_variation,
)
from experiments.common.preemption import StopRequests
from experiments.common.progress import Steps, tell
from experiments.common.runs import num_steps, questions_of, stoppable, summary_of_config
from experiments.common.specs import ConfigError, as_json, check_plain_draws, parse
from experiments.common.starting import start_block
from experiments.common.task import Task, make_prompts
from experiments.common.untrained import evaluate_untrained
from experiments.common.wording import counted, paragraph, table
from experiments.common.workdir import discard, logged_vector
from experiments.evaluate import evaluate, lower_evaluation
from experiments.plot import try_plot
from tinylora_jax.adapters import Trained
from tinylora_jax.data import make_pipeline, padded_width
from tinylora_jax.io import TENSORBOARD, Checkpoints, RunLog, save_trained
from tinylora_jax.io.adapter import base_fingerprint
from tinylora_jax.training import TrainState

FLAGS = flags.FLAGS
_NAME = 36  # longest name of a member in the table


class Folder:
    """A sweep's workdir: the log and checkpoints of the sweep, and a log for every member.

    Args:
      path: folder of the sweep.
      config: configuration of the sweep.
      configs: configurations of the members, by name.
      loggers: names of the loggers of a member besides metrics.jsonl.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], configs: Mapping[str, ConfigDict], loggers: Sequence[str]
    ):
        self.path, self._loggers = path, loggers
        self.log = RunLog(path, config, claim=False)
        self._configs = configs

    def claim(self) -> None:
        """Reserves the folder for this sweep."""
        self.log.claim()
        self.members = {
            name: RunLog(self.member(name), as_json(config, "grpo"), loggers=self._loggers)
            for name, config in self._configs.items()
        }
        self.checkpoints = Checkpoints(self.path / "checkpoints")

    def member(self, name: str) -> Path:
        """A member's folder."""
        return self.path / "members" / name

    def keep(self, name: str, index: int, state: TrainState, metrics: Mapping[str, float], page: str) -> None:
        """Logs a finished step of a member."""
        self.members[name].samples(index, page)
        self.members[name].metrics(index, {**metrics, **logged_vector(state.v)})

    def close(self) -> None:
        """Closes the files."""
        try:
            for log in self.members.values():
                log.close()
        finally:  # also on a full disk: a thread may still be writing the last checkpoint
            self.checkpoints.close()


def train(
    population: Population,
    task: Task,
    data: Mapping[str, Any],
    steps: int,
    folder: Folder,
    stop: StopRequests,
    untrained: Callable[[], dict[str, Any]],
) -> tuple[dict[str, TrainState], dict[str, str]]:
    """Runs the remaining steps and saves each one; evaluates the untrained model after the first, like `runs.train`.

    Returns:
      The final state of every member, and the reasons why members were dropped.
    """
    states, dropped, first = population.initial_states(), {}, 0
    if folder.checkpoints.latest_step() is not None:
        states, record = folder.checkpoints.restore(states)
        states, dropped, first = jax.device_put(states), record["dropped"], record["step"]
        for name, iterator in data.items():
            iterator.set_state(record["data"][name])
        tell(f"continuing after step {first} of {steps}")
    for log in folder.members.values():
        log.start(first)
    config = population.config
    with Steps(steps, first) as shown:
        for index in range(first, steps):
            stop.check()
            live = [name for name in population.members if name not in dropped]
            if not live:
                raise TrainingError(f"all members diverged: {json.dumps(dropped)}")
            prompts = {name: next(iterator) for name, iterator in data.items()}
            seen: list[Mapping[str, float]] = []
            for name, result in population.step(task, states, index, prompts, live).items():
                if isinstance(result, TrainingError):
                    dropped[name] = str(result).split(";")[0]
                    tell(f"dropped {name}: {dropped[name]}")
                    continue
                states[name], metrics, graded = result
                page = readable_page(prompts[name], graded, config.samples_kept)
                folder.keep(name, index, states[name], metrics, page)
                seen.append(metrics)
            record = {"step": index + 1, "dropped": dropped}
            record["data"] = {name: iterator.get_state() for name, iterator in data.items()}
            folder.checkpoints.save(index + 1, states, record)
            if seen:
                mean = lambda field, seen=seen: sum(metrics[field] for metrics in seen) / len(seen)
                shown.step({field: mean(field) for field in ("reward", "length", "v_norm")})
            if index == first:
                with shown.aside():
                    tell(f"before training: {scores(untrained())}")
    folder.checkpoints.wait()
    return states, dropped


def run(
    config: ConfigDict,
    vary: Sequence[str],
    workdir: Path,
    stop: StopRequests,
    member: Sequence[str] = (),
    dry_run: bool = False,
) -> dict[str, Any]:
    """Trains, evaluates and compares the members; continues a sweep in the workdir.

    Args:
      config: configuration shared by all members.
      vary: variations `field=value,value,…`.
      workdir: folder of the sweep.
      stop: stop requests, checked between phases.
      member: further members `field=value,field=value,…`.
      dry_run: whether to stop after saying what would run.

    Returns:
      The summary; empty for a dry run.
    """
    specs, started, is_new = parse(config), time.perf_counter(), not workdir.exists()
    check_plain_draws(config, "experiments.sweep")
    if config.evaluate_every:
        raise ConfigError("config.evaluate_every: a sweep evaluates its members only at the end; set it to 0")
    if others := set(specs.loggers) - {TENSORBOARD}:
        raise ConfigError(
            f"config.logger={config.logger!r}: a sweep has no {', '.join(others)}; set it to tensorboard or none"
        )
    changes = combinations([parse_variation(text, config) for text in vary])
    configs = member_configs(config, [*changes, *(parse_member(text, config) for text in member)])
    whole = joint(config, list(configs.values()))
    folder = Folder(workdir, {**as_json(config, "sweep"), "members": list(configs)}, configs, specs.loggers)
    done = folder.log.read_json("summary.json")
    if done is not None:
        tell(f"{workdir} is complete; choose another --workdir to train again")
        return done
    train_questions, eval_questions = questions_of(config, specs)
    how = {"batch_size": config.eval_batch_size, "samples": config.eval_samples}
    with launch(config, specs, whole, len(configs)) as start:
        prompts = make_prompts(config, train_questions, start.abstract)
        questions = make_prompts(config, eval_questions, start.abstract)
        steps = num_steps(config, len(prompts))
        population = Population(configs, specs, start.abstract, padded_width(prompts), steps)
        count = {"training": len(prompts), "evaluation": len(questions)}
        trains = f"{counted(len(configs), 'member')} at once: {', '.join(configs)}"
        tell(start_block(config, start.abstract, workdir, count, steps, "sweep", trains))
        if dry_run:
            if is_new:
                discard(workdir)
            return {}
        base = jax.eval_shape(start.abstract.policy.init)
        evaluation = lower_evaluation(start.abstract, base, questions, **how)
        task = start.finish(chain(population.lower(start.abstract, population.initial_states()), evaluation))
    judge = partial(evaluate, task, prompts=questions, between=stop.check, **how)
    folder.claim()
    with closing(folder):
        first = partial(judge, v=task.policy.init(), seed=config.seed)
        untrained = partial(evaluate_untrained, folder.log, task, first)
        data = {name: make_pipeline(prompts, own.batch_size, own.seed, own.epochs) for name, own in configs.items()}
        states, dropped = train(population, task, data, steps, folder, stop, untrained)
        trained, before = time.perf_counter(), untrained()
        about = {"steps": steps, "eval_before": before}
        fingerprint = base_fingerprint(task.policy.params)
        rows = [{"member": name, "dropped": reason} for name, reason in dropped.items()]
        for name, member in population.members.items():
            if name not in dropped:
                rows.append(_finish(task, member, states[name].v, folder, fingerprint, about, judge))
    rows.sort(key=lambda row: -row.get("eval_after", {}).get("strict", -1.0))
    summary = {"model": task.name, **about, "members": rows}
    summary |= {"train_s": round(trained - started, 1), "wall_s": round(time.perf_counter() - started, 1)}
    folder.log.write_json("summary.json", summary)
    return summary


def _finish(
    task: Task,
    member: Member,
    v: Trained,
    folder: Folder,
    fingerprint: Mapping[str, Any],
    about: Mapping[str, Any],
    judge: Callable[..., tuple[dict[str, Any], list[Row]]],
) -> dict[str, Any]:
    """Saves a member and evaluates the saved vector, unless already done; returns its row of the summary."""
    log = folder.members[member.name]
    done = log.read_json("summary.json")
    if done is None:
        saved, policy = folder.member(member.name) / "adapter", task.policy_to_save()
        own = policy.within(member.spec)
        told = {**about, "config": summary_of_config(member.config)}
        stored = save_trained(saved, task.pretrained, own, v, fingerprint, member.config.save_dtype, **told)
        point = member.point(jax.tree.map(lambda x: np.asarray(x, np.float32), stored))
        after, answers = judge(v=point, seed=member.config.seed)
        log.write_rows("answers_after.jsonl", answers)
        done = {"model": task.name, "params": own.num_params, **about, "eval_after": after}
        log.write_json("summary.json", done)
    kept = {"params": done["params"], "eval_after": done["eval_after"]}
    return {"member": member.name, **kept, "dropped": None}


def members_table(summary: Mapping[str, Any], workdir: Path) -> str:
    """Formats the untrained model and the members, best first, each with its gain over the untrained model."""
    dropped = [row for row in summary["members"] if row["dropped"]]
    notes = [paragraph(f"dropped {row['member']}: {row['dropped']}") for row in dropped]
    notes.append(paragraph("gain: strict, in points over the untrained model, by a paired test of greedy answers"))
    return "\n".join([*table(member_rows(summary, workdir, _NAME)), *notes])


def ending(summary: Mapping[str, Any], workdir: Path, picture: Path | None) -> str:
    """The ending of the command: the members, a question that the best one fixed, and what comes next."""
    trained = [row for row in summary["members"] if not row["dropped"]]
    folder = workdir / "members" / trained[0]["member"] if trained else workdir
    found = read_change(workdir / "answers_before.jsonl", folder / "answers_after.jsonl")
    fixed = found.fixed if found else ()
    example = ["for example, the first member fixed this one:", *example_lines(fixed[0])] if fixed else None
    places = {**({"picture": picture} if picture else {}), "result": workdir / "summary.json"}
    places |= {"members": workdir / "members"}
    report = ["python", "-m", "experiments.report", f"--runs=RL:{workdir}", f"--output={workdir}/report.json"]
    commands = [("ask the untrained model and the first member", ask(folder / "adapter", fixed))] if trained else []
    commands += [("draw accuracy against numbers", report)]
    return block(members_table(summary, workdir), example, place_lines(places), next_lines(commands))


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    del argv
    use_compilation_cache()
    if not FLAGS.workdir:
        fail("--workdir is empty; name a folder for the sweep")
    workdir, text = workdir_of(FLAGS.workdir), None
    with stoppable(workdir, "sweep") as stop, mirrored(FLAGS.workdir, workdir, FLAGS.dry_run):
        find_devices()
        summary = run(FLAGS.config, FLAGS.vary, workdir, stop, FLAGS.member, FLAGS.dry_run)
        if summary:
            text = ending(summary, workdir, try_plot(workdir))
    if text is not None:
        emit(summary, text, FLAGS.json)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
