"""Refilled batches: rollouts go on until enough groups have a signal, as in DAPO's dynamic sampling.

The prompts form a queue. The batch of a step consists of its first groups, in the order of the queue, whose rewards are
not all equal. So the batch depends neither on the mesh nor on the slots nor on timing: a group that ends early does not
overtake one that takes long.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

import jax
import numpy as np

from tinylora_jax.adapters import Adapted, Trained
from tinylora_jax.data import Prompt, pad_prompts
from tinylora_jax.models import ModelConfig
from tinylora_jax.rewards import Reward
from tinylora_jax.rl._learner import rollout_metrics
from tinylora_jax.rl._rollout import Decoder, GradedRollout, Rollout, grade
from tinylora_jax.rollout import Completions, ContinuousBatch, Progress, QueueSizes, Sampling

_STEPS = 64  # decoding steps between two looks of the host at the completions


@dataclass(frozen=True)
class Refilled:
    """A batch of groups with a signal, and everything that was generated for it.

    Attributes:
      batch: graded groups to train on, in the order of the queue.
      consumed: all graded groups up to the last one that the batch needs, in the order of the queue.
      num_started: number of prompts whose completions were begun, including those that were dropped.
      num_tokens: number of generated tokens, including those of dropped completions.
    """

    batch: GradedRollout
    consumed: GradedRollout
    num_started: int
    num_tokens: int

    def metrics(self) -> dict[str, float]:
        """Computes metrics of all consumed groups, which are comparable with those of a plain rollout.

        They have the names of `rollout_metrics`, because rewards of the batch itself are biased: it lacks the groups
        that are all right or all wrong. `batch_reward` and `batch_without_signal` are those of the batch.
        """
        own, seconds = rollout_metrics(self.batch), max(self.consumed.seconds, 1e-9)
        return rollout_metrics(self.consumed) | {
            "batch_reward": own["reward"],
            "batch_without_signal": own["groups_without_signal"],
            "questions": float(len(self.consumed.prompts)),
            "questions_started": float(self.num_started),
            "generated_tokens": float(self.num_tokens),
            "grading_s": self.consumed.grading_seconds,
            "tokens_per_s": self.num_tokens / seconds,
        }


def refill_sizes(batch_size: int, times: int, num_prompts: int, samples: int, width: int, slots: int = 0) -> QueueSizes:
    """Chooses the sizes of `refill`.

    Args:
      batch_size: number of groups of a batch.
      times: largest number of prompts per step, in batches; fewer if there are fewer prompts.
      num_prompts: number of prompts of the data set, at least `batch_size`.
      samples: number of completions per prompt.
      width: padded prompt length, in tokens.
      slots: number of completions decoded at once; 0 for those of a batch.
    """
    rows = batch_size * samples
    # Half a batch is prefilled at once: few programs start, and few completions are begun in vain.
    chunk = batch_size // 2 if batch_size % 2 == 0 else batch_size
    most = max(1, min(times, num_prompts // batch_size)) * batch_size
    return QueueSizes(most, chunk, samples, min(slots, rows) or rows, width)


def choose(signals: Sequence[bool | None], batch_size: int, most: int) -> tuple[int, list[int]] | None:
    """Chooses the groups of a batch from a queue.

    Args:
      signals: whether each group has a signal, in the order of the queue; None for a group that has not ended.
      batch_size: number of groups of the batch.
      most: largest number of groups to draw, at least `batch_size`.

    Returns:
      The number of consumed groups, and the places of the chosen ones; None if later groups decide. If all `most`
      groups have too few signals, the earliest groups without one complete the batch.

    >>> choose([True, False, None, True], 2, 4), choose([True, False, True, None], 2, 4)
    (None, (3, [0, 2]))
    >>> choose([False, False, False, True], 2, 4)
    (4, [0, 3])
    """
    known = list(takewhile(lambda signal: signal is not None, signals))
    useful = [place for place, signal in enumerate(known) if signal]
    if len(useful) >= batch_size:
        return useful[batch_size - 1] + 1, useful[:batch_size]
    if len(known) < most:
        return None
    others = [place for place, signal in enumerate(known) if not signal]
    return most, sorted(useful + others[: batch_size - len(useful)])


def refill(
    config: ModelConfig,
    policy: Adapted,
    v: Trained,
    queue: Iterator[Prompt],
    key: jax.Array,
    sampling: Sampling,
    sizes: QueueSizes,
    batch_size: int,
    reward: Reward,
    tokenizer: Decoder,
) -> Refilled:
    """Generates and grades completions for a queue of prompts until a batch of groups with a signal is complete.

    A group has a signal if its rewards are not all equal. The batch consists of the first `batch_size` such groups in
    the order of the queue. If `sizes.prompts` prompts have fewer, groups without signal complete it, see `choose`.

    Args:
      config: architecture of the model.
      policy: frozen weights and the adapter's structure.
      v: trained parameters.
      queue: distinct prompts, at least `sizes.prompts`; more of them may be taken than are consumed.
      key: PRNG key of the sampling noise.
      sampling: sampling settings.
      sizes: sizes from `refill_sizes`.
      batch_size: number of groups of the batch.
      reward: reward function, see `load_reward`.
      tokenizer: tokenizer of the model.

    Returns:
      The batch, and all groups that were consumed.

    Raises:
      ValueError: the queue ended too early, or a prompt is longer than `sizes.width`.
    """
    running = ContinuousBatch(config, policy, v, key, sampling, sizes)
    return _Refill(running, queue, batch_size, reward, tokenizer).run()


class _Refill:
    """The host's side of a refilled rollout: it adds prompts, grades groups that have ended, and decides when to end.

    All decisions follow from the completions, never from the clock, so that all processes of a run decide alike.
    """

    def __init__(
        self, running: ContinuousBatch, queue: Iterator[Prompt], batch_size: int, reward: Reward, tokenizer: Decoder
    ):
        self.running, self.queue, self.batch_size = running, queue, batch_size
        self.reward, self.tokenizer, self.sizes = reward, tokenizer, running.sizes
        self.prompts: list[Prompt] = []
        self.graded: dict[int, GradedRollout] = {}  # by the group's place in the queue
        self.signals: list[bool | None] = []
        self.waiting = 0

    def run(self) -> Refilled:
        """Runs to the end."""
        started, idle = time.perf_counter(), 0.0
        self._go_on()
        while True:
            progress = self.running.progress()
            self.waiting = int(progress.waiting)
            ended = self._ended(progress)
            # Where these groups cannot complete the batch, the devices go on while they are graded.
            ahead = self.signals.count(True) + len(ended) < self.batch_size
            ahead = ahead and len(self.graded) + len(ended) < self.sizes.prompts
            if ahead:
                self._go_on()
            before = time.perf_counter()
            self._grade(ended, progress)
            idle += 0.0 if ahead else time.perf_counter() - before
            chosen = choose(self.signals, self.batch_size, self.sizes.prompts)
            if chosen is not None:
                return self._result(*chosen, progress, time.perf_counter() - started - idle)
            if not ahead:
                self._go_on()

    def _go_on(self) -> None:
        """Starts the next part of decoding, with another chunk of prompts if more are wanted and none waits."""
        if not self.waiting and self._wants_more():
            prompts = list(islice(self.queue, self.sizes.chunk))
            if len(prompts) < self.sizes.chunk:
                count = len(self.prompts) + len(prompts)
                raise ValueError(f"the queue ended after {count} prompts, expected at least {self.sizes.prompts}")
            self.running.add(*pad_prompts(prompts, self.sizes.width))
            self.prompts += prompts
            self.signals += [None] * len(prompts)
        # A pool that has shrunk would be slow if many more were needed after all, so it shrinks a little later.
        self.running.advance(_STEPS, self._wants_more(), may_shrink=not self._wants_more(deviations=2.0))

    def _wants_more(self, deviations: float = 1.0) -> bool:
        """Whether the groups under way might not complete the batch, by estimates this many deviations below."""
        if len(self.prompts) == self.sizes.prompts:
            return False
        useful, pending = self.signals.count(True), len(self.prompts) - len(self.graded)
        rate = (useful + 1) / (len(self.graded) + 2)
        spread = math.sqrt(pending * rate * (1 - rate))  # standard deviation of the number of signals to come
        return useful + pending * rate - deviations * spread < self.batch_size

    def _ended(self, progress: Progress) -> list[int]:
        """The places of groups that have ended and are not graded."""
        lengths = progress.lengths.reshape(-1, self.sizes.samples)
        ended = np.flatnonzero((lengths > 0).all(axis=1)).tolist()
        return [place for place in ended if place not in self.graded]

    def _grade(self, places: Sequence[int], progress: Progress) -> None:
        """Grades groups that have ended."""
        if not places:
            return
        graded = grade(self._rollout(places, progress), self.reward, self.tokenizer)
        for index, place in enumerate(places):
            self.graded[place] = graded.groups([index])
            rewards = self.graded[place].rewards()
            self.signals[place] = bool((rewards != rewards[:, :1]).any())

    def _rollout(self, places: Sequence[int], progress: Progress, seconds: float = 0.0) -> Rollout:
        """The rollout of groups that have ended."""
        samples = self.sizes.samples
        rows = np.repeat(places, samples) * samples + np.tile(np.arange(samples), len(places))
        own = {name: getattr(progress, name)[rows] for name in ("tokens", "logprobs", "lengths", "stopped")}
        prompts = tuple(self.prompts[place] for place in places)
        completions = Completions(**own, slot_steps=progress.slot_steps)
        return Rollout(prompts, pad_prompts(prompts, self.sizes.width), completions, seconds)

    def _result(self, count: int, chosen: Sequence[int], progress: Progress, seconds: float) -> Refilled:
        """The result for a number of consumed groups and the places of the chosen ones."""
        groups = [self.graded[place] for place in range(count)]
        drawn = self._rollout(range(count), progress, seconds)
        consumed = GradedRollout(
            **{name: getattr(drawn, name) for name in ("prompts", "arrays", "completions", "seconds")},
            texts=tuple(text for group in groups for text in group.texts),
            grades=tuple(each for group in groups for each in group.grades),
            grading_seconds=sum(group.grading_seconds for group in groups),
            weights=groups[0].weights,
        )
        return Refilled(consumed.groups(chosen), consumed, len(self.prompts), int(progress.num_tokens))
