"""Compares two evaluations of the same questions with a paired test.

    python -m experiments.compare /tmp/base.json /tmp/trained.json
    python -m experiments.compare /tmp/tinylora-demo
    python -m experiments.compare /tmp/seed0 /tmp/seed1

The arguments are files written by `experiments.evaluate --output` (name either of the two files; both are needed), or
workdirs of finished runs. A single workdir is compared with its untrained model. A workdir's `answers_before.jsonl` or
`answers_after.jsonl` may be named too.
Single answers are compared with McNemar's exact test, means of several with a permutation test over the questions.
Shows both accuracies, and the second minus the first. Results for different questions, prompts or graders are rejected.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from experiments.common import opening

    opening.define_json()
    opening.begin(__doc__)

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.common.changes import example_lines, interval, read_change
from experiments.common.cli import fail, reporting_errors
from experiments.common.closing import ask_both, block, emit, next_lines, place_lines
from experiments.common.eval_metrics import GRADES
from experiments.common.opening import parse_flags
from experiments.common.wording import WIDTH, counted, cut, p_digits, points, table_with_sections
from tinylora_jax.data import DataError, read_jsonl
from tinylora_jax.files import expand, is_number, read_json
from tinylora_jax.metrics import Difference, compare_paired

FLAGS = flags.FLAGS

_MAX_RESULT_BYTES = 2**24
_BEFORE, _AFTER = "answers_before.jsonl", "answers_after.jsonl"  # in the workdir of a run

Key = tuple[str, int]  # set and question


class CompareError(ValueError):
    """Two files cannot be compared; the message says why."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: its settings, and the grades of each question.

    Attributes:
      path: path of the result.
      how: settings that must be equal: `template` and, for each set, `reward`.
      decoding: settings that may differ and are reported: token limit, temperature and samples of each set.
      asked: question and gold answer, by set and id.
      grades: strict and lenient grades of the answers, by (set, mode), then by id.
      answers: path of the answers.
      adapter: folder of the adapter that answered; None for the base model.
    """

    path: Path
    how: dict[str, Any]
    decoding: dict[str, Any]
    asked: dict[Key, tuple[str, str]]
    grades: dict[tuple[str, str], dict[int, list[tuple[float, float]]]]
    answers: Path
    adapter: str | None = None


def read(path: Path) -> Evaluation:
    """Reads an evaluation.

    Args:
      path: path of the .json or .jsonl file, or a run's workdir, which stands for the answers after training.

    Raises:
      CompareError, DataError: a file is missing, damaged or not an evaluation.
    """
    if path.is_dir():
        return _of_run(path / _AFTER, path)
    if path.name in (_BEFORE, _AFTER) and not path.with_suffix(".json").exists():
        return _of_run(path, path.parent)
    path, answers = path.with_suffix(".json"), path.with_suffix(".jsonl")
    for each in (path, answers):
        if not each.is_file():
            raise CompareError(f"{each}: no such file; experiments.evaluate --output={path} writes both")
    with _naming(path):
        result = read_json(path, _MAX_RESULT_BYTES)
        sets = result.get("sets") or {result["data"]: result}
        how = {"template": result["template"], **{f"reward of {name}": each["reward"] for name, each in sets.items()}}
        decoding = {"max_new_tokens": result["max_new_tokens"]}
        for name, each in sets.items():
            decoding |= {
                f"{field} of {name}": each.get("sampled", {}).get(field) for field in ("temperature", "samples")
            }
        adapter = result.get("adapter")
    return _with_rows(Evaluation(path, how, decoding, {}, {}, answers, adapter))


def read_before(workdir: Path) -> Evaluation:
    """Reads the answers of a run's untrained model, which the members of a sweep share.

    Raises:
      CompareError, DataError: a file is missing or damaged.
    """
    shared = workdir.resolve().parents[1] if workdir.resolve().parent.name == "members" else workdir
    return _of_run((shared if (shared / _BEFORE).exists() else workdir) / _BEFORE, workdir)


def _of_run(answers: Path, workdir: Path) -> Evaluation:
    """The evaluation in a workdir, whose settings are those of its config."""
    config_file = workdir / "config.json"
    if not config_file.is_file():
        raise CompareError(f"{workdir} is not the workdir of a run: it has no config.json")
    if not answers.is_file():
        members = sorted((workdir / "members").glob("*"))
        hint = f"name a member, such as {members[0]}" if members else "the run is not finished"
        raise CompareError(f"{answers}: no such file; {hint}")
    with _naming(config_file):
        config = read_json(config_file, _MAX_RESULT_BYTES)
        name, samples = config["eval_data"]["source"], config["eval_samples"]
        how = {"template": config["template"], f"reward of {name}": config["reward"]}
        decoding = {"max_new_tokens": config["max_new_tokens"]}
        decoding |= {f"temperature of {name}": config["temperature"] if samples else None}
        decoding |= {f"samples of {name}": samples or None}
    adapter = str(workdir / "adapter") if answers.name == _AFTER else None
    return _with_rows(Evaluation(answers, how, decoding, {}, {}, answers, adapter), name)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the name of a file without the expected fields to errors."""
    try:
        yield
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise CompareError(f"{path} is not a result of experiments.evaluate ({what:.200}); evaluate again") from error


def _with_rows(evaluation: Evaluation, name: str | None = None) -> Evaluation:
    """Reads the answers of an evaluation; `name` is the set of answers that do not state theirs."""
    for number, row in enumerate(read_jsonl(evaluation.answers), start=1):
        _add(evaluation, f"{evaluation.answers}, row {number}", row if name is None else {"set": name, **row})
    return evaluation


def _add(evaluation: Evaluation, where: str, row: Mapping[str, Any]) -> None:
    try:
        key, mode, asked = (row["set"], row["id"]), row["mode"], (row["question"], row["answer"])
        grades = tuple(row[name] for name in GRADES)
    except KeyError as error:
        raise DataError(f"{where}: it has no {error}; evaluate again") from error
    if not (isinstance(key[1], int) and all(isinstance(text, str) for text in (key[0], mode, *asked))):
        raise DataError(f"{where}: id, set, mode, question or answer has the wrong type; evaluate again")
    if not all(map(is_number, grades)):
        raise DataError(f"{where}: expected finite grades, got {str(grades):.80}")
    if evaluation.asked.setdefault(key, asked) != asked:
        raise DataError(f"{where}: id {key[1]} is used for two questions")
    evaluation.grades.setdefault((key[0], mode), {}).setdefault(key[1], []).append(grades)


def compare(first: Evaluation, second: Evaluation) -> dict[str, dict[str, dict[str, Difference]]]:
    """Computes the second minus the first evaluation by set, mode (`greedy`, `sampled`) and grade.

    Raises:
      CompareError: the evaluations have different questions, prompts or graders.
    """
    for name in sorted(first.how.keys() | second.how.keys()):
        ours, theirs = first.how.get(name), second.how.get(name)
        if ours != theirs:
            differ = f"{name} is {ours!r} in {first.path} and {theirs!r} in {second.path}"
            raise CompareError(f"{differ}; evaluate both with the same prompt and grader, on the same sets")
    if first.asked != second.asked:
        odd = sorted(
            key for key in first.asked.keys() | second.asked.keys() if first.asked.get(key) != second.asked.get(key)
        )
        raise CompareError(
            f"{first.path} and {second.path} have different questions: {len(odd)} differ or are in only one of them"
            f" (the first: id {odd[0][1]} of {odd[0][0]}); evaluate both on the same questions"
        )
    found: dict[str, dict[str, dict[str, Difference]]] = {}
    for (name, mode), ours in first.grades.items():
        theirs = second.grades.get((name, mode))
        if theirs is not None and ours.keys() == theirs.keys():
            found.setdefault(name, {})[mode] = {
                grade: compare_paired(*([_mean(run[i], place) for i in sorted(ours)] for run in (ours, theirs)))
                for place, grade in enumerate(GRADES)
            }
    return found


def _mean(grades: Sequence[tuple[float, float]], place: int) -> float:
    return math.fsum(pair[place] for pair in grades) / len(grades)


def accuracy(evaluation: Evaluation, name: str, mode: str, grade: str) -> float:
    """The mean grade of an evaluation's questions."""
    grades = evaluation.grades[name, mode].values()
    return math.fsum(_mean(each, GRADES.index(grade)) for each in grades) / len(grades)


def with_accuracies(
    found: Mapping[str, Mapping[str, Mapping[str, Difference]]], first: Evaluation, second: Evaluation
) -> dict[str, Any]:
    """The differences as JSON-serializable values, with the accuracies of both evaluations."""
    both = lambda *where: {"first": accuracy(first, *where), "second": accuracy(second, *where)}
    return {
        name: {
            mode: {grade: {**both(name, mode, grade), **dataclasses.asdict(each)} for grade, each in grades.items()}
            for mode, grades in modes.items()
        }
        for name, modes in found.items()
    }


def differences_table(found: Mapping[str, Mapping[str, Mapping[str, Any]]], questions: Mapping[str, int]) -> str:
    """Formats differences in percentage points, in 80 columns.

    Args:
      found: result of `with_accuracies`.
      questions: number of questions of each set.
    """
    rows = [["", "", "first → second", "points", "[95 %]", "p", "better", "worse"]]
    sections: dict[int, str] = {}
    for name, modes in found.items():
        sections[len(rows)] = f"{cut(name, WIDTH - 20)}: {counted(questions[name], 'question')}"
        for mode, grades in modes.items():
            for grade, each in grades.items():
                ends = interval(each["low"], each["high"])
                change = f"{100 * each['first']:.1f} → {100 * each['second']:.1f} %"
                counts = [str(each["better"]), str(each["worse"])]
                rows.append([mode, grade, change, points(each["value"]), ends, p_digits(each["p"]), *counts])
    return "\n".join(table_with_sections(rows, sections, left=(0, 1)))


def ending(result: Mapping[str, Any], first: Evaluation, second: Evaluation) -> str:
    """The ending of the command: both accuracies with their difference, the tests, and a question that was fixed."""
    questions = Counter(name for name, _ in first.asked)
    tests = {each["test"] for modes in result["sets"].values() for grades in modes.values() for each in grades.values()}
    notes = [f"tests: {'; '.join(sorted(tests))}"]
    for name in sorted(first.decoding.keys() | second.decoding.keys()):
        ours, theirs = first.decoding.get(name), second.decoding.get(name)
        notes += [f"note: {name} is {ours} in the first and {theirs} in the second"] if ours != theirs else []
    found = read_change(first.answers, second.answers)
    example, fixed = [], found.fixed if found else ()
    if found and found.fixed:
        example = ["for example, this one is right only in the second:"]
        example += example_lines(found.fixed[0], "first", "second")
    places = {"first": first.path, "second": second.path}
    commands = []
    if second.adapter is not None and second.adapter != first.adapter:
        commands = ask_both(second.adapter, fixed, first.adapter or "base")
    table = differences_table(result["sets"], questions)
    return block(table, notes, example, place_lines(places), next_lines(commands))


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) not in (2, 3):
        fail("expected two results or workdirs, or one workdir: python -m experiments.compare first.json second.json")
    with reporting_errors():
        paths = [expand(name) for name in argv[1:]]
        if len(paths) == 1 and not paths[0].is_dir():
            raise CompareError(f"{paths[0]} is no workdir; name two results, or one workdir of a finished run")
        first = read(paths[0]) if len(paths) == 2 else read_before(paths[0])
        second = read(paths[-1])
        found = compare(first, second)
    sets = with_accuracies(found, first, second)
    result = {"first": str(first.path), "second": str(second.path), "sets": sets}
    emit(result, ending(result, first, second), FLAGS.is_parsed() and FLAGS.json)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: parse_flags(argv, arguments=2))
