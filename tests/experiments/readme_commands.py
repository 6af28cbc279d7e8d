"""Parses commands with the flags that they define, and checks their configs; nothing is computed.

Standard input is a JSON list of [module, *arguments]; standard output, a list of what is wrong with each, or null.
"""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.common.specs import parse  # noqa: E402


def problem(module, *arguments):
    """What is wrong with a command; None if nothing is."""
    defined, sys.argv = set(flags.FLAGS), [module, *arguments]
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            runpy.run_module(module, run_name="__main__")
    except (SystemExit, ImportError, ValueError) as error:
        return f"{type(error).__name__}: {error} {told.getvalue()}"
    finally:
        for name in set(flags.FLAGS) - defined:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
    return None


def only_parse(main, flags_parser=flags.FLAGS):
    """Stands where `app.run` does."""
    flags_parser(sys.argv)
    if "config" in flags.FLAGS:
        parse(flags.FLAGS.config)


if __name__ == "__main__":
    app.run = only_parse
    print(json.dumps([problem(*command) for command in json.loads(sys.stdin.read())]))
