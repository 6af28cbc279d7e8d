"""The result type and the error type of rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Protocol, TypeAlias, runtime_checkable


class RewardError(ValueError):
    """A reward cannot be loaded, failed, or did not return a finite number for a completion."""


@dataclass(frozen=True)
class Grade:
    """The grade of one completion.

    Attributes:
      strict: reward used in training, if it is the only one: for a right answer in the required format.
      lenient: reward for a right answer in any format; at least `strict` for the built-in graders.
      answer: extracted answer as written: the formatted one if there is one, else the last number.
      parts: strict grade by each of several rewards, in order; empty for one reward.
    """

    strict: float
    lenient: float
    answer: str | None = None
    parts: tuple[float, ...] = field(default=(), repr=False)

    def __post_init__(self):
        if not (is_finite(self.strict) and is_finite(self.lenient)):
            got = f"strict={shown(self.strict)}, lenient={shown(self.lenient)}"
            raise RewardError(f"a grade needs finite numbers of at most 1e6 in size, got {got}")


Reward: TypeAlias = Callable[[str, str, str], Grade]
"""Takes (completion, answer, question)."""


@runtime_checkable
class BatchReward(Protocol):
    """A reward that grades many completions in parallel."""

    def __call__(self, completion: str, answer: str, question: str = "", /) -> Grade:
        """Grades one completion."""

    def grade_all(self, completions: Sequence[str], answers: Sequence[str]) -> tuple[Grade, ...]:
        """Grades each completion against the answer at the same index."""


_LARGEST = 1e6  # squares of rewards must stay finite in float32


def is_finite(value: object) -> bool:
    """Whether a value is a number that training can use."""
    try:
        return isinstance(value, Real) and math.isfinite(value) and abs(value) <= _LARGEST
    except OverflowError:  # an integer or a fraction beyond the largest float
        return False


def shown(value: object) -> str:
    """Formats a value for a message."""
    # The repr of other objects may be long, or fail (as for integers with over 4300 digits).
    return f"{value!r:.80}" if isinstance(value, float | str | None) else f"an object of type {type(value).__name__}"
