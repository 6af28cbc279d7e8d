"""Several rewards with weights, such as `math:1,format:0.1`; the first one measures accuracy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tinylora_jax.rewards.grade import Grade, Reward, RewardError, is_finite

# A weight starts like a number, and the name of a function cannot: `my_rewards:nan` is a function.
_WEIGHTED = re.compile(r"(.*):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


@dataclass(frozen=True)
class WeightedRewards:
    """Several rewards. Their grades are those of the first one, with the strict grade of every reward in `parts`.

    Attributes:
      rewards: reward functions by name, in order; the first one measures accuracy.
      weights: weights of the rewards in training, by name.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]

    @property
    def accuracy(self) -> Reward:
        """The first reward."""
        return next(iter(self.rewards.values()))

    def __call__(self, completion: str, answer: str, question: str = "") -> Grade:
        """Grades one completion by every reward."""
        return join([reward(completion, answer, question) for reward in self.rewards.values()])


def join(grades: Sequence[Grade]) -> Grade:
    """The grade of one completion by several rewards."""
    return Grade(grades[0].strict, grades[0].lenient, grades[0].answer, tuple(grade.strict for grade in grades))


def accuracy_of(reward: Reward) -> Reward:
    """The reward that measures accuracy: the first of several, or the reward itself."""
    return reward.accuracy if isinstance(reward, WeightedRewards) else reward


def accuracy_name(text: str) -> str:
    """The name of the reward that measures accuracy.

    >>> accuracy_name("math:1,format:0.1"), accuracy_name("my_rewards:short")
    ('math', 'my_rewards:short')
    """
    return _split(text.partition(",")[0])[0]


def parse_weights(text: str) -> dict[str, float]:
    """Parses names with optional weights, which are 1 by default.

    Raises:
      RewardError: a part is empty or repeated, a weight is too large, or all weights are 0.

    >>> parse_weights("math:1,format:.1,my_rewards:short:5e-2,hash")
    {'math': 1.0, 'format': 0.1, 'my_rewards:short': 0.05, 'hash': 1.0}
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, weight = _split(part)
        if not name:
            raise RewardError(f"reward {text!r} has an empty part; expected name or name:weight, separated by commas")
        if name in weights:
            raise RewardError(f"reward {text!r} names {name} twice; give it one weight")
        if not is_finite(weight):
            raise RewardError(f"reward {text!r}: the weight of {name} is {weight:g}, expected at most 1e6 in size")
        weights[name] = weight
    if not any(weights.values()):
        raise RewardError(f"reward {text!r} has no weight other than 0, so nothing would be trained")
    return weights


def _split(part: str) -> tuple[str, float]:
    weighted = _WEIGHTED.fullmatch(part.strip())
    return (weighted[1].strip(), float(weighted[2])) if weighted else (part.strip(), 1.0)
