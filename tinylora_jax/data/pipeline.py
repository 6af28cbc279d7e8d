"""From questions to batches of prompts: encoding, the resumable shuffled stream, padded arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import grain
import numpy as np
from absl import logging
from jaxtyping import Int32, UInt32

from tinylora_jax.data.prompts import PromptTemplate, Tokenizer, render
from tinylora_jax.data.questions import Question
from tinylora_jax.data.sources import DataError

LENGTH_MULTIPLE = 16
MAX_REPORTED = 5


@dataclass(frozen=True)
class Prompt:
    """A question as tokens.

    Attributes:
      id: the question's id.
      tokens: the rendered prompt.
      question: the question's text, for rewards and logs.
      answer: the gold answer.
      solution: a worked solution, if there is one.
    """

    id: int
    tokens: tuple[int, ...]
    question: str
    answer: str
    solution: str | None = None


class PromptArrays(NamedTuple):
    """Prompts as arrays, padded on the right.

    Attributes:
      ids: the questions' ids.
      tokens: token ids; what lies at or beyond a row's length is padding.
      lengths: tokens of each row.
    """

    ids: UInt32[np.ndarray, " prompts"]
    tokens: Int32[np.ndarray, "prompts length"]
    lengths: Int32[np.ndarray, " prompts"]


def encode_prompts(
    questions: Sequence[Question],
    template: PromptTemplate,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    on_too_long: Literal["error", "drop"] = "error",
) -> tuple[Prompt, ...]:
    """Renders questions to prompts of a bounded length.

    Args:
      questions: from `load_questions`.
      template: the messages around each question.
      tokenizer: from transformers.
      max_prompt_tokens: longest prompt allowed.
      on_too_long: what to do with longer ones; `drop` logs how many went.

    Returns:
      The prompts, in order.

    Raises:
      DataError: prompts are too long (with `error`), have no tokens, or none is left.
    """
    prompts = [
        Prompt(q.id, tuple(render(template, q.question, tokenizer)), q.question, q.answer, q.solution)
        for q in questions
    ]
    if empty := [prompt.id for prompt in prompts if not prompt.tokens]:
        raise DataError(f"{_some(empty, len(prompts))} have no tokens; is this the model's tokenizer?")
    kept = tuple(prompt for prompt in prompts if len(prompt.tokens) <= max_prompt_tokens)
    if len(kept) < len(prompts):
        long = {prompt.id: len(prompt.tokens) for prompt in prompts if len(prompt.tokens) > max_prompt_tokens}
        problem = (
            f"{_some(list(long), len(prompts))} are longer than max_prompt_tokens={max_prompt_tokens} "
            f"(longest: {max(long.values())} tokens)"
        )
        if on_too_long == "error":
            raise DataError(f"{problem}; raise max_prompt_tokens or drop them with on_too_long='drop'")
        logging.warning("Dropped: %s", problem)
    if not kept:
        raise DataError(f"no prompt is left of {len(prompts)} questions; raise max_prompt_tokens={max_prompt_tokens}")
    return kept


def make_pipeline(
    prompts: Sequence[Prompt], batch_size: int, seed: int, epochs: int | None = None
) -> grain.DatasetIterator[tuple[Prompt, ...]]:
    """Streams batches of prompts, reshuffled each epoch.

    Each epoch is cut into whole batches and leaves out the prompts that do not fill another one (others each
    time, as the order changes). So no batch holds a prompt twice: its samples would share their noise.

    `get_state()` is a small JSON-serializable dict. After `set_state` a new pipeline made with the same
    arguments continues with exactly the batches that were still to come.

    Args:
      prompts: with distinct ids.
      batch_size: prompts in a batch.
      seed: keys the order.
      epochs: passes over the prompts; None is without end.

    Returns:
      A grain iterator over tuples of `batch_size` prompts. It reads in the calling thread.

    Raises:
      DataError: fewer prompts than a batch needs, or ids that repeat.
      ValueError: a size, seed or epoch count out of range.
    """
    if batch_size < 1 or (epochs is not None and epochs < 1) or not 0 <= seed < 2**32:
        problem = f"got batch_size={batch_size}, epochs={epochs}, seed={seed}"
        raise ValueError(f"a pipeline needs batch_size >= 1, epochs >= 1 (or None) and a 32-bit seed; {problem}")
    if len(prompts) < batch_size:
        advice = "lower batch_size or load more questions"
        raise DataError(f"batch_size={batch_size} is more than the {len(prompts)} prompts there are; {advice}")
    repeated = [id for id, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if repeated:
        problem = f"{_some(repeated, len(prompts))} have ids that repeat"
        raise DataError(f"{problem}; ids key the sampling noise, so renumber questions of joined data sets")
    dataset = grain.MapDataset.source(tuple(prompts)).seed(seed).shuffle()
    dataset = dataset.batch(batch_size, drop_remainder=True, batch_fn=tuple).repeat(epochs)
    # Reading from memory needs neither threads nor a buffer.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def padded_width(prompts: Sequence[Prompt]) -> int:
    """The longest prompt's length rounded up to a multiple of 16: one width for all batches of a set."""
    return -(-max(len(prompt.tokens) for prompt in prompts) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def pad_prompts(prompts: Sequence[Prompt], length: int | None = None, pad_id: int = 0) -> PromptArrays:
    """Pads prompts on the right into arrays.

    Args:
      prompts: at least one.
      length: width of the result; None is the longest prompt rounded up to a multiple of 16.
      pad_id: fills the padding. Any token does: `lengths` says what counts.

    Returns:
      The arrays.

    Raises:
      ValueError: there are no prompts, or some are longer than `length`.

    >>> arrays = pad_prompts([Prompt(7, (5, 6), "q", "a")], length=3)
    >>> arrays.tokens, arrays.lengths
    (array([[5, 6, 0]], dtype=int32), array([2], dtype=int32))
    """
    if not prompts:
        raise ValueError("cannot pad an empty batch of prompts")
    lengths = np.array([len(prompt.tokens) for prompt in prompts], np.int32)
    if length is None:
        length = padded_width(prompts)
    if lengths.max() > length:
        long = [prompt.id for prompt in prompts if len(prompt.tokens) > length]
        raise ValueError(f"{_some(long, len(prompts))} do not fit length={length} (longest: {lengths.max()} tokens)")
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt.tokens)] = prompt.tokens
    return PromptArrays(np.array([prompt.id for prompt in prompts], np.uint32), tokens, lengths)


def _some(ids: Sequence[int], total: int) -> str:
    shown = ", ".join(map(str, ids[:MAX_REPORTED])) + (", ..." if len(ids) > MAX_REPORTED else "")
    return f"{len(ids)} of {total} prompts (ids {shown})"
