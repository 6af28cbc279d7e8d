"""Helpers for all command lines."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import jax

from experiments.common import multihost, progress
from experiments.common.specs import ConfigError
from tinylora_jax.files import user_cache, write_atomically
from tinylora_jax.io import CheckpointError, WorkdirError
from tinylora_jax.multihost import HostError, is_first, several
from tinylora_jax.stores import StoreError
from tinylora_jax.training import DivergenceError

_INTERRUPTED = 130  # as a shell reports SIGINT
# Ends messages about a base model named only by an adapter, whose author chose what would be downloaded.
NOT_IN_CACHE = (
    "is not in the cache of the Hugging Face hub; set --allow_download to download it, or set --model to its path or"
    " to another model"
)


class TrainingError(RuntimeError):
    """Training cannot continue; the last good state is kept."""

    @classmethod
    def at_step(cls, index: int, error: DivergenceError) -> TrainingError:
        """Creates the error for a diverged step, with advice."""
        return cls(
            f"step {index} is not finite ({error.values}); the state before it is kept. Lower"
            " config.optimizer.learning_rate or config.optimizer.max_grad_norm and train in a new --workdir"
        )


def use_compilation_cache() -> None:
    """Caches compiled programs on disk, so that a command starts faster next time, and uses most of a GPU's memory.

    The cache is in `$JAX_COMPILATION_CACHE_DIR` if set (empty: no cache), else in the user's cache folder.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # share of GPU memory; JAX's default is 0.75
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "xla"))


def fail(problem: str, code: int = 1) -> NoReturn:
    """Prints one error message and exits with an error code."""
    progress.tell_error(problem)
    multihost.leave(code)


@contextmanager
def reporting_errors(log_folder: Path | None = None) -> Iterator[None]:
    """Reports errors that a user can fix as one message with exit code 1, and interrupts with exit code 130.

    The traceback is written to `error.log` in the given folder, and the message says so. Errors of the config, the
    workdir, a store or another process leave none: their messages are complete, they may come before the folder
    exists, and the folder may belong to another run.
    """
    try:
        yield
    except (ConfigError, WorkdirError, StoreError, HostError) as error:
        fail(progress.with_names(error))
    except MemoryError:
        fail(f"out of memory; lower the sizes, or free some memory{_keep_traceback(log_folder)}")
    except (ValueError, OSError, RecursionError, CheckpointError, TrainingError) as error:
        fail(f"{progress.with_names(error)}{_keep_traceback(log_folder)}")
    except KeyboardInterrupt as error:
        where = " ".join(["interrupted", *getattr(error, "__notes__", ())])
        fail(f"{where}; what was saved is kept{_keep_traceback(log_folder)}", _INTERRUPTED)
    except jax.errors.JaxRuntimeError as error:
        if not several() or "RESOURCE_EXHAUSTED" in str(error):
            raise
        fail(
            f"the connection to the other processes broke because one of them ended; see its own message"
            f" ({str(error).strip().splitlines()[0][:200]}). The same command on every host continues a saved run."
        )


def _keep_traceback(folder: Path | None) -> str:
    if folder is None or not folder.is_dir() or not is_first():
        return ""
    with suppress(OSError):  # the disk may be the cause of the error
        write_atomically(folder / "error.log", traceback.format_exc().encode("utf-8", "replace"))
        return f"\n(traceback in {folder / 'error.log'})"
    return ""
