r"""The reward `math`: the last `\boxed{}` must hold the right value, compared by algebra if needed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tinylora_jax.rewards.answers import extract_boxed, extract_last_number, is_equal
from tinylora_jax.rewards.equivalence import Gold, Known, compare, open_pairs, read_gold
from tinylora_jax.rewards.grade import Grade, RewardError
from tinylora_jax.rewards.latex import units_differ, value_of
from tinylora_jax.rewards.structure import Group, Node, read
from tinylora_jax.rewards.words import choices_equal
from tinylora_jax.rewards.workers import WorkerError, Workers

READ_CHARS = 2000
"""Number of last characters that math-verify searches if a completion has no right box."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MathReward:
    r"""Grades mathematical answers.

    Strict: the last `\boxed{}` holds the gold answer in any notation. Lists and sets are compared in any order, tuples,
    intervals and matrices part by part, expressions by algebra (SymPy). Lenient: the gold answer is the last number of
    the text, or the answer that math-verify finds in it. Algebra runs in worker processes. A comparison that exceeds
    its time or memory limit counts as wrong, and a warning is logged.

    Attributes:
      relative: tolerance of numbers relative to the gold answer.
      limit_s: limit per comparison, in seconds of processor time, so that a busy machine gives the same grades.
      memory_bytes: memory limit per comparison, in bytes.
      workers: number of worker processes; 0 for one per core, at most 8.
    """

    relative: float = 0.0
    limit_s: float = 2.0
    memory_bytes: int = 1 << 30
    workers: int = 0

    def __call__(self, completion: str, answer: str, question: str = "") -> Grade:
        """Grades one completion; `grade_all` is faster for many."""
        return self.grade_all([completion], [answer])[0]

    def grade_all(self, completions: Sequence[str], answers: Sequence[str]) -> tuple[Grade, ...]:
        """Grades each completion against the gold answer at the same index.

        Raises:
          RewardError: no worker can be started.
        """
        cases = [
            _Case(completion, read_gold(answer, self.relative), answer)
            for completion, answer in zip(completions, answers, strict=True)
        ]
        for case, known in self._known([case for case in cases if case.strict is None]):
            case.settle(known)
        searched = [case for case in cases if case.lenient is None]
        replies = self._ask([{"text": case.completion[-READ_CHARS:]} for case in searched])
        for case, reply in zip(searched, replies, strict=True):
            case.look_at(reply.get("found", ""))
        for case, known in self._known([case for case in searched if case.lenient is None]):
            case.lenient = case.compare(known)
        return tuple(Grade(float(bool(case.strict)), float(bool(case.lenient)), case.answer) for case in cases)

    def _known(self, cases: Sequence[_Case]) -> Iterator[tuple[_Case, Known]]:
        """The results of algebra for the pairs on which each case depends."""
        replies = self._ask(
            [{"pairs": c.pairs, "relative": float(c.gold.relative), "absolute": float(c.gold.absolute)} for c in cases]
        )
        for case, reply in zip(cases, replies, strict=True):
            yield case, dict(zip(case.pairs, reply.get("equal", ()), strict=False))

    def _ask(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        if not requests:
            return []
        try:
            replies = _workers(self.limit_s, self.memory_bytes, self.workers).run(requests)
        except WorkerError as error:
            raise RewardError(f"reward math cannot start its workers: {error}") from error
        failed = Counter(reply["failed"] for reply in replies if "failed" in reply)
        if failed:
            reasons = ", ".join(f"{count} for {reason}" for reason, count in failed.items())
            _log.warning(
                "%d of %d comparisons were aborted and count as wrong: %s", failed.total(), len(replies), reasons
            )
        return replies


@lru_cache(maxsize=8)
def _workers(limit_s: float, memory_bytes: int, count: int) -> Workers:
    return Workers(limit_s, memory_bytes, count)


class _Case:
    """A completion that is being graded; `strict` and `lenient` are None until they are known."""

    def __init__(self, completion: str, gold: Gold, answer: str):
        self.completion, self.gold = completion, gold
        boxed, last = extract_boxed(completion), extract_last_number(completion)
        self.answer = last if boxed is None else boxed
        self.several = isinstance(gold.node, Group) and gold.node.kind == "list"
        self.found: Node | None = read(boxed, self.several) if boxed else None
        self.strict: bool | None = False
        if boxed and not units_differ(answer, boxed):
            self.strict = (
                is_equal(boxed, answer) or choices_equal(answer, boxed) or compare(gold, read(boxed, self.several))
            )
        self.pairs = open_pairs(gold, self.found) if self.strict is None and self.found is not None else ()
        self.lenient: bool | None = True if self.strict or (last is not None and self._is(last)) else None
        both_numbers = _is_number(gold.node) and self.found is not None and _is_number(self.found)
        if self.strict is False and self.lenient is None and (both_numbers or not completion.strip()):
            self.lenient = False  # math-verify would read the same box

    def settle(self, known: Known) -> None:
        """Decides open comparisons with the workers' results."""
        self.strict = self.compare(known)
        self.lenient = self.lenient or self.strict or None

    def look_at(self, text: str) -> None:
        """Considers another text as the answer if there is no box, or no right one."""
        boxed, found = self.found, read(text, self.several)
        if self.several and isinstance(found, Group) and found.kind == "()":
            found = Group("list", found.parts)
        self.found = found
        self.lenient = bool(text) and found != boxed and compare(self.gold, found)
        self.pairs = open_pairs(self.gold, found) if self.lenient is None else ()

    def compare(self, known: Known) -> bool:
        """Whether the extracted answer is right, given the workers' results."""
        assert self.found is not None
        return compare(self.gold, self.found, known) is True

    def _is(self, number: str) -> bool:
        return compare(self.gold, read(number)) is True


def _is_number(node: Node) -> bool:
    return isinstance(node, str) and value_of(node) is not None
