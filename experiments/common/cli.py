"""Helpers for all command lines."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import jax
from absl import flags, logging
from tqdm import tqdm

from experiments.common import multihost
from tinylora_jax.files import expand, write_atomically
from tinylora_jax.io import CheckpointError, WorkdirError
from tinylora_jax.multihost import HostError, is_first, several
from tinylora_jax.training import DivergenceError

_EXAMPLE = " experiments/configs/demo.py"
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


class _PathParser(flags.ArgumentParser):
    """Expands `~` and variables in a flag's path; an empty path is unchanged."""

    syntactic_help = "a path"

    def parse(self, argument: str) -> str:
        return str(expand(argument)) if argument else argument


def define_path(name: str, help_text: str, several: bool = False) -> None:
    """Defines a path flag in which `~` and `$NAME` are expanded.

    Args:
      name: name of the flag, whose default is None.
      help_text: description of the flag for `--help`.
      several: whether the flag may be repeated, and holds a list.
    """
    define = flags.DEFINE_multi if several else flags.DEFINE
    define(_PathParser(), name=name, default=None, help=help_text, serializer=flags.ArgumentSerializer())


def use_compilation_cache() -> None:
    """Caches compiled programs on disk, so that a command starts faster next time, and uses most of a GPU's memory.

    The cache is in `$JAX_COMPILATION_CACHE_DIR` if set (empty: no cache), else in the user's cache folder.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # share of GPU memory; JAX's default is 0.75
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "tinylora_jax" / "xla"))


def tell(message: str) -> None:
    """Prints a progress message in the first process, without breaking a progress bar."""
    if is_first():
        tqdm.write(message, file=sys.stderr)


def fail(problem: str, code: int = 1) -> NoReturn:
    """Prints one error message and exits with an error code."""
    print(f"error: {problem}", file=sys.stderr)
    multihost.leave(code)


class _PathError(ValueError):
    """A path contains an unknown variable or user."""


def _with_config_expanded(argv: list[str]) -> list[str]:
    """Expands the path of the config file in a command line, which ml_collections does not."""
    given = list(argv)
    for place, argument in enumerate(given):
        flag, equals, path = argument.partition("=")
        if flag.lstrip("-") != "config" or not flag.startswith("-"):
            continue
        try:
            if equals:
                given[place] = f"{flag}={expand(path)}"
            elif place + 1 < len(given):
                given[place + 1] = str(expand(given[place + 1]))
        except ValueError as error:
            raise _PathError(str(error)) from error
    return given


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line for `app.run`, and reports each problem as a single message."""
    try:
        rest = flags.FLAGS(_with_config_expanded(argv))
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # JAX and Orbax log a lot at INFO
        if len(rest) > 1:
            fail(f"unexpected arguments {rest[1:]}; write a config field as --config.field=value")
        if "config" in flags.FLAGS:
            getattr(flags.FLAGS.config, "model", None)  # ml_collections reports a missing file only now
        return rest
    except flags.Error as error:
        fail(_flag_problem(str(error)))
    except _PathError as error:
        fail(f"--config={error}")
    except OSError as error:
        fail(f"the config file cannot be read: {str(error).splitlines()[-1].strip()}")
    except (SyntaxError, ImportError, TypeError, ValueError) as error:
        fail(f"the config file cannot be loaded: {type(error).__name__}: {error}")
    except (AttributeError, KeyError) as error:  # ml_collections does not handle these
        fail(_config_problem(error, argv))


def _flag_problem(said: str) -> str:
    """The reason among what absl says of a flag, which may contain a traceback."""
    reason = [line.strip() for line in said.splitlines() if line.strip()][-1]
    if "--config" in said and "other than None" in said:
        return "--config names no config; expected a file whose get_config() returns one, such as" + _EXAMPLE
    if re.match(r"\w+Error: ", reason):  # raised while the config file was loaded
        return f"the config file cannot be loaded: {reason}"
    return f"{reason.removesuffix('.')}; --helpfull lists all flags"


def _config_problem(error: BaseException, argv: Sequence[str]) -> str:
    """What is wrong with a config, or with the flags that change it."""
    said: object = error
    while isinstance(said, BaseException):  # nested exceptions, each adding quotes
        said = said.args[0] if said.args else type(said).__name__
    text = " ".join(str(said).split())
    if "'get_config'" in text:
        return "the config file has no function get_config(); expected one that returns a config, as in" + _EXAMPLE
    if "<class 'NoneType'>" in text:
        return "get_config() of the config file returns None; end it with `return config`"
    missing = re.search(r'(?:Key "|\')(\w+)["\']', text)
    near = re.search(r'Did you mean "([^"]+)"', text)
    field = repr(missing[1]) if missing else text
    hint = f" Did you mean {near[1]!r}?" if near else ""
    given = ", ".join(arg for arg in argv if arg.startswith("--config."))
    return f"the config has no field {field}{f' ({given})' if given else ''}.{hint} See experiments/configs/base.py"


@contextmanager
def reporting_errors(log_folder: Path | None = None) -> Iterator[None]:
    """Reports errors that a user can fix as one message with exit code 1, and interrupts with exit code 130.

    The traceback is written to `error.log` in the given folder, except for a `WorkdirError`, whose folder may belong to
    another run.
    """
    try:
        yield
    except WorkdirError as error:
        fail(str(error))
    except MemoryError:
        fail(f"out of memory; lower the sizes, or free some memory{_keep_traceback(log_folder)}")
    except (ValueError, OSError, RecursionError, CheckpointError, TrainingError, HostError) as error:
        fail(f"{error}{_keep_traceback(log_folder)}")
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
