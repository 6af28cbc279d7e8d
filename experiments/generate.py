"""Prompts a model with one or more adapters in one batch, and prints answers as they are generated.

    python -m experiments.generate --adapter=/tmp/tinylora-demo/adapter --prompt='What is 2 + 3?'
    python -m experiments.generate --adapter=base --adapter=/tmp/a --adapter=/tmp/b --prompt='…' --prompt='…'

Every prompt meets every adapter, ours or PEFT's TinyLoRA, in the template that it was trained with; `base` is the
model without one. A single answer is printed token by token, of several each line when it is complete, behind the
number of its prompt and the name of its adapter. Without --prompt the lines of standard input are the prompts: one
after the other from a terminal, else all in one batch.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.common.cli import NOT_IN_CACHE, define_path, parse_flags, reporting_errors, tell, use_compilation_cache
from experiments.common.terminal import Screen, TextStream
from tinylora_jax.adapters import CombinationError, Policy
from tinylora_jax.data import TEMPLATES, Prompt, get_template, pad_prompts, render
from tinylora_jax.io import Pretrained, SavedAdapter, load_pretrained, open_adapter, read_together
from tinylora_jax.io.hf import NotInCacheError
from tinylora_jax.rollout import Sampling, stream

FLAGS = flags.FLAGS
BASE = "base"  # names the model without an adapter; a folder of that name is ./base
_WIDTH_STEP = 64  # prompts are padded to a multiple of this, so that the next one seldom compiles anything
_MOST_TEXT = 2**24  # characters of standard input
_EVERY = 4  # tokens between two looks at what has come
_adapted = jax.jit(Policy.__call__)


class InputError(ValueError):
    """A flag or a prompt cannot be used."""


@dataclass(frozen=True)
class Answering:
    """A model and the adapters that answer.

    Attributes:
      base: the model.
      names: displayed names of the adapters.
      templates: names of the prompt templates that they answer in.
      policy: the model with factors; None if no adapter is among them.
      vectors: `[adapters, groups, u]`, zeros for the base model.
    """

    base: Pretrained
    names: tuple[str, ...]
    templates: tuple[str, ...]
    policy: Policy | None
    vectors: np.ndarray | None

    def weights(self, prompts: int) -> Any:
        """The weights for rows that are prompt-major: every prompt with every adapter."""
        if self.policy is None:
            return self.base.params
        rows = self.vectors[0] if len(self.names) == 1 else np.tile(self.vectors, (prompts, 1, 1))
        return _adapted(self.policy, jnp.asarray(rows))


def short_names(adapters: Sequence[str]) -> tuple[str, ...]:
    """Folder names without what all have in common at both ends.

    >>> short_names(["/tmp/a/adapter", "/tmp/b/adapter", "base"])
    ('a', 'b', 'base')
    """
    paths = {name: Path(name).absolute().parts for name in adapters if name != BASE}
    start = len(os.path.commonprefix(list(paths.values()))) if len(paths) > 1 else 0
    rest = {name: parts[start:] for name, parts in paths.items()}
    end = len(os.path.commonprefix([parts[::-1] for parts in rest.values()])) if len(paths) > 1 else 0
    shown = {
        name: "/".join(parts[: len(parts) - end] if len(paths) > 1 else parts[-1:]) for name, parts in rest.items()
    }
    return tuple(shown.get(name) or name for name in adapters)


def load(
    model: str | None, adapters: Sequence[str], dtype: Any, template: str | None = None, download: bool = False
) -> Answering:
    """Loads the model and reads its adapters.

    Args:
      model: as `load_pretrained` takes it; None is the base that the adapters name.
      adapters: folders, or `base`; none is the base model alone.
      dtype: dtype of the weights.
      template: name of the prompt template; None is each adapter's own.
      download: whether a base that the adapters alone name may be downloaded: whoever made them chose it.

    Raises:
      AdapterError, PeftError: an adapter is damaged or was trained on another model.
      InputError: there is no model, an adapter is given twice, or two cannot share a batch.
    """
    adapters = list(adapters) or [BASE]
    if twice := sorted({name for name in adapters if adapters.count(name) > 1}):
        raise InputError(f"--adapter={twice[0]} is given twice; for several answers of one there is --samples")
    folders = [name for name in adapters if name != BASE]
    trained = {name: open_adapter(Path(name)) for name in folders}
    shown = short_names(adapters)
    templates = _templates(shown, [trained.get(name) for name in adapters], template)
    _check_alike(trained, model)
    named = next((each.base for each in trained.values() if each.base is not None), None)
    if model is None and named is None:
        where = "the adapter does not name its base model" if trained else "without an adapter nothing says which"
        raise InputError(f"--model is missing: {where}; a hub id, a folder or a .gguf file")
    tell(f"loading {model or named}")
    try:
        base = load_pretrained(model or named, dtype, download=download or model is not None)
    except NotInCacheError as error:
        raise InputError(f"the adapter calls its base {named!r}, which {NOT_IN_CACHE}") from error
    except (FileNotFoundError, ValueError) as error:
        if model is None:
            raise InputError(f"{error} (the adapter calls its base {named!r}; --model says where it is)") from error
        raise
    if not trained:
        return Answering(base, (BASE,), templates, None, None)
    tell("reading or computing the factors")
    try:
        factors, read = read_together(base.params, list(trained.values()))
    except CombinationError as error:
        raise InputError(f"the adapters cannot share a batch: {error}; give them a command each") from error
    by_name = dict(zip(trained, read, strict=True)) | {BASE: np.zeros((factors.num_groups, factors.spec.u), np.float32)}
    vectors = np.stack([by_name[name] for name in adapters])
    return Answering(base, shown, templates, Policy(base.params, factors), vectors)


def _check_alike(adapters: Mapping[str, SavedAdapter], model: str | None) -> None:
    """Says which adapters cannot share a batch before anything is loaded."""
    for first, one in list(adapters.items())[:1]:
        for name, other in adapters.items():
            if other.spec.rank != one.spec.rank or set(other.spec.targets) != set(one.spec.targets):
                shape = lambda spec: f"rank {spec.rank} and {len(spec.targets)} weights"
                raise InputError(
                    f"{name} adapts {shape(other.spec)}, {first} {shape(one.spec)}: adapters of one batch need the same"
                    " of both, so these two need a command each"
                )
            if model is None and None not in (one.base, other.base) and other.base != one.base:
                raise InputError(
                    f"{name} was trained on {other.base!r}, {first} on {one.base!r}; give them a command each, or name"
                    " the model of both with --model"
                )


def _templates(names: Sequence[str], adapters: Sequence[SavedAdapter | None], given: str | None) -> tuple[str, ...]:
    """The template of each adapter: the one given, or its own; for one that names none the first that is named."""
    if given is not None:
        get_template(given)
        return (given,) * len(adapters)
    own = [adapter.template if adapter else None for adapter in adapters]
    for name, template in zip(names, own, strict=True):
        if template is not None and template not in TEMPLATES:
            raise InputError(
                f"{name} was trained in the template {template!r:.60}, which is not known here; choose one of"
                f" {', '.join(TEMPLATES)} with --template"
            )
    first = next(filter(None, own), None)
    found = tuple(template or first or "plain" for template in own)
    if first:
        users = lambda template: ", ".join(name for name, its in zip(names, found, strict=True) if its == template)
        said = "; ".join(f"{template} ({users(template)})" for template in dict.fromkeys(found))
        tell(f"in the template that adapters were trained in: {said}. --template chooses one for all")
    return found


def encode(answering: Answering, prompts: Sequence[str], max_new_tokens: int) -> list[list[list[int]]]:
    """Prompts as tokens: of every prompt one list for each adapter, in its template.

    Raises:
      InputError: one is empty, is not text, or leaves no room for an answer.
    """
    base, encoded = answering.base, []
    room = base.config.max_positions - max_new_tokens
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise InputError(f"prompt {number} is empty")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"prompt {number} is not UTF-8 text at character {error.start + 1}") from error
        rendered = {name: render(get_template(name), prompt, base.tokenizer) for name in answering.templates}
        longest = max(map(len, rendered.values()))
        if longest > room:
            raise InputError(
                f"prompt {number} has {longest} tokens; with --max_new_tokens={max_new_tokens} the"
                f" {base.config.max_positions} positions of {base.name} leave {room}. Shorten one of them"
            )
        encoded.append([rendered[name] for name in answering.templates])
    return encoded


def answer(
    answering: Answering,
    prompts: Sequence[Sequence[Sequence[int]]],
    sampling: Sampling,
    key: jax.Array,
    out: TextIO,
    samples: int = 1,
    first: int = 0,
) -> None:
    """Answers every prompt with every adapter in one batch, and writes while it does.

    Args:
      answering: the model and its adapters.
      prompts: token ids of every prompt for each adapter.
      sampling: how completions are drawn.
      key: key of the sampling noise; a prompt gets the same noise with every adapter.
      out: where the answers go.
      samples: answers per prompt and adapter.
      first: number of prompts answered before.
    """
    asked = [Prompt(first + place, tuple(tokens), "", "") for place, row in enumerate(prompts) for tokens in row]
    width = -(-max(len(prompt.tokens) for prompt in asked) // _WIDTH_STEP) * _WIDTH_STEP
    arrays = pad_prompts(asked, width)
    labels = _labels(len(prompts), answering.names, samples)
    screen, texts = Screen(out, labels), [TextStream(answering.base.tokenizer) for _ in labels]
    drawn, stopped, started = np.zeros(len(labels), int), np.zeros(len(labels), bool), time.perf_counter()
    try:
        weights = answering.weights(len(prompts))
        for part in stream(answering.base.config, weights, *arrays, key, sampling, samples, _EVERY):
            drawn, stopped = drawn + part.lengths, stopped | part.stopped
            for row, count in enumerate(part.lengths):
                if count:
                    screen.write(row, texts[row].push(part.tokens[row, :count]))
                if stopped[row] or drawn[row] == sampling.max_new_tokens:
                    screen.end(row)
    finally:
        screen.close()
    cut = "" if stopped.all() else f"; {(~stopped).sum()} of {len(stopped)} cut off at {sampling.max_new_tokens}"
    tell(f"{drawn.sum()} tokens in {time.perf_counter() - started:.1f} s{cut}")


def _labels(prompts: int, names: Sequence[str], samples: int) -> list[str]:
    return [
        " ".join(
            ([str(prompt + 1)] if prompts > 1 else [])
            + ([name] if len(names) > 1 else [])
            + ([f"#{sample + 1}"] if samples > 1 else [])
        )
        for prompt in range(prompts)
        for name in names
        for sample in range(samples)
    ]


def prompts_of(given: Sequence[str], source: TextIO) -> Iterator[list[str]]:
    """Batches of prompts: those given, or the lines of `source`, from a terminal one at a time."""
    if given:
        yield list(given)
    elif not source.isatty():
        text = source.read(_MOST_TEXT + 1)
        if len(text) > _MOST_TEXT:
            raise InputError(f"standard input has more than {_MOST_TEXT} characters; give fewer prompts at a time")
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            raise InputError("no prompt: give --prompt, or lines on standard input")
        yield lines
    else:
        while True:
            try:
                line = input("> ")
            except EOFError:
                return
            if line.strip():
                yield [line]


def run(values: flags.FlagValues) -> None:
    """What the command line says."""
    if values.samples > 1 and values.temperature == 0:
        raise InputError(f"--samples={values.samples} are all alike at --temperature=0; raise it")
    sampling = Sampling(values.max_new_tokens, values.temperature)
    dtype = values.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    adapters, download = values.adapter or [], values.allow_download
    answering = load(values.model, adapters, jnp.dtype(dtype), values.template, download)
    sampling = replace(sampling, stop_tokens=answering.base.stop_tokens)
    key, answered = jax.random.key(values.seed), 0
    for prompts in prompts_of(values.prompt, sys.stdin):
        encoded = encode(answering, prompts, values.max_new_tokens)
        answer(answering, encoded, sampling, key, sys.stdout, values.samples, answered)
        answered += len(prompts)


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    for file in (sys.stdin, sys.stdout):
        file.reconfigure(encoding="utf-8", errors="surrogateescape" if file is sys.stdin else "replace")
    with reporting_errors():
        try:
            run(FLAGS)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:  # whoever read has had enough, and Python would complain once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "What `config.model` takes; absent: the base that the first adapter names.")
    define_path("adapter", f"Folder of a trained adapter, or {BASE}; again for more of them.", several=True)
    flags.DEFINE_bool("allow_download", False, "Download the base that the adapter names if it is not in the cache.")
    flags.DEFINE_multi_string("prompt", [], "A question; again for more. Absent: lines of standard input.")
    _about = f"The messages around a question: {', '.join(TEMPLATES)}. Absent: each adapter's own, else plain."
    flags.DEFINE_string("template", None, _about)
    flags.DEFINE_integer("max_new_tokens", 256, "Longest answer.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token.", lower_bound=0)
    flags.DEFINE_integer("samples", 1, "Answers per prompt and adapter.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the sampling noise.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Default: float32 on a CPU, bfloat16 elsewhere.")
    app.run(main, flags_parser=parse_flags)
