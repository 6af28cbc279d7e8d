"""The machine of a notebook: its devices, the hub, and a folder for runs in Colab or on Kaggle."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax

from experiments.notebooks.subprocesses import ROOT, CommandError, why

KAGGLE = Path("/kaggle")
_RUNS = "tinylora"  # folder of all runs, in Drive or among a Kaggle notebook's outputs
_DEVICES = """
import json, jax
found = jax.devices()
print(json.dumps([found[0].platform, found[0].device_kind, len(found)]))
"""


def on_kaggle() -> bool:
    """Whether this is a Kaggle notebook. Its image contains Colab's package, so this is asked first."""
    return (KAGGLE / "working").is_dir()


def how_to_change() -> str:
    """Where a user chooses another accelerator, as part of a sentence."""
    if on_kaggle():
        return "under Settings → Accelerator"
    return "under Runtime → Change runtime type"


def begin(simulated: int = 1) -> str:
    """Keeps the kernel off the accelerator, and describes the machine.

    Args:
      simulated: number of devices as which the commands see the CPU, if there is no accelerator.

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
    if platform != "cpu":
        print(f"{count} × {kind}")
        return platform
    os.environ["JAX_PLATFORMS"] = "cpu"  # the commands need not search for other devices again
    print(f"No accelerator here: everything runs on the {os.cpu_count()} cores of this CPU, slowly.")
    print(f"For a TPU or a GPU, choose one {how_to_change()}.")
    if simulated > 1:
        os.environ["JAX_NUM_CPU_DEVICES"] = str(simulated)
        print(f"The CPU stands for {simulated} devices.")
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


def keep_folder(name: str) -> Path:
    """Chooses the folder of a run, where possible one that outlives the session.

    In Colab it lies in Google Drive. On Kaggle it lies in `/kaggle/working`, which becomes the output of the notebook's
    version; a run among the notebook's inputs is copied there first.

    Raises:
      CommandError: Drive was not connected.
    """
    if on_kaggle():
        return _kaggle_folder(name)
    try:
        from google.colab import drive
    except ImportError:
        print(f"Not in Colab, so there is no Drive: the run stays here, in runs/{name}.")
        return Path("runs", name).resolve()
    try:
        drive.mount("/content/drive")
    except (ValueError, OSError, RuntimeError) as error:
        raise CommandError(
            f"Drive was not connected ({error}). Run this cell again and allow access, or set workdir to a folder"
            " on this machine, which is lost at the end of the session"
        ) from error
    folder = Path("/content/drive/MyDrive", _RUNS, name)
    print(f"The run is kept in {folder}.\nAfter a disconnect, run all cells again: it continues from there.")
    return folder


def _kaggle_folder(name: str) -> Path:
    """The run's folder on Kaggle, with the newest state of this run among the inputs if it is not there yet."""
    folder = KAGGLE / "working" / _RUNS / name
    if folder.exists():
        print(f"The run continues in {folder}.")
        return folder
    logs = list((KAGGLE / "input").rglob(f"{_RUNS}/{name}/metrics.jsonl"))
    if logs:
        newest = max(logs, key=lambda log: log.read_bytes().count(b"\n")).parent
        shutil.copytree(newest, folder)
        print(f"The run is copied from {newest}\nand continues in {folder}.")
    else:
        print(f"The run is kept in {folder}, among the outputs of this version.")
    return folder
