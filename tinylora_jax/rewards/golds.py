r"""Gold answers that a reward can never pay: each is graded against itself, in the reward's own format."""

from __future__ import annotations

from collections.abc import Sequence

from tinylora_jax.rewards.answers import normalize
from tinylora_jax.rewards.grade import BatchReward
from tinylora_jax.rewards.reward import BUILT_IN, load_reward


def unpayable(reward: str, answers: Sequence[str]) -> tuple[int, ...]:
    """Finds the gold answers that a completion cannot match, even by giving them as they are.

    A gold of `5/2` under `hash` is such: the format has plain numbers alone. A run with many of them is flat at 0 %.

    Args:
      reward: a name, see `load_reward`. A user's function has a format of its own, so nothing is said of it.
      answers: gold answers.

    Returns:
      Places in `answers`, in order.

    Raises:
      RewardError: the reward cannot be loaded.

    >>> unpayable("hash", ["72", "5/2", "yes", "$1,000", "9 (apples)"]), unpayable("boxed", ["5/2", "yes"])
    ((1, 2), ())
    """
    if reward not in BUILT_IN:
        return ()
    distinct = [*dict.fromkeys(answers)]
    unpaid = [*_unpaid(reward, distinct, distinct)]
    # `$1,000` stands for 1000; but a ratio, which `normalize` may write as a decimal, is graded as it stands.
    plain = [gold for gold in unpaid if "/" not in gold and "frac" not in gold]
    failed = {*unpaid} - {*plain} | _unpaid(reward, [normalize(gold) for gold in plain], plain)
    return tuple(place for place, answer in enumerate(answers) if answer in failed)


def _unpaid(name: str, written: Sequence[str], golds: Sequence[str]) -> set[str]:
    """The golds that are not paid for what is written."""
    reward, completions = load_reward(name), [BUILT_IN[name].ending.format(each) for each in written]
    if isinstance(reward, BatchReward):
        grades = reward.grade_all(completions, golds)
    else:
        grades = tuple(reward(*pair, "") for pair in zip(completions, golds, strict=True))
    return {gold for gold, grade in zip(golds, grades, strict=True) if not grade.strict}
