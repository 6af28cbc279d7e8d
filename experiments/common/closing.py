"""The end of a command: what changed, where the results are and which commands come next."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common import progress
from experiments.common.changes import Example, change_lines, example_lines, read_change
from experiments.common.wording import (
    WIDTH,
    command_line,
    counted,
    cut,
    p_digits,
    paragraph,
    percent,
    points,
)
from tinylora_jax.io.peft import is_lora

_SHORT = 60  # longest question that is repeated in a command
EXAMPLE = "for example, this one was fixed:"  # heads the last part of an ending that is not about files or commands
ASK = "ask both models"  # heads the first of the commands that come next


def place_lines(places: Mapping[str, object]) -> list[str]:
    """Formats where the results are; a path that does not fit beside its name has its own line."""
    lines = []
    widest = max(map(len, places), default=0)
    for name, path in places.items():
        line = f"  {name.ljust(widest)}  {path}"
        lines += [line] if len(line) < WIDTH else [f"  {name}", f"  {path}"]
    return lines


def next_lines(commands: Sequence[tuple[str, Sequence[object]]]) -> list[str]:
    """Formats the commands that come next, each below what it does."""
    return [line for what, words in commands for line in (f"{what}:", command_line(words))]


def question_for(examples: Sequence[Example]) -> str | None:
    """The question of the first example that is short enough for a command line."""
    return next(
        (each.question for each in examples if len(each.question) <= _SHORT and "\n" not in each.question), None
    )


def stands_alone(adapter: object) -> bool:
    """Whether a folder is a LoRA adapter or a whole model, which `generate` and `export` do not take as an adapter."""
    folder = Path(str(adapter))
    return (folder / "config.json").is_file() or is_lora(folder)


def ask_both(adapter: object, examples: Sequence[Example], other: object = "base") -> list[tuple[str, list[object]]]:
    """`ask` as the first of the commands that come next; none if `generate` refuses an adapter."""
    alone = stands_alone(adapter) or stands_alone(other)
    return [] if alone else [(ASK, ask(adapter, examples, other))]


def ask(adapter: object, examples: Sequence[Example], other: object = "base") -> list[object]:
    """The command that prompts two models with a question that was fixed; by default the untrained and the trained."""
    asked = [f"--prompt={question}"] if (question := question_for(examples)) else []
    return ["python", "-m", "experiments.generate", f"--adapter={other}", f"--adapter={adapter}", *asked]


def page_command(workdir: Path) -> list[object]:
    """The command that writes the page of a run or a sweep."""
    return ["python", "-m", "experiments.report", f"--runs=RL:{workdir}", f"--html={workdir / 'page.html'}"]


def emit(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Ends a command: the text for people, and the result as JSON for programs.

    On a terminal only the text is printed, unless `--json` is set. Elsewhere the JSON is the last line of standard
    output, and the text goes to standard error.

    Args:
      result: result of the command.
      text: text for people.
      as_json: value of the flag `--json`.
    """
    progress.clear()
    text = progress.with_names(text)
    if as_json or not sys.stdout.isatty():
        progress.tell(text)
        print(json.dumps(result), flush=True)
    else:
        print("\n" + text, flush=True)


def block(*parts: Sequence[str] | str | None) -> str:
    """Joins the parts of an ending with empty lines between them; empty parts are left out."""
    texts = [part if isinstance(part, str) else "\n".join(part) for part in parts if part]
    return "\n\n".join(texts)


def run_block(summary: Mapping[str, Any], workdir: Path, config: Sequence[str], picture: Path | None) -> str:
    """The ending of a training command.

    Args:
      summary: summary of the run.
      workdir: folder of the run.
      config: arguments that choose the config on a command line.
      picture: path of the run's plot, if it was drawn.
    """
    adapter, found = workdir / "adapter", read_change(workdir / "answers_before.jsonl", workdir / "answers_after.jsonl")
    minutes = f", {summary['wall_s'] / 60:.1f} minutes" if "wall_s" in summary else ""
    head = f"{summary['model']}: {counted(summary['params'], 'trained number')}, {counted(summary['steps'], 'step')}"
    changed = change_lines(found) if found else None
    fixed = found.fixed if found else ()
    example = [EXAMPLE, *example_lines(fixed[0])] if fixed else None
    places = {"adapter": adapter, **({"picture": picture} if picture else {})}
    places |= {"answers": workdir / "answers_after.jsonl", "result": workdir / "summary.json"}
    evaluate = ["python", "-m", "experiments.evaluate", *config, f"--adapter={adapter}", "--showcase=3"]
    export = ["python", "-m", "experiments.export", f"--adapter={adapter}", "--to=merged", f"--output={workdir}/merged"]
    commands = [
        *ask_both(adapter, fixed),
        ("see what was fixed", evaluate) if fixed else ("see the run as a page", page_command(workdir)),
        *([] if stands_alone(adapter) else [("use it elsewhere", export)]),
    ]
    return block(paragraph(head + minutes), changed, example, place_lines(places), next_lines(commands))


def member_rows(summary: Mapping[str, Any], workdir: Path, widest: int = 10**6) -> list[list[str]]:
    """The table of a sweep's members, with a head: accuracies, and the gain over the untrained model.

    Args:
      summary: summary of the sweep.
      workdir: folder of the sweep.
      widest: longest name of a member; longer ones are cut.
    """
    score = lambda result: [percent(result["strict"]), percent(result["lenient"])]
    rows = [["", "numbers", "strict", "lenient", "gain", "p"]]
    rows.append(["untrained", "0", *score(summary["eval_before"]), "", ""])
    for row in summary["members"]:
        name = cut(row["member"], widest)
        if row["dropped"]:
            rows.append([name, "", "dropped", "", "", ""])
            continue
        answers = workdir / "members" / row["member"] / "answers_after.jsonl"
        found = read_change(workdir / "answers_before.jsonl", answers)
        gain = found.differences["strict"] if found else None
        moved = [points(gain.value), p_digits(gain.p)] if gain else ["", ""]
        rows.append([name, f"{row['params']:,}", *score(row["eval_after"]), *moved])
    return rows
