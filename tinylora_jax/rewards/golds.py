r"""Finds gold answers that a reward can never accept, by grading each against itself in its format."""

from __future__ import annotations

from collections.abc import Sequence

from tinylora_jax.rewards.answers import normalize
from tinylora_jax.rewards.grade import BatchReward
from tinylora_jax.rewards.reward import BUILT_IN, load_reward
from tinylora_jax.rewards.weighted import accuracy_name


def unpayable(reward: str, answers: Sequence[str]) -> tuple[int, ...]:
    """Finds the gold answers that no completion can match, even by repeating them verbatim.

    One example is `5/2` under `hash`, whose format allows only plain numbers. With many of these, a run stays at 0 %.

    Args:
      reward: name of the reward, see `load_reward`; of several, the first. A user's function has an unknown format and
        is not checked.
      answers: gold answers to check.

    Returns:
      Indices into `answers`, in order.

    Raises:
      RewardError: the reward cannot be loaded.

    >>> unpayable("hash", ["72", "5/2", "yes", "$1,000", "9 (apples)"]), unpayable("boxed", ["5/2", "yes"])
    ((1, 2), ())
    """
    reward = accuracy_name(reward)
    if reward not in BUILT_IN:
        return ()
    distinct = [*dict.fromkeys(answers)]
    unpaid = [*_unpaid(reward, distinct, distinct)]
    # `$1,000` is written as 1000; but a ratio, which `normalize` may write as a decimal, is graded verbatim.
    plain = [gold for gold in unpaid if "/" not in gold and "frac" not in gold]
    failed = {*unpaid} - {*plain} | _unpaid(reward, [normalize(gold) for gold in plain], plain)
    return tuple(place for place, answer in enumerate(answers) if answer in failed)


def _unpaid(name: str, written: Sequence[str], golds: Sequence[str]) -> set[str]:
    """The gold answers that get no reward for the written answers."""
    reward, completions = load_reward(name), [BUILT_IN[name].ending.format(each) for each in written]
    if isinstance(reward, BatchReward):
        grades = reward.grade_all(completions, golds)
    else:
        grades = tuple(reward(*pair, "") for pair in zip(completions, golds, strict=True))
    return {gold for gold, grade in zip(golds, grades, strict=True) if not grade.strict}
