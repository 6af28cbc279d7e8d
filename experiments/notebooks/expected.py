"""What a notebook can expect: estimates of XLA's TPU compiler, and results of measured runs."""

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
    "gsm8k_qwen2_5_7b_one_chip": "tpu_qwen2_5_7b_int8_cache_v5e_1x1.json",
    "gsm8k_qwen2_5_7b": "tpu_qwen2_5_7b_v5e_2x4.json",
}
MEASURED, TIMED = "gsm8k_1_5b_methods_h100.json", "gsm8k_1_5b_h100.json"
TRAINED = {"series": "RL, one epoch", "method": "TinyLoRA", "params": 196, "learning_rate": 1e-2}  # by the quickstart
_QUESTIONS = 7473  # training questions of GSM8K
_TIMED_RUN = "196 numbers, three epochs, rate 0.01"


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
        ["one token of every answer", f"{1e3 * decode['seconds']:.0f} ms", f"({decode['tokens_per_s']:,.0f} tokens/s)"],
        ["decoding, a step", f"{step['decode_s']:.0f} s", ""],
        ["updates, a step", f"{step['update_s']:.0f} s", ""],
        [f"{counted(epochs, 'epoch')}, {steps:,} steps", f"{hours:.1f} h", ""],
    ]
    return [
        *table(rows, left=(0, 2)),
        "These are the longest times: every answer has the greatest length. Loading,",
        "compiling, reading prompts, grading and evaluating come on top.",
    ]


def measured() -> None:
    """Prints what the quickstart's training on GSM8K gained on one H100, for every measured seed."""
    found, timed = (json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in (MEASURED, TIMED))
    runs = [row for row in found["runs"] if all(row[name] == value for name, value in TRAINED.items())]
    seconds = sum(timed["runs"][_TIMED_RUN]["median seconds of a step"].values())
    steps, numbers = runs[0]["steps"], TRAINED["params"]
    print(f"MEASURED on one {found['device'].partition(',')[0]}: {numbers} numbers, rate {TRAINED['learning_rate']}.")
    minutes = steps * seconds / 60
    print(f"{steps} steps of {seconds:.1f} s: {minutes:.0f} minutes of training, and longer on a smaller card.\n")
    rows = [["seed", "sampled", "greedy"]]
    rows += [
        [str(row["seed"]), _change(row["sampled"]), _change(row)] for row in sorted(runs, key=lambda row: row["seed"])
    ]
    print("\n".join(table(rows)))
    print(f"\nStrict accuracy on GSM8K's {found['questions']:,} test questions, before → after.")
    print(f"The weights were those of a GGUF file: {timed['model'].split(', ')[1].partition(' (')[0]}.")


def _change(row: Mapping[str, float]) -> str:
    """Formats the accuracies of a run, before and after training."""
    return f"{percent(row['accuracy'] - row['difference'])} → {percent(row['accuracy'])}"
