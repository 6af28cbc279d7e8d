"""Accuracy of a model, with or without a trained adapter: greedy and sampled, strict and lenient.

    python -m experiments.evaluate --config=experiments/configs/demo.py --adapter=/tmp/tinylora-demo/adapter

The config says which model, questions, prompt, grader and lengths; without --adapter the base model is
evaluated. Prints one JSON object; with --output, also writes it there and every answer beside it as JSON lines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from experiments import hosts
from experiments.answering import Answers, answer, lower_answer, step_key
from experiments.cli import fail, parse_flags, reporting_errors, tell, use_compilation_cache
from experiments.compilation import compile_together
from experiments.meshes import use_mesh
from experiments.setup import Task, load_task, make_prompts, parse
from tinylora_jax.adapters.policy import Trained
from tinylora_jax.data import Prompt, load_questions, padded_width
from tinylora_jax.io.run_log import write_atomically
from tinylora_jax.io.saving import open_trained
from tinylora_jax.rollout import Sampling

Row = dict[str, Any]


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

    Args:
      task: the model.
      v: what was trained.
      prompts: the questions.
      batch_size: questions answered at once.
      samples: sampled completions per question; 0 is greedy only.
      seed: of the sampling noise.
      between: called between batches (to stop early, it raises).

    Returns:
      The accuracies, and one row per completion.
    """
    rows: list[Row] = []
    width, batch_size = padded_width(prompts), min(batch_size, len(prompts))
    for mode, sampling, count in _modes(task, samples):
        for start in tqdm(
            range(0, len(prompts), batch_size),
            desc=f"evaluating ({mode})",
            leave=False,
            unit="batch",
            disable=not hosts.is_first(),
        ):
            between()
            batch = list(prompts[start : start + batch_size])
            filler = [batch[0]] * (batch_size - len(batch))  # the last batch runs the same program
            answers = answer(task, v, batch + filler, step_key(seed, "eval", 0), sampling, count, width)
            rows += _rows(mode, batch, answers, count)
    result = {"questions": len(prompts), **_summary([row for row in rows if row["mode"] == "greedy"])}
    if samples:
        sampled = _summary([row for row in rows if row["mode"] == "sampled"])
        result["sampled"] = {"samples": samples, "temperature": task.sampling.temperature, **sampled}
    return result, rows


def _modes(task: Task, samples: int) -> list[tuple[str, Sampling, int]]:
    greedy = Sampling(task.sampling.max_new_tokens, temperature=0.0, stop_tokens=task.sampling.stop_tokens)
    return [("greedy", greedy, 1)] + ([("sampled", task.sampling, samples)] if samples else [])


def lower_evaluation(
    task: Task, v: Trained, prompts: Sequence[Prompt], *, batch_size: int, samples: int = 0
) -> Iterator[jax.stages.Lowered]:
    """The programs that `evaluate` runs with these arguments, to be compiled before they are needed."""
    for _, sampling, count in _modes(task, samples):
        yield lower_answer(task, v, min(batch_size, len(prompts)), padded_width(prompts), sampling, count)


def _rows(mode: str, prompts: Sequence[Prompt], answers: Answers, samples: int) -> list[Row]:
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


def _summary(rows: Sequence[Row]) -> dict[str, float]:
    mean = lambda values: round(sum(values) / len(rows), 6)
    return {
        "strict": mean(row["strict"] for row in rows),
        "lenient": mean(row["lenient"] for row in rows),
        "mean_tokens": mean(row["tokens"] for row in rows),
        "truncated": mean(not row["stopped"] for row in rows),
    }


def run(config: ConfigDict, adapter: Path | None) -> tuple[dict[str, Any], list[Row]]:
    """Evaluates the base model of a config, or an adapter trained on it.

    Raises:
      AdapterError, PeftError: the adapter is damaged or belongs to another base model.
    """
    specs = parse(config)
    questions = load_questions(specs.eval_data)
    trained = None if adapter is None else open_trained(adapter)
    task = load_task(config, specs, trained and trained.policy)
    v = task.policy.init() if trained is None else trained.v
    prompts = make_prompts(config, questions, task)
    how = {"batch_size": config.eval_batch_size, "samples": max(1, config.eval_samples)}
    tell("compiling")
    compile_together(lower_evaluation(task, v, prompts, **how))
    result, rows = evaluate(task, v, prompts, seed=config.seed, **how)
    return {"model": task.name, "adapter": str(adapter) if adapter else None, **result}, rows


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    adapter = None if FLAGS.adapter is None else Path(FLAGS.adapter)
    output = None if FLAGS.output is None else Path(FLAGS.output)
    if FLAGS.adapter == "":
        fail("--adapter is empty; leave it out to evaluate the base model")
    if output is not None and (output.suffix != ".json" or output.is_dir()):
        fail(f"--output={FLAGS.output}: expected a file name that ends in .json")
    with reporting_errors():
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
        hosts.connect(FLAGS)
        with use_mesh(parse(FLAGS.config).mesh):
            result, rows = run(FLAGS.config, adapter)
        if output is not None and hosts.is_first():
            write_atomically(output, json.dumps(result, indent=1) + "\n")
            write_atomically(output.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    if hosts.is_first():
        print(json.dumps(result))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    config_flags.DEFINE_config_file("config", None, "Which model, questions and grader.", lock_config=True)
    flags.DEFINE_string("adapter", None, "Folder of a trained adapter; absent: the base model.")
    flags.DEFINE_string("output", None, "Write the result to this .json, and every answer to the .jsonl beside it.")
    hosts.define_flags()
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
