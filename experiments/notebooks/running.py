"""Runs the commands of a notebook, and shows what they print and draw."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from experiments.common import changes, closing
from experiments.common.wording import command_line
from experiments.notebooks.plans import Plan
from experiments.notebooks.subprocesses import ROOT, Command, CommandError
from experiments.plot import PlotError, plot
from tinylora_jax.io.adapter import read_adapter

_LOOK_S = 0.5  # seconds between two checks of a run's log


def command(name: str, *flags: str) -> str:
    """Runs `python -m experiments.<name>` and prints its output, without a result in JSON.

    Returns:
      The last line of the output.

    Raises:
      CommandError: the command failed or was interrupted; the message says why.
    """
    with _start(name, *flags) as child:
        for line in child.lines():
            if not line.startswith("{"):
                print(line)
    child.check()
    if child.stopped:
        raise CommandError("stopped early; run this cell again")
    return child.last[-1] if child.last else ""


def train(
    plan: Plan, workdir: Path, steps_now: int | None = None, hours_now: float | None = None
) -> dict[str, Any] | None:
    """Trains, or continues the run in the workdir, below a plot that follows the run.

    Args:
      plan: training setup.
      workdir: folder of the run.
      steps_now: number of further steps before stopping; the next call continues the run.
      hours_now: time in hours before stopping; the next call continues the run.

    Returns:
      The summary; None if the run was stopped early.

    Raises:
      CommandError: training failed; the message says why.
    """
    from IPython.display import Image, Markdown, display

    workdir = Path(workdir).resolve()
    shown = display(Markdown("*The picture comes with the first step.*"), display_id=True)
    log = workdir / "metrics.jsonl"
    before = seen = _lines(log)
    deadline = None if hours_now is None else time.monotonic() + 3600 * hours_now
    ended = False  # `fixed` shows examples, and the commands that come next are for a terminal
    with _start("grpo", f"--config={plan.config}", f"--workdir={workdir}", *plan.flags) as child:
        for line in child.lines(_LOOK_S):
            ended = ended or line in (closing.EXAMPLE, f"{closing.ASK}:")
            if line is not None and not ended and not line.startswith("{"):
                print(line)
            if _lines(log) != seen:
                seen = _lines(log)
                try:
                    shown.update(Image(plot(workdir)))
                except (PlotError, OSError):  # the line may be incomplete; the next check sees it
                    pass
            late = deadline is not None and time.monotonic() > deadline
            if late or (steps_now is not None and seen - before >= steps_now):
                child.stop()
                steps_now = deadline = None
    child.check()
    if not (workdir / "summary.json").exists():
        print("Not finished yet: run this cell again, and it continues with the next step.")
        return None
    shown.update(Image(plot(workdir)))
    return json.loads((workdir / "summary.json").read_bytes())


def fixed(workdir: Path, most: int = 3) -> None:
    """Prints how training changed the answers to the evaluation questions, with some that it fixed.

    Args:
      workdir: folder of a finished run.
      most: largest number of questions to print.
    """
    found = _change(workdir)
    if found is None:
        raise CommandError(f"{workdir} has no answers before and after training; run the cell that trains to its end")
    print("\n".join(changes.showcase_lines(changes.as_json(found, most))))
    if not found.fixed:
        print("\nNo question was fixed.")


def ask(plan: Plan, workdir: Path) -> None:
    """Asks the untrained and the trained model a question that training fixed, with `experiments.generate`.

    Args:
      plan: training setup, which names the base model.
      workdir: folder of a finished run.

    Raises:
      CommandError: the command failed; the message says why.
    """
    found = _change(workdir)
    adapter = Path(workdir, "adapter").resolve()
    examples = (found.fixed or found.broken) if found else ()
    if not examples:
        print("No answer changed, so there is no question to ask.")
        return
    question = closing.question_for(examples) or examples[0].question
    longest = read_adapter(adapter)[2]["about"]["config"]["max_new_tokens"]
    flags = (f"--model={plan.model}", "--adapter=base", f"--adapter={adapter}", f"--max_new_tokens={longest}")
    command("generate", *flags, f"--prompt={question}")


def _change(workdir: Path) -> changes.Change | None:
    """What a run changed; None if it is not finished."""
    return changes.read_change(workdir / "answers_before.jsonl", workdir / "answers_after.jsonl")


def _start(name: str, *flags: str) -> Command:
    flags = tuple(flag.replace(f"{ROOT}{os.sep}", "") for flag in flags)  # the command's working folder
    print(f"$ {command_line(['python', '-m', f'experiments.{name}', *flags], '').lstrip()}")
    return Command(name, flags)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
