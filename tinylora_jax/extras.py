"""Says how to install what is missing: one wording for all messages."""

from __future__ import annotations

from pathlib import Path

_SETUP = Path(__file__).parents[1] / "setup.py"


def install_command(extra: str = "") -> str:
    """The command that installs this project again, with the packages of an extra.

    In a checkout it must run in the folder that contains `setup.py`, as those in the README. An installed package may
    have no such folder, and its name stands for it.

    Args:
      extra: name of an extra in `setup.py`; empty for the packages that every command needs.
    """
    project = "." if _SETUP.is_file() else "tinylora_jax"
    target = f"'{project}[{extra}]'" if extra else project
    return f"pip install -e {target}" if project == "." else f"pip install {target}"


def lacking(package: str, extra: str = "") -> str:
    """Says that a package is not installed, and which command installs it.

    Args:
      package: name of the package, or several names.
      extra: name of the extra in `setup.py` that contains it, see `install_command`.
    """
    return f"{package} is not installed; run: {install_command(extra)}"
