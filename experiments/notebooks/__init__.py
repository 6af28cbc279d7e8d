"""What the notebooks in `colab` call: plans, folders that outlive a session, and commands.

The kernel itself uses only the CPU, because a TPU belongs to one process at a time and the commands need it.
"""

from experiments.notebooks.expected import estimate, measured
from experiments.notebooks.hosts import begin, keep_folder
from experiments.notebooks.plans import Plan, gsm8k_plan, kaggle_plan, quickstart_plan
from experiments.notebooks.running import ask, command, fixed, train
from experiments.notebooks.subprocesses import CommandError

__all__ = [
    "CommandError",
    "Plan",
    "ask",
    "begin",
    "command",
    "estimate",
    "fixed",
    "gsm8k_plan",
    "kaggle_plan",
    "keep_folder",
    "measured",
    "quickstart_plan",
    "train",
]
