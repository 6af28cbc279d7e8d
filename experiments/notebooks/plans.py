"""What each notebook trains, by the machine that it runs on."""

from __future__ import annotations

import runpy
from dataclasses import dataclass

from experiments.common.opening import find_config
from experiments.notebooks import hosts
from experiments.notebooks.subprocesses import CommandError

_SMOKE = (
    *("--config.max_steps=2", "--config.batch_size=2", "--config.samples=4", "--config.slots=8"),
    *("--config.eval_data.limit=8", "--config.eval_batch_size=8", "--config.grpo.stream_tokens=224"),
)
# One number per matrix instead of 13 for all: one epoch then changes the accuracy visibly.
_VISIBLE = ("--config.adapter.n_tie=1", "--config.epochs=1", "--config.eval_samples=1")
_SAMPLED = ("--config.eval_samples=1",)  # training improves sampled answers more than greedy ones


@dataclass(frozen=True)
class Plan:
    """A training setup.

    Attributes:
      config: name or file of the config.
      flags: further flags of `experiments.grpo`.
      first_session: number of steps after which the first session stops, as after a disconnect; None runs to the end.
    """

    config: str
    flags: tuple[str, ...] = ()
    first_session: int | None = None

    @property
    def model(self) -> str:
        """Source of the base model."""
        return runpy.run_path(find_config(self.config))["get_config"]().model


def quickstart_plan(platform: str, choice: str = "") -> Plan:
    """Chooses what the quickstart trains, and prints the reason.

    Args:
      platform: platform returned by `begin`.
      choice: `sums` for the demo, `gsm8k`, `smoke` for two tiny steps of the demo, or a config file; empty chooses by
        the machine.

    Raises:
      CommandError: the choice is none of these.
    """
    if choice == "smoke":
        print("Smoke mode: SmolLM2-135M, two steps of 2 × 4 answers.\nThey show that it runs, not that it learns.")
        return Plan("demo", _SMOKE, first_session=1)
    if choice.endswith(".py"):
        print(f"The config {choice}")
        return Plan(choice, first_session=1)
    if choice not in ("", "sums", "gsm8k"):
        raise CommandError(f"choice {choice!r}: expected '', 'sums', 'gsm8k', 'smoke' or a config file")
    if choice == "gsm8k" or (not choice and platform != "cpu" and hosts.hub_answers()):
        print("Qwen2.5-Coder-1.5B-Instruct learns GSM8K with 196 numbers in one epoch.")
        return Plan("gsm8k_qwen2_5_coder_1_5b", _VISIBLE)
    reason = "" if choice else "No accelerator, or no hub, so this is the demo:\n"
    print(f"{reason}SmolLM2-135M-Instruct learns sums with 13 numbers in 10 steps.")
    return Plan("demo")


def gsm8k_plan(platform: str, choice: str = "") -> Plan:
    """Chooses the recipe for Qwen2.5-7B-Instruct in int8 on one chip.

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
            f"this recipe needs a TPU or a GPU, but this runtime has none. Choose one {hosts.how_to_change()} and run"
            " all cells again, or use quickstart.ipynb, which runs on a CPU"
        )
    _require_hub()
    print("Qwen2.5-7B-Instruct in int8 learns GSM8K with 13 numbers.")
    return Plan("gsm8k_qwen2_5_7b_one_chip", _SAMPLED)


def kaggle_plan(platform: str, choice: str = "") -> Plan:
    """Chooses the paper's recipe, Qwen2.5-7B-Instruct in bfloat16, on the eight chips of a Kaggle TPU.

    Args:
      platform: platform returned by `begin`.
      choice: `smoke` or a config file, as in `quickstart_plan`; empty for the recipe.

    Raises:
      CommandError: there is no TPU, or the hub cannot be reached.
    """
    if choice:
        return quickstart_plan(platform, choice)
    if platform != "tpu":
        raise CommandError(
            f"this recipe needs the TPU v5e-8, but this session has none. Choose it {hosts.how_to_change()} and run"
            " all cells again"
        )
    _require_hub()
    print("Qwen2.5-7B-Instruct in bfloat16 learns GSM8K with 13 numbers.")
    return Plan("gsm8k_qwen2_5_7b", _SAMPLED)


def _require_hub() -> None:
    if not hosts.hub_answers():
        where = ". On Kaggle, switch on Settings → Turn on internet" if hosts.on_kaggle() else ""
        raise CommandError(
            "the Hugging Face hub does not respond, but the model and GSM8K come from there. Check the network, or"
            f" unset HF_HUB_OFFLINE{where}"
        )
