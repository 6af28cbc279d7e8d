"""The answers of the untrained model: a run computes them, and `experiments.evaluate` reuses them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from ml_collections import ConfigDict

from experiments.common.eval_metrics import GRADES, Row
from experiments.common.progress import tell
from experiments.common.specs import as_json
from experiments.common.task import Task
from tinylora_jax import __version__
from tinylora_jax.data import DataError, Prompt, read_jsonl
from tinylora_jax.files import is_number, read_json
from tinylora_jax.io.adapter import base_fingerprint
from tinylora_jax.rewards import BUILT_IN

_RESULT, _ANSWERS = "eval_before.json", "answers_before.jsonl"
_MADE_BY = "made_by"  # field of the result: all that the answers depend on, beside the config and the questions
_MOST_BYTES = 2**26
_PLACEMENT = ("experiment", "evaluate_every")  # fields that change no answer


class Files(Protocol):
    """The results in the folder of a run or a sweep."""

    def read_json(self, name: str, /) -> dict[str, Any] | None: ...

    def write_json(self, name: str, value: Mapping[str, Any], /) -> None: ...

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]], /) -> None: ...


def evaluate_untrained(
    files: Files, task: Task, judge: Callable[[], tuple[dict[str, Any], list[Row]]]
) -> dict[str, Any]:
    """The accuracies of the untrained model: those in the folder, or the result of `judge`, which is kept there.

    Args:
      files: results of the run; all processes must call this together.
      task: loaded task.
      judge: function that evaluates the untrained model.
    """
    found = files.read_json(_RESULT)
    if found is None:
        tell("evaluating the untrained model")
        found, answers = judge()
        files.write_rows(_ANSWERS, answers)
        files.write_json(_RESULT, {**found, _MADE_BY: _made_by(task)})
    return {name: value for name, value in found.items() if name != _MADE_BY}


def _made_by(task: Task) -> dict[str, Any]:
    """The weights, devices and programs that answer; equal ones give the same greedy answers."""
    weights = json.dumps(base_fingerprint(task.policy.params), sort_keys=True)
    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    programs = {"tinylora_jax": __version__, "jax": jax.__version__}
    return {"weights": hashlib.sha256(weights.encode()).hexdigest()[:16], "devices": devices, **programs}


def known_answers(adapter: Path, config: ConfigDict, task: Task, prompts: Sequence[Prompt]) -> list[Row] | None:
    """The greedy answers of the untrained model in the workdir of an adapter, if computing them again gives the same.

    They must come from the same config, questions, weights, devices and versions, and from a built-in reward, because
    the code of another one may have changed. None if anything differs, is missing or is damaged.

    Args:
      adapter: folder of the adapter, in its workdir.
      config: configuration of the evaluation.
      task: loaded task.
      prompts: encoded questions.
    """
    workdir = adapter.resolve().parent
    if config.reward not in BUILT_IN:
        return None
    try:
        there, result = (read_json(workdir / name, _MOST_BYTES) for name in ("config.json", _RESULT))
        rows = [row for row in read_jsonl(workdir / _ANSWERS) if row["mode"] == "greedy"]
        asked = [(row["id"], row["question"], row["answer"]) for row in rows]
        sound = all(isinstance(row["completion"], str) and all(is_number(row[name]) for name in GRADES) for row in rows)
        same = _settings(there) == _settings(json.loads(json.dumps(as_json(config, ""))))
        same = same and asked == [(prompt.id, prompt.question, prompt.answer) for prompt in prompts]
        if not (same and sound and result[_MADE_BY] == _made_by(task)):
            return None
    except (OSError, ValueError, DataError, AttributeError, KeyError, TypeError):
        return None  # whatever is wrong with these files, the answers can be computed
    tell(f"the base model's answers are those of its run in {workdir}")
    return rows


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _PLACEMENT}
