"""What a notebook can expect before it trains: estimates of XLA's TPU compiler, and results of measured runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ml_collections import ConfigDict

from experiments.common.wording import command_line, counted, percent, table
from experiments.notebooks.subprocesses import ROOT

RESULTS = ROOT / "experiments/results"
COMPILED = {
    "gsm8k_qwen2_5_7b_one_chip": "tpu_qwen2_5_7b_int8_v5e_1x1.json",
    "gsm8k_qwen2_5_7b": "tpu_qwen2_5_7b_v5e_2x4.json",
}
MEASURED = "gsm8k_1_5b_h100.json"
_QUESTIONS = 7473  # training questions of GSM8K
_STEP = "median seconds of a step"


def estimate(config: str) -> None:
    """Prints what XLA's TPU compiler estimates for a recipe: memory, speed and the longest time.

    Args:
      config: name of the recipe's config.
    """
    found = json.loads((RESULTS / COMPILED[config]).read_text(encoding="utf-8"))
    (result,) = found["results"]
    print(f"ESTIMATES of XLA's TPU compiler (jax {result['jax']}). No TPU was used.\n")
    form = result["dtype"] if result.get("quantize", "none") == "none" else result["quantize"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    print(f"{result['model']} in {form}")
    print(f"{counted(result['devices'], result['chip'] + ' chip')}, mesh: {mesh}")
    print(f"{result['prompts']} questions × {result['samples']} answers of at most {result['new_tokens']:,} tokens\n")
    programs = [row for row in result["programs"] if row["program"].startswith(("update", "rollout", "decode"))]
    rows = [["program", f"GB a chip (of {result['hbm_bytes'] / 1e9:.0f})"]]
    rows += [[row["program"], f"{row['bytes']['total'] / 1e9:.1f}"] for row in programs]
    print("\n".join(table(rows)), end="\n\n")
    print("\n".join(_times(result, _config(config).epochs)))
    print("\nThis command repeats the estimate, without a TPU:")
    print(command_line(shlex.split(found["command"])))


def _config(name: str) -> ConfigDict:
    """One of this project's configs, by its name."""
    return import_module(f"experiments.configs.{name}").get_config()


def _times(result: Mapping[str, Any], epochs: int) -> list[str]:
    """The estimated times of a step and of a whole recipe, with `result` from `experiments.compile`."""
    decode, step = result["decode"], result["longest_step"]
    steps = _QUESTIONS // result["prompts"] * epochs
    hours = steps * sum(step.values()) / 3600
    rows = [
        ["a token of all answers", f"{1e3 * decode['seconds']:.0f} ms", f"{decode['tokens_per_s']:,.0f} tokens/s"],
        ["rollout", f"{step['decode_s']:.0f} s", "at most"],
        ["update", f"{step['update_s']:.0f} s", "at most"],
        [f"{counted(epochs, 'epoch')}, {steps:,} steps", f"{hours:.1f} h", "at most"],
    ]
    return [
        *table(rows, left=(0, 2)),
        "The longest times are for answers that all have the greatest length. Loading,",
        "compiling and evaluating come on top.",
    ]


def measured(numbers: int, rate: float) -> None:
    """Prints results on GSM8K that were measured on one H100: those of TinyLoRA with this size and learning rate.

    Args:
      numbers: number of trained numbers.
      rate: learning rate.
    """
    found = json.loads((RESULTS / MEASURED).read_text(encoding="utf-8"))
    runs = [
        run
        for name, run in found["runs"].items()
        if (run["numbers"], run.get("rate")) == (numbers, rate) and not name.startswith("SFT")
    ]
    print(f"Measured before on one NVIDIA H100, GSM8K's test questions, strict:\n{found['model'].partition(',')[0]}")
    print(f"({found['model'].partition(', ')[2]})\n")
    rows = [["numbers", "rate", "steps", "seconds a step", "sampled", "greedy"]]
    rows += [
        [
            str(numbers),
            f"{rate:g}",
            str(run["steps"]),
            f"{sum(run[_STEP].values()):.1f}",
            *(_change(run, mode) for mode in ("sampled", "greedy")),
        ]
        for run in runs
    ]
    print("\n".join(table(rows)))
    print("\nOther cards take another time: the line of each step says how much is left.")


def _change(run: Mapping[str, Any], mode: str) -> str:
    after = run[mode]["strict"]
    return f"{percent(after - run['against untrained'][mode]['value'])} → {percent(after)}"
