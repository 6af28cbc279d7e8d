"""What a reward gives, and what it raises."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, TypeAlias, runtime_checkable


class RewardError(ValueError):
    """A reward that cannot be loaded, or that failed or returned no finite number on a completion."""


@dataclass(frozen=True)
class Grade:
    """The grade of one completion.

    Attributes:
      strict: the reward trained on: right answer in the required format.
      lenient: right answer in any format; at least as generous as `strict` for the built-in graders.
      answer: the answer found, as written: the formatted one if there is one, else the last number.
    """

    strict: float
    lenient: float
    answer: str | None = None

    def __post_init__(self):
        if not (is_finite(self.strict) and is_finite(self.lenient)):
            got = f"strict={shown(self.strict)}, lenient={shown(self.lenient)}"
            raise RewardError(f"a grade needs finite numbers of at most 1e6 in size, got {got}")


Reward: TypeAlias = Callable[[str, str, str], Grade]
"""Takes (completion, answer, question)."""


@runtime_checkable
class BatchReward(Protocol):
    """A reward that grades many completions at once, because it works in parallel."""

    def __call__(self, completion: str, answer: str, question: str = "", /) -> Grade:
        """Grades one completion."""

    def grade_all(self, completions: Sequence[str], answers: Sequence[str]) -> tuple[Grade, ...]:
        """Grades each completion against the answer of its place."""


_LARGEST = 1e6  # squares of rewards must stay finite in float32


def is_finite(value: object) -> bool:
    """Whether a value is a number that training can take."""
    try:
        return isinstance(value, Real) and math.isfinite(value) and abs(value) <= _LARGEST
    except OverflowError:  # an integer or a fraction beyond the largest float
        return False


def shown(value: object) -> str:
    """A value for a message."""
    # The repr of any other object may be long, or fail (that of an integer of over 4300 digits does).
    return f"{value!r:.80}" if isinstance(value, float | str | None) else f"an object of type {type(value).__name__}"
