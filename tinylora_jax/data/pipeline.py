"""From questions to batches of prompts: encoding, a resumable shuffled stream, padded arrays."""

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
    """A question rendered as prompt tokens.

    Attributes:
      id: id of the question.
      tokens: token ids of the rendered prompt.
      question: text of the question, for rewards and logs.
      answer: gold answer.
      solution: worked solution; None if there is none.
    """

    id: int
    tokens: tuple[int, ...]
    question: str
    answer: str
    solution: str | None = None


class PromptArrays(NamedTuple):
    """Right-padded prompts as arrays.

    Attributes:
      ids: ids of the questions, `[prompts]`.
      tokens: token ids, int32 `[prompts, length]`; entries beyond a row's length are padding.
      lengths: number of tokens in each row, int32 `[prompts]`.
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
    """Renders questions to prompts of bounded length.

    Args:
      questions: questions from `load_questions`.
      template: messages around each question.
      tokenizer: transformers tokenizer of the model.
      max_prompt_tokens: longest allowed prompt, in tokens.
      on_too_long: action for longer prompts: `error`, or `drop`, which logs their number.

    Returns:
      The prompts, in order.

    Raises:
      DataError: prompts are too long (with `error`) or have no tokens, or none is left.
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
    """Streams batches of prompts, reshuffled in each epoch.

    Each epoch consists of whole batches and skips the remaining prompts, which differ between epochs because the order
    changes. So no batch contains a prompt twice; its samples would share their noise.

    `get_state()` returns a small JSON-serializable dict. After `set_state`, a new pipeline with the same arguments
    continues with exactly the remaining batches.

    Args:
      prompts: prompts with distinct ids.
      batch_size: number of prompts per batch.
      seed: seed of the order.
      epochs: number of passes over the prompts; None for infinitely many.

    Returns:
      A grain iterator over tuples of `batch_size` prompts. It reads in the calling thread.

    Raises:
      DataError: there are fewer prompts than a batch needs, or ids repeat.
      ValueError: the batch size, the seed or the number of epochs is out of range.
    """
    check_pipeline(prompts, batch_size, seed, epochs)
    dataset = grain.MapDataset.source(tuple(prompts)).seed(seed).shuffle()
    dataset = dataset.batch(batch_size, drop_remainder=True, batch_fn=tuple).repeat(epochs)
    # Reading from memory needs neither threads nor a buffer.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def check_pipeline(prompts: Sequence[Prompt], batch_size: int, seed: int, epochs: int | None = None) -> None:
    """Raises the errors of `make_pipeline`."""
    if batch_size < 1 or (epochs is not None and epochs < 1) or not 0 <= seed < 2**32:
        problem = f"got batch_size={batch_size}, epochs={epochs}, seed={seed}"
        raise ValueError(f"a pipeline needs batch_size >= 1, epochs >= 1 (or None) and a 32-bit seed; {problem}")
    if len(prompts) < batch_size:
        advice = "lower batch_size or load more questions"
        raise DataError(f"batch_size={batch_size} exceeds the number of prompts, {len(prompts)}; {advice}")
    repeated = [id for id, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if repeated:
        problem = f"{_some(repeated, len(prompts))} have repeated ids"
        raise DataError(f"{problem}; ids determine the sampling noise, so renumber questions of joined data sets")


def padded_width(prompts: Sequence[Prompt]) -> int:
    """The length of the longest prompt, rounded up to a multiple of 16: one width for all batches of a set."""
    return -(-max(len(prompt.tokens) for prompt in prompts) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def pad_prompts(prompts: Sequence[Prompt], length: int | None = None, pad_id: int = 0) -> PromptArrays:
    """Builds right-padded arrays of prompts.

    Args:
      prompts: prompts to pad, at least one.
      length: width of the result in tokens; None for the longest prompt rounded up to a multiple of 16.
      pad_id: token id of the padding; it may be any token, because `lengths` marks the valid ones.

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
