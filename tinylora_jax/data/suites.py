"""Evaluation sets by name: their hub ids, file names and graders."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from tinylora_jax.data.questions import FILE_SUFFIXES, DataSpec
from tinylora_jax.data.sources import DataError


@dataclass(frozen=True)
class EvalSet:
    """One evaluation set of a suite.

    Attributes:
      name: name of the set in results.
      data: description of the questions.
      reward: name of the reward that grades the set.
      samples: number of sampled answers per question; None uses the config's number.
      files: possible file names of the set in a folder, without suffix.
    """

    name: str
    data: DataSpec
    reward: str = "math"
    samples: int | None = None
    files: tuple[str, ...] = ()


EVAL_SETS: Mapping[str, EvalSet] = MappingProxyType(
    {
        each.name: each
        for each in (
            EvalSet("gsm8k", DataSpec("openai/gsm8k:main", "test"), files=("gsm8k_test",)),
            EvalSet("math500", DataSpec("HuggingFaceH4/MATH-500", "test", "problem")),
            EvalSet("aime24", DataSpec("HuggingFaceH4/aime_2024", "train", "problem")),
            EvalSet("amc23", DataSpec("math-ai/amc23", "test")),
            # Measured quantities with two or three digits; the set itself states no tolerance.
            EvalSet("minerva", DataSpec("math-ai/minervamath", "test"), reward="minerva", files=("minerva_math",)),
            EvalSet(
                "olympiadbench",
                DataSpec("math-ai/olympiadbench", "test", answer_column="final_answer", tolerance_column="error"),
            ),
        )
    }
)
_ENTRY = re.compile(r"(?P<source>.+?)(?:@(?P<samples>[1-9][0-9]{0,3}))?")


def parse_suite(text: str, folder: Path | None = None) -> tuple[EvalSet, ...]:
    """Parses a list of evaluation sets.

    Args:
      text: comma-separated names from `EVAL_SETS`, files and hub ids; `aime24@16` requests 16 sampled answers.
      folder: folder with the named sets as files `<name>.jsonl`, `.jsonl.gz` or `.parquet` with columns `question` and
        `answer`; None to load them from the hub.

    Returns:
      The sets, in order.

    Raises:
      DataError: a name is unknown or repeated, or the folder lacks a set; the message names them all.

    >>> [(each.name, each.samples) for each in parse_suite("gsm8k,aime24@16,my/questions.jsonl")]
    [('gsm8k', None), ('aime24', 16), ('my/questions.jsonl', None)]
    """
    sets, problems = [], []
    for entry in filter(None, map(str.strip, text.split(","))):
        match = _ENTRY.fullmatch(entry)
        assert match is not None
        try:
            each = _find(match["source"], folder)
            sets.append(dataclasses.replace(each, samples=int(match["samples"]) if match["samples"] else None))
        except DataError as error:
            problems.append(str(error))
    names = [each.name for each in sets]
    problems += [f"{name} is listed more than once" for name in sorted({n for n in names if names.count(n) > 1})]
    if not sets and not problems:
        problems = [f"it is empty; expected names out of {', '.join(EVAL_SETS)}, files or hub ids"]
    if problems:
        raise DataError(f"the suite {text!r} has problems: {'; '.join(problems)}")
    return tuple(sets)


def _find(source: str, folder: Path | None) -> EvalSet:
    if source not in EVAL_SETS:
        if "/" in source or source.endswith(FILE_SUFFIXES):
            return EvalSet(source, DataSpec(source, "test"))
        if "@" in source:
            raise DataError(f"{source!r}: expected a number of samples from 1 to 9999 after the @")
        near = difflib.get_close_matches(source, EVAL_SETS, n=1) or list(EVAL_SETS)
        raise DataError(f"unknown set {source!r}; did you mean {', '.join(near)}, a file or a hub id?")
    found = EVAL_SETS[source]
    if folder is None:
        return found
    names = [stem + suffix for stem in (source, *found.files) for suffix in FILE_SUFFIXES]
    for name in names:
        if (folder / name).is_file():
            data = DataSpec(str(folder / name), "test", tolerance_column=found.data.tolerance_column)
            return dataclasses.replace(found, data=data)
    raise DataError(f"{folder} has none of {', '.join(names)}")
