"""What every command line shares."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinylora_jax.io.checkpoint import CheckpointError


class TrainingError(RuntimeError):
    """Training cannot go on; the last good state is kept."""


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
        (folder / "error.log").write_text(traceback.format_exc())
    except OSError:  # the disk may be what failed
        return ""
    return f"\n(traceback in {folder / 'error.log'})"
