"""Rewards for the format and the length of completions, to add to a reward for the right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinylora_jax.rewards.answers import extract_boxed, extract_hash
from tinylora_jax.rewards.grade import Grade


@dataclass(frozen=True)
class FormatReward:
    r"""Gives 1 for an answer in the required format, right or wrong.

    Attributes:
      extract: function from a completion to the formatted answer, or None; `extract_hash` or `extract_boxed`.
    """

    extract: Callable[[str], str | None]

    def __call__(self, completion: str, answer: str = "", question: str = "") -> Grade:
        """Grades one completion.

        >>> FormatReward(extract_hash)("#### 5").strict, FormatReward(extract_hash)("five").strict
        (1.0, 0.0)
        """
        found = float(bool(self.extract(completion)))
        return Grade(found, found)


def extract_any(completion: str) -> str | None:
    """The answer after `####`, or else in a box."""
    return extract_hash(completion) or extract_boxed(completion)


def relative_brevity(completions: Sequence[str], answer: str = "", question: str = "") -> list[float]:
    """Computes ½ − (l − l_min) / (l_max − l_min) with the lengths l of a group, in characters (arXiv 2501.12599).

    The paper gives wrong answers at most 0; add the reward to one of accuracy with a small weight instead.

    Args:
      completions: all completions of one prompt.
      answer: gold answer, which does not matter.
      question: question, which does not matter.

    Returns:
      The reward of each completion; 0 if all are equally long.

    >>> relative_brevity(["1234", "12", "123"])
    [-0.5, 0.5, 0.0]
    """
    lengths = [len(completion) for completion in completions]
    shortest, spread = min(lengths), max(lengths) - min(lengths)
    return [0.5 - (length - shortest) / spread if spread else 0.0 for length in lengths]
