r"""The reward `math`: the right value in the last `\boxed{}`, by algebra where text and numbers do not decide."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tinylora_jax.rewards.answers import extract_boxed, extract_last_number, is_equal
from tinylora_jax.rewards.equivalence import Gold, Group, Known, Node, compare, open_pairs, read, read_gold
from tinylora_jax.rewards.grade import Grade, RewardError
from tinylora_jax.rewards.latex import value_of
from tinylora_jax.rewards.workers import WorkerError, Workers

READ_CHARS = 2000
"""Of a completion without the right box, so many last characters are searched for an answer by math-verify."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MathReward:
    r"""Grades mathematical answers.

    Strict: the last `\boxed{}` holds the gold answer, written in any way: lists and sets in any order, tuples,
    intervals and matrices part by part, expressions by algebra (`math-verify`). Lenient: that value is the last number,
    or what math-verify takes for the answer of the text. Algebra is done in worker processes; what takes longer than
    the limit, or more memory, counts as wrong, and a warning is logged.

    Attributes:
      relative: tolerance of numbers, as a share of the gold answer.
      limit_s: processor time of one comparison, so that a busy machine gives the same grades.
      memory_bytes: of one comparison.
      workers: processes; 0 is one for each core, at most 8.
    """

    relative: float = 0.0
    limit_s: float = 3.0
    memory_bytes: int = 1 << 30
    workers: int = 0

    def __call__(self, completion: str, answer: str, question: str = "") -> Grade:
        """Grades one completion; many at once are quicker."""
        return self.grade_all([completion], [answer])[0]

    def grade_all(self, completions: Sequence[str], answers: Sequence[str]) -> tuple[Grade, ...]:
        """Grades each completion against the gold answer of its place.

        Raises:
          RewardError: no worker can be started.
        """
        cases = [
            _Case(completion, read_gold(answer, self.relative), answer)
            for completion, answer in zip(completions, answers, strict=True)
        ]
        unsure = [case for case in cases if case.strict is None]
        replies = self._ask([{"pairs": case.pairs} for case in unsure], unsure)
        for case, reply in zip(unsure, replies, strict=True):
            case.settle(dict(zip(case.pairs, reply.get("equal", ()), strict=False)))
        searched = [case for case in cases if case.lenient is None]
        replies = self._ask([{"gold": c.gold.text, "text": c.completion[-READ_CHARS:]} for c in searched], searched)
        for case, reply in zip(searched, replies, strict=True):
            case.lenient = reply.get("equal") == [True]
        return tuple(Grade(float(bool(case.strict)), float(bool(case.lenient)), case.answer) for case in cases)

    def _ask(self, requests: Sequence[Mapping[str, Any]], cases: Sequence[_Case]) -> list[dict[str, Any]]:
        if not requests:
            return []
        tolerances = [{"relative": float(c.gold.relative), "absolute": float(c.gold.absolute)} for c in cases]
        requests = [{**request, **tolerance} for request, tolerance in zip(requests, tolerances, strict=True)]
        try:
            replies = _workers(self.limit_s, self.memory_bytes, self.workers).run(requests)
        except WorkerError as error:
            raise RewardError(f"reward math cannot start its workers: {error}") from error
        failed = Counter(reply["failed"] for reply in replies if "failed" in reply)
        if failed:
            reasons = ", ".join(f"{count} for {reason}" for reason, count in failed.items())
            _log.warning(
                "%d of %d comparisons were given up and count as wrong: %s", failed.total(), len(replies), reasons
            )
        return replies


@lru_cache(maxsize=8)
def _workers(limit_s: float, memory_bytes: int, count: int) -> Workers:
    return Workers(limit_s, memory_bytes, count)


class _Case:
    """A completion on its way to a grade; `strict` and `lenient` are None until they are known."""

    def __init__(self, completion: str, gold: Gold, answer: str):
        self.completion, self.gold = completion, gold
        boxed, last = extract_boxed(completion), extract_last_number(completion)
        self.answer = last if boxed is None else boxed
        several = isinstance(gold.node, Group) and gold.node.kind == "list"
        self.found: Node | None = read(boxed, several) if boxed else None
        self.strict: bool | None = False
        if boxed:
            self.strict = is_equal(boxed, answer) or (None if self.found is None else compare(gold, self.found))
        self.pairs = open_pairs(gold, self.found) if self.strict is None and self.found is not None else ()
        self.lenient: bool | None = True if self.strict or (last is not None and self._is(last)) else None
        both_numbers = _is_number(gold.node) and self.found is not None and _is_number(self.found)
        if self.strict is False and self.lenient is None and (both_numbers or not completion.strip()):
            self.lenient = False  # math-verify would read the same box

    def settle(self, known: Known) -> None:
        """Decides what was open by what the workers said."""
        assert self.found is not None
        self.strict = compare(self.gold, self.found, known)
        self.lenient = self.lenient or self.strict or None

    def _is(self, number: str) -> bool:
        return compare(self.gold, read(number)) is True


def _is_number(node: Node) -> bool:
    return isinstance(node, str) and value_of(node) is not None
