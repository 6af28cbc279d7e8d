"""A resumable queue of prompts that remembers pass rates; a step takes as many as it needs.

The queue runs through the same shuffled epochs as `make_pipeline`, one prompt after the other. With `min_draw < 1`, a
prompt whose completions were nearly always right, or nearly always wrong, is often skipped at its turn: it would
probably teach nothing.
"""

from __future__ import annotations

import base64
import hashlib
import math
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import grain
import numpy as np

from tinylora_jax.data.pipeline import Prompt, check_pipeline
from tinylora_jax.data.sources import DataError


def draw_probability(right: int, seen: int, samples: int, min_draw: float) -> float:
    """The probability with which a prompt is drawn at its turn, in proportion to that of a signal in its next group.

    A group of G completions teaches something if some are right and some are wrong. For a pass rate p this has the
    probability s(p) = 1 − pᴳ − (1 − p)ᴳ. The pass rate is uncertain, so s is averaged over its Beta posterior with
    Jeffreys' prior. Thus four right answers of four skip a prompt less often than 40 of 40. (The simpler weight
    4 p (1 − p) is 0 for both.) The result is relative to the best prompt, whose p is ½:

        w = max(min_draw, min(1, E[s(p)] / s(½)))    with p ~ Beta(right + ½, seen − right + ½)

    Args:
      right: number of right completions so far.
      seen: number of completions so far.
      samples: number of completions in a group, G, at least 2.
      min_draw: smallest probability.

    Returns:
      The probability; 1 for a prompt that was never seen.

    >>> [round(draw_probability(right, 4, 4, 0.1), 3) for right in range(5)]
    [0.318, 0.72, 0.848, 0.72, 0.318]
    >>> draw_probability(0, 0, 4, 0.1), round(draw_probability(40, 40, 4, 0.01), 3)
    (1.0, 0.053)
    """
    if not seen:
        return 1.0
    # E[pᴳ] of Beta(a, b) is the product of (a + i) / (a + b + i) for i < G.
    expected_power = lambda a: math.prod((a + i) / (seen + 1 + i) for i in range(samples))
    signal = 1 - expected_power(right + 0.5) - expected_power(seen - right + 0.5)
    return max(min_draw, min(1.0, signal / (1 - 2.0 ** (1 - samples))))


def _chance(seed: int, epoch: int, prompt_id: int) -> float:
    """A number in [0, 1) that depends on these three alone, on any machine."""
    digest = hashlib.blake2b(f"{seed} {epoch} {prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class PromptQueue(grain.DatasetIterator[tuple[Prompt, ...]]):
    """An endless queue of prompts; as an iterator, it gives batches.

    A step that does not know beforehand how many prompts it needs looks at them with `ahead`, and then calls `take`
    with their number. No step gets a prompt twice, because its samples would share their noise: if an epoch ends
    within a step, the prompts that this step already has are skipped in the next epoch.

    `get_state()` returns a small JSON-serializable dict. After `set_state`, a new queue with the same arguments
    continues with exactly the remaining prompts.

    Args:
      prompts: prompts with distinct ids.
      batch_size: number of prompts of a batch.
      seed: seed of the order, and of which prompts are skipped.
      samples: number of completions per prompt, see `draw_probability`.
      min_draw: smallest probability with which a prompt is drawn at its turn; 1 draws every prompt.

    Raises:
      DataError: there are fewer prompts than a batch needs, or ids repeat.
      ValueError: the batch size, the seed, the samples or `min_draw` is out of range.
    """

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, seed: int, samples: int = 2, min_draw: float = 1.0):
        super().__init__()
        check_pipeline(prompts, batch_size, seed)
        if samples < 2 or not 0 < min_draw <= 1:
            got = f"got samples={samples}, min_draw={min_draw}"
            raise ValueError(f"a queue needs samples >= 2 and 0 < min_draw <= 1; {got}")
        self._order = grain.MapDataset.source(tuple(prompts)).seed(seed).shuffle().repeat()
        self._places = {prompt.id: place for place, prompt in enumerate(prompts)}
        self._batch_size, self._seed, self._samples, self._min_draw = batch_size, seed, samples, min_draw
        self._position = 0  # number of turns so far, in all epochs
        self._ends: list[int] = []  # positions after each prompt of `ahead`
        self._counts = np.zeros((2, len(prompts)), np.int32)  # right completions and all completions

    def __next__(self) -> tuple[Prompt, ...]:
        batch = tuple(islice(self.ahead(), self._batch_size))
        self.take(len(batch))
        return batch

    def ahead(self) -> Iterator[Prompt]:
        """Yields the prompts of the next step in order, each once; the queue stays where it is until `take`."""
        given: set[int] = set()
        self._ends, position = [], self._position
        while len(given) < len(self._places):
            prompt = self._order[position]
            epoch, position = position // len(self._places), position + 1
            if prompt.id not in given and self._is_drawn(prompt.id, epoch):
                given.add(prompt.id)
                self._ends.append(position)
                yield prompt

    def take(self, count: int) -> None:
        """Moves past the first `count` prompts of the last `ahead`.

        Raises:
          ValueError: `ahead` has not given so many prompts.
        """
        if not 0 < count <= len(self._ends):
            raise ValueError(f"cannot take {count} prompts of the {len(self._ends)} that were given")
        self._position, self._ends = self._ends[count - 1], []

    def observe(self, ids: Sequence[int], right: Sequence[int], samples: int) -> None:
        """Remembers how many of `samples` completions were right, for every prompt id; call it after `take`."""
        if self._min_draw < 1:
            places = [self._places[id] for id in ids]
            np.add.at(self._counts[0], places, np.asarray(right, np.int32))
            np.add.at(self._counts[1], places, np.int32(samples))

    def _is_drawn(self, prompt_id: int, epoch: int) -> bool:
        """Decides whether a prompt is drawn at its turn of an epoch."""
        if self._min_draw == 1:
            return True
        right, seen = self._counts[:, self._places[prompt_id]].tolist()
        return _chance(self._seed, epoch, prompt_id) < draw_probability(right, seen, self._samples, self._min_draw)

    def get_state(self) -> dict[str, Any]:
        """The position, and the counts of all prompts, compressed."""
        packed = zlib.compress(self._counts.astype("<i4").tobytes())
        return {"position": self._position, "counts": base64.b64encode(packed).decode("ascii")}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a state of `get_state`.

        Raises:
          DataError: the state belongs to other prompts, or is damaged.
        """
        size = self._counts.size * 4
        try:
            position = int(state["position"])
            # One more byte than expected shows data that are too long, without unpacking all of them.
            data = zlib.decompressobj().decompress(base64.b64decode(state["counts"], validate=True), size + 1)
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise DataError(f"the state of the prompt queue is damaged ({error!r}); start a new run") from error
        counts = np.frombuffer(data, "<i4").reshape(2, -1) if len(data) == size else np.full((2, 1), -1)
        if position < 0 or (counts < 0).any() or (counts[0] > counts[1]).any():
            raise DataError(
                f"the state of the prompt queue is not one of {len(self._places)} prompts; use the data of the saved"
                " run, or start a new run"
            )
        self._position, self._ends, self._counts = position, [], counts.astype(np.int32)
