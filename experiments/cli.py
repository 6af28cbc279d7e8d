"""What every command line shares."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from absl import app
from tqdm import tqdm

from tinylora_jax.io.checkpoint import CheckpointError


class TrainingError(RuntimeError):
    """Training cannot go on; the last good state is kept."""


def tell(message: str) -> None:
    """Prints a line for the person watching, without tearing a progress bar."""
    tqdm.write(message, file=sys.stderr)


def parse_flags(argv: list[str]) -> list[str]:
    """What `app.run` parses the command line with: a field that the config lacks is one message here."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:  # ml_collections lets these through
        given = ", ".join(arg for arg in argv if arg.startswith("--config."))
        problem = f"the config has no field {error.args[0]} ({given}); see experiments/configs/base.py"
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(1) from error


@contextmanager
def reporting_errors(log_folder: Path | None = None) -> Iterator[None]:
    """Turns an error that a user can mend into one message and exit code 1.

    The traceback goes to `error.log` in the given folder, for the cases that need more than the message.
    """
    try:
        yield
    except (ValueError, OSError, CheckpointError, TrainingError) as error:
        where = _keep_traceback(log_folder)
        print(f"error: {error}{where}", file=sys.stderr)
        raise SystemExit(1) from error


def _keep_traceback(folder: Path | None) -> str:
    if folder is None or not folder.is_dir():
        return ""
    try:
        (folder / "error.log").write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:  # the disk may be what failed
        return ""
    return f"\n(traceback in {folder / 'error.log'})"
