r"""Evaluates a model, with or without a trained adapter: greedy and sampled, strict and lenient.

    python -m experiments.evaluate --config=demo --adapter=/tmp/tinylora-demo/adapter --showcase=3
    python -m experiments.evaluate --config=demo --output=/tmp/base.json
    python -m experiments.evaluate --config=math_qwen2_5_7b --suite=gsm8k,math500,aime24@16

The config defines the model, questions, prompt, grader and lengths. Without --adapter the base model is evaluated.
--showcase=3 evaluates both and shows three questions that the adapter fixed, with both answers. The base model's
answers are taken from the adapter's workdir if they were computed there in the same way.

--suite replaces the config's questions and grader with sets by name (`tinylora_jax/data/suites.py`), files or hub ids;
`@16` requests 16 sampled answers, and `--config.eval_data.limit` limits the questions of each set. --output writes the
result, and all answers as JSON lines next to it; `experiments.compare` compares two such results.

--correct writes the sampled answers that the strict grader accepts. As `train_data.source` of `experiments.sft` with
`solution_column=solution` they are training data (rejection sampling).
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from absl import flags

    from experiments.common import opening

    opening.define_config("Config with model, questions and grader: a name such as demo, or a file.")
    opening.define_path("adapter", "Folder, URL or hub:owner/name of an adapter. Default: the base model.", url=True)
    opening.define_path("output", "Write the result to this .json file, and all answers to a .jsonl file next to it.")
    opening.define_path("correct", "Write correct sampled answers to this .jsonl file, for experiments.sft.")
    flags.DEFINE_string("suite", None, "Evaluate on these sets: comma-separated names, files or hub ids.")
    opening.define_path("suite_folder", "Folder with the files of the named sets. Default: load them from the hub.")
    _about = "Evaluate the base model too, and show this many questions that the adapter fixed."
    flags.DEFINE_integer("showcase", 0, _about, lower_bound=0)
    flags.DEFINE_bool("transfer", False, "Evaluate an adapter of a quantized base on the same base in 16 bit.")
    opening.define_json()
    opening.define_multihost()
    opening.begin(__doc__, (*opening.EVALUATION_FIELDS, *opening.SAMPLING_FIELDS))

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict

from experiments.common import multihost
from experiments.common.abstract import base_policy
from experiments.common.answering import answer, lower_answer
from experiments.common.changes import Example, as_json, change, showcase_lines
from experiments.common.cli import fail, reporting_errors, use_compilation_cache
from experiments.common.closing import ask_both, block, emit, next_lines, place_lines
from experiments.common.compilation import compile_together
from experiments.common.eval_metrics import Row, accuracy_table, sampled_summary, summary
from experiments.common.meshes import use_fitting_mesh
from experiments.common.opening import config_arguments, parse_flags
from experiments.common.places import adapter_of
from experiments.common.progress import phase, tell, with_names
from experiments.common.specs import ConfigError, check_template, parse
from experiments.common.task import Task, load_graded_questions, load_task, make_prompts
from experiments.common.untrained import known_answers
from experiments.common.wording import counted
from tinylora_jax import rl
from tinylora_jax.adapters import Trained, scheme_of
from tinylora_jax.data import EvalSet, Prompt, get_template, padded_width, parse_suite
from tinylora_jax.files import write_atomically, write_rows
from tinylora_jax.io import open_trained
from tinylora_jax.multihost import is_first
from tinylora_jax.rewards import accuracy_name, accuracy_of, load_reward
from tinylora_jax.rollout import Sampling

FLAGS = flags.FLAGS


def evaluate(
    task: Task,
    v: Trained,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    samples: int = 0,
    seed: int = 0,
    between: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], list[Row]]:
    """Answers every question greedily, and `samples` times at the task's temperature.

    Of several rewards only the first one grades the answers: it measures accuracy.

    Args:
      task: model with its reward and sampling settings.
      v: trained parameters.
      prompts: encoded questions.
      batch_size: number of questions answered at once.
      samples: number of sampled completions per question; 0 for greedy only.
      seed: seed of the sampling noise.
      between: function called between batches; it may raise an exception to stop early.

    Returns:
      The accuracies, and one row per completion.
    """
    rows: list[Row] = []
    task = dataclasses.replace(task, reward=accuracy_of(task.reward))
    width, batch_size = padded_width(prompts), min(batch_size, len(prompts))
    for mode, sampling, count in _modes(task, samples):
        with phase(f"answering questions ({mode})") as work:
            for start in range(0, len(prompts), batch_size):
                work.count(start, len(prompts))
                between()
                batch = list(prompts[start : start + batch_size])
                filler = [batch[0]] * (batch_size - len(batch))  # the last batch runs the same program
                answers = answer(task, v, batch + filler, rl.step_key(seed, "eval", 0), sampling, count, width)
                rows += _rows(mode, batch, answers, count)
            work.end(f"answered {counted(len(prompts), 'question')} ({mode}) in {work.seconds:.1f} s")
    result = {"questions": len(prompts), **summary([row for row in rows if row["mode"] == "greedy"])}
    if samples:
        sampled = sampled_summary([row for row in rows if row["mode"] == "sampled"], samples)
        result["sampled"] = {"samples": samples, "temperature": task.sampling.temperature, **sampled}
    return result, rows


def _modes(task: Task, samples: int) -> list[tuple[str, Sampling, int]]:
    greedy = dataclasses.replace(task.sampling, temperature=0.0, top_k=0, top_p=1.0)
    return [("greedy", greedy, 1)] + ([("sampled", task.sampling, samples)] if samples else [])


def lower_evaluation(
    task: Task, v: Trained, prompts: Sequence[Prompt], *, batch_size: int, samples: int = 0
) -> Iterator[jax.stages.Lowered]:
    """Lowers the programs that `evaluate` runs with these arguments, to compile them in advance."""
    for _, sampling, count in _modes(task, samples):
        yield lower_answer(task, v, min(batch_size, len(prompts)), padded_width(prompts), sampling, count)


def _rows(mode: str, prompts: Sequence[Prompt], answers: rl.GradedRollout, samples: int) -> list[Row]:
    return [
        {
            "mode": mode,
            "id": prompt.id,
            "sample": sample,
            "question": prompt.question,
            "answer": prompt.answer,
            "completion": answers.texts[index],
            "found": answers.grades[index].answer,
            "strict": answers.grades[index].strict,
            "lenient": answers.grades[index].lenient,
            "tokens": int(answers.completions.lengths[index]),
            "stopped": bool(answers.completions.stopped[index]),
        }
        for place, prompt in enumerate(prompts)
        for sample in range(samples)
        for index in (place * samples + sample,)
    ]


def correct_answers(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Collects sampled answers that the strict grader accepts, as worked solutions for `experiments.sft`.

    Args:
      rows: rows from `evaluate`.

    Returns:
      One object per answer, with the question, gold answer and text. Duplicate texts for one question are dropped, and
      so are answers that were cut off before a stop token.
    """
    good = [row for row in rows if row["mode"] == "sampled" and row["strict"] == 1 and row["stopped"]]
    found = {(row.get("set"), row["id"], row["completion"]): row for row in good}
    return [
        {"question": row["question"], "answer": row["answer"], "solution": row["completion"]} for row in found.values()
    ]


def _limited(config: ConfigDict, suite: Sequence[EvalSet]) -> tuple[EvalSet, ...]:
    """Limits the questions of each set to the config's limit."""
    if suite and "\\boxed" not in get_template(config.template).user:
        raise ConfigError(
            f"config.template={config.template!r} does not request an answer in \\boxed{{}}, by which a suite is"
            " graded; add --config.template=boxed"
        )
    limit = config.eval_data.limit
    return tuple(dataclasses.replace(each, data=dataclasses.replace(each.data, limit=limit)) for each in suite)


def run(
    config: ConfigDict,
    adapter: Path | None,
    suite: Sequence[EvalSet] = (),
    showcase: int = 0,
    transfer: bool = False,
) -> tuple[dict[str, Any], list[Row]]:
    """Evaluates the base model of a config, or an adapter trained on it.

    Args:
      config: run configuration.
      adapter: folder of the adapter; None for the base model.
      suite: sets that replace the config's questions and grader.
      showcase: number of questions to show that the adapter fixed; 0 does not evaluate the base model too.
      transfer: whether an adapter that was trained on a quantized base may be evaluated on the same base in 16 bit.

    Returns:
      The accuracies (for a suite under `sets`, by name; with `showcase`, the change from the base model under that
      name), and one row per completion.

    Raises:
      AdapterError, PeftError: the adapter is damaged or belongs to another base model.
      ConfigError: the config's prompt does not request the format that the suite's graders need.
    """
    specs = parse(config)
    sets = _limited(config, suite) or (EvalSet(specs.eval_data.source, specs.eval_data, accuracy_name(config.reward)),)
    for each in sets:
        check_template(config.template, each.reward)
    rewards = [load_reward(each.reward) for each in sets]
    questions = [load_graded_questions(each.data, each.reward) for each in sets]
    hows = [
        {"batch_size": config.eval_batch_size, "samples": each.samples or max(1, config.eval_samples)} for each in sets
    ]
    given, config = config, config.copy_and_resolve_references()
    config.eval_samples = max(how["samples"] for how in hows)  # the largest batch must fit in memory
    trained = None if adapter is None else open_trained(adapter, transfer)
    task = load_task(config, specs, partial(base_policy, spec=specs.adapter) if trained is None else trained.policy)
    v = task.policy.init() if trained is None else trained.v
    prompts = [make_prompts(config, each, task) for each in questions]
    with phase("compiling") as work:
        lowered = (lower_evaluation(task, v, p, **how) for p, how in zip(prompts, hows, strict=True))
        compile_together(chain(*lowered), report=work.count)
        work.end(f"compiled in {work.seconds:.1f} s")
    results, rows, untrained = {}, [], []
    for each, reward, asked, how in zip(sets, rewards, prompts, hows, strict=True):
        tell(f"evaluating {each.name}: {len(asked)} questions")
        judge = partial(evaluate, dataclasses.replace(task, reward=reward), prompts=asked, seed=config.seed)
        result, answered = judge(v=v, **how)
        results[each.name] = {"data": each.data.source, "reward": each.reward, **result}
        rows += [{"set": each.name, **row} for row in answered]
        if showcase:
            base = None if suite or adapter is None else known_answers(adapter, given, task, asked)
            if base is None:
                tell("evaluating the base model on the same questions")
                base = judge(v=task.policy.init(), batch_size=how["batch_size"])[1]
            untrained += [{"set": each.name, **row} for row in base]
    about = {"model": task.name, "quantize": scheme_of(task.policy), "quantize_cache": config.quantize_cache}
    about |= {"adapter": with_names(adapter) if adapter else None, "template": config.template}
    about |= {"max_new_tokens": config.max_new_tokens, "seed": config.seed}
    about |= {"showcase": as_json(change(untrained, rows), showcase)} if showcase else {}
    return {**about, **({"sets": results} if suite else results[sets[0].name])}, rows


def _file(flag: str, suffix: str) -> Path | None:
    """Returns the file named by a flag, if any."""
    given = getattr(FLAGS, flag)
    path = None if given is None else Path(given)
    if path is not None and (path.suffix != suffix or path.is_dir()):
        fail(f"--{flag}={given}: expected a file name that ends in {suffix}")
    return path


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    if FLAGS.adapter == "":
        fail("--adapter is empty; omit it to evaluate the base model")
    if FLAGS.adapter is None and FLAGS.showcase:
        fail("--showcase shows what an adapter fixed; add --adapter")
    adapter = None if FLAGS.adapter is None else adapter_of(FLAGS.adapter)
    output, correct = _file("output", ".json"), _file("correct", ".jsonl")
    with reporting_errors():
        for file in filter(None, (output, correct)):
            file.parent.mkdir(parents=True, exist_ok=True)
        multihost.connect(FLAGS)
        if FLAGS.suite_folder is not None and FLAGS.suite is None:
            fail("--suite_folder needs --suite; name the sets, such as --suite=gsm8k,math500")
        folder = None if FLAGS.suite_folder is None else Path(FLAGS.suite_folder)
        suite = () if FLAGS.suite is None else parse_suite(FLAGS.suite, folder)
        with use_fitting_mesh(FLAGS.config, parse(FLAGS.config).mesh):
            result, rows = run(FLAGS.config, adapter, suite, FLAGS.showcase, FLAGS.transfer)
        if output is not None and is_first():
            write_atomically(output, json.dumps(result, indent=1) + "\n")
            write_rows(output.with_suffix(".jsonl"), rows)
        if correct is not None and is_first():
            solutions = correct_answers(rows)
            write_rows(correct, solutions)
            tell(f"{len(solutions)} different correct answers are in {correct}")
    if is_first():
        emit(result, ending(result, adapter, output, FLAGS.transfer), FLAGS.json)


def ending(result: dict[str, Any], adapter: Path | None, output: Path | None, transfer: bool = False) -> str:
    """The ending of the command: the accuracies, questions that the adapter fixed, and what comes next.

    Args:
      result: first result of `run`.
      adapter: folder of the adapter; None for the base model.
      output: file of the result, if any.
      transfer: whether the adapter answered on the 16-bit base; the next commands then ask for that base too.
    """
    lines = accuracy_table(result.get("sets") or {result["data"]: result})
    command = ["python", "-m", "experiments.evaluate", *config_arguments(), *(["--transfer"] if transfer else [])]
    places = {} if output is None else {"result": output, "answers": output.with_suffix(".jsonl")}
    commands: list[tuple[str, Sequence[object]]] = []
    if adapter is None:
        commands.append(("train an adapter", ["python", "-m", "experiments.grpo", *command[3:], "--workdir=/tmp/run"]))
    elif "showcase" not in result:
        commands.append(("see what the adapter fixed", [*command, f"--adapter={adapter}", "--showcase=3"]))
    else:
        asked = ask_both(adapter, [Example(**each) for each in result["showcase"]["fixed"]])
        commands += [(text, [*words, "--quantize=none"] if transfer else words) for text, words in asked]
    if output is not None:
        other = output.with_name("other.json")
        commands.append(("compare with another result", ["python", "-m", "experiments.compare", other, output]))
    return block(lines, showcase_lines(result.get("showcase")), place_lines(places), next_lines(commands))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
