"""Rewards, which map a completion and the gold answer to a strict and a lenient grade.

Training uses `Grade.strict`: the right value in the required format. `Grade.lenient`, which also accepts the right
value as the last number of the text, is logged too. If the lenient score stays high while the strict one falls, the
format has collapsed, which a lenient grader alone would hide.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from tinylora_jax.extras import lacking
from tinylora_jax.rewards.answers import extract_boxed, extract_hash, extract_last_number, is_equal
from tinylora_jax.rewards.grade import BatchReward, Grade, Reward, RewardError
from tinylora_jax.rewards.math_reward import MathReward
from tinylora_jax.rewards.shaping import FormatReward, extract_any, relative_brevity
from tinylora_jax.rewards.user import Gradable, UserReward
from tinylora_jax.rewards.weighted import WeightedRewards, join, parse_weights


def grade_hash(completion: str, answer: str, question: str = "") -> Grade:
    """Grades the last `#### n`.

    >>> grade_hash("6 + 66 = 72\\n#### 72", "72")
    Grade(strict=1.0, lenient=1.0, answer='72')
    >>> grade_hash("The answer is **72**.", "72")
    Grade(strict=0.0, lenient=1.0, answer='72')
    """
    return _grade(extract_hash(completion), completion, answer)


def grade_boxed(completion: str, answer: str, question: str = "") -> Grade:
    r"""Grades the last `\boxed{...}`.

    >>> grade_boxed(r"It is \boxed{\frac{6}{4}}.", "1.5")
    Grade(strict=1.0, lenient=1.0, answer='\\frac{6}{4}')
    """
    return _grade(extract_boxed(completion), completion, answer)


@dataclass(frozen=True)
class BuiltIn:
    """A reward that is part of the library.

    Attributes:
      reward: reward function.
      ending: last line of a completion in its format; `{}` stands for the answer.
      marker: text before the answer; a prompt that asks for this format contains it.
      package: name of the optional module that the reward needs; empty if it needs none.
    """

    reward: Reward
    ending: str
    marker: str
    package: str = ""


_BOX = (r"\boxed{{{}}}", r"\boxed")
BUILT_IN: Mapping[str, BuiltIn] = MappingProxyType(
    {
        "hash": BuiltIn(grade_hash, "#### {}", "####"),
        "boxed": BuiltIn(grade_boxed, *_BOX),
        "math": BuiltIn(MathReward(), *_BOX, "math_verify"),
        "minerva": BuiltIn(MathReward(relative=0.01), *_BOX, "math_verify"),
    }
)
"""The built-in rewards by name. A new one needs only a line here."""
SHAPING = ("format", "length")
"""The names of rewards that are meant to be added to another one."""
_MODULE_FUNCTION = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")


def load_reward(name: str) -> Reward:
    """Finds a reward by name, or several with weights: `math:1,format:0.1,my_rewards:short:0.05`.

    The functions that a name `module:function` can refer to get three positional arguments. The names of the first two
    say what these are:

    | parameters | called with | returns |
    |---|---|---|
    | completion, answer, question | texts, for one completion at a time | a number or a `Grade` |
    | completions, answer, question | all completions of one prompt | one of them per completion |
    | completions, answers, questions | equally long lists of texts | one of them per completion |

    The calls of an `async` function run concurrently. A function must be deterministic.

    Args:
      name: name of the reward: `hash` (`#### n`); `boxed`, compared as text and number; `math`, boxed and compared by
        algebra; `minerva`, the same with a tolerance of 1 % for numbers (see `MathReward`); `format`, 1 for an answer
        in the format of the first reward; `length`, see `relative_brevity`; or `module:function`, imported from the
        Python path. Several names are separated by commas. A weight may follow each name, and is 1 by default.

    Returns:
      The reward function; `WeightedRewards` for several names. The first one measures accuracy.

    Raises:
      RewardError: a name is unknown, its module cannot be imported, the module has no such function, or a weight is
        invalid.
    """
    weights = parse_weights(name) if name else {name: 1.0}
    first = next(iter(weights))
    rewards = {part: _load_one(part, first) for part in weights}
    if list(weights.values()) == [1.0]:
        return rewards[first]
    return WeightedRewards(MappingProxyType(rewards), MappingProxyType(weights))


def _load_one(name: str, first: str) -> Reward:
    """Finds one reward; `first` is the name of the first of several."""
    if name == "format":
        marker = BUILT_IN[first].marker if first in BUILT_IN else ""
        return FormatReward({"####": extract_hash, "\\boxed": extract_boxed}.get(marker, extract_any))
    if name == "length":
        return UserReward(name, relative_brevity, "group")
    if name in BUILT_IN:
        package = BUILT_IN[name].package
        if package and importlib.util.find_spec(package) is None:
            raise RewardError(f"reward {name!r}: {lacking('math-verify', 'eval')}")
        return BUILT_IN[name].reward
    if not _MODULE_FUNCTION.fullmatch(name):
        close = difflib.get_close_matches(name, (*BUILT_IN, *SHAPING), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        if "/" in name:  # ./my_rewards:f
            hint = "; name the module without its folder, which is the current one or on PYTHONPATH"
        elif name.count(":") == 2:  # my_rewards:f:high
            hint = f"; a weight is a finite number, not {name.rpartition(':')[2]!r}"
        expected = f"{', '.join((*BUILT_IN, *SHAPING))} or module:function"
        raise RewardError(f"unknown reward {name!r}: expected {expected}{hint}")
    module_name, function_name = name.split(":")
    as_weight = f"if {function_name} is meant as a weight, write a finite number, such as {module_name}:0.5"
    as_weight = as_weight if module_name in (*BUILT_IN, *SHAPING) else ""
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:  # importing runs the user's code, which may raise anything, including SystemExit
        problem = f"{type(error).__name__}: {error}"
        advice = "its folder must be the current folder or on PYTHONPATH"
        if module_name.endswith(".py"):
            advice = f"write {module_name.removesuffix('.py')}:{function_name}, without `.py`"
        raise RewardError(f"reward {name}: cannot import {module_name} ({problem}); {as_weight or advice}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "it is not callable" if hasattr(module, function_name) else "there is no such function"
        close = difflib.get_close_matches(function_name, dir(module), n=1)
        hint = f"; did you mean {module_name}:{close[0]}?" if close and function is None else ""
        hint = f"; {as_weight}" if as_weight else hint  # `math:x` finds Python's own module
        raise RewardError(f"reward {name}: {found} in {getattr(module, '__file__', None) or module_name}{hint}")
    return UserReward.of(name, function)


def grade_batch(
    reward: Reward, completions: Sequence[str], prompts: Sequence[Gradable], samples: int = 1
) -> tuple[Grade, ...]:
    """Grades each completion against its prompt.

    Args:
      reward: reward function from `load_reward`.
      completions: completions, decoded without special tokens.
      prompts: prompt of each completion, in the same order; a group's prompt is repeated for each sample.
      samples: number of consecutive completions that form the group of one prompt.

    Returns:
      One grade per completion, in order.

    Raises:
      RewardError: the reward failed; the message names the question, or says that a whole batch was graded.
      ValueError: the counts differ.
    """
    if len(completions) != len(prompts) or len(completions) % samples:
        counts = f"{len(completions)} completions for {len(prompts)} prompts in groups of {samples}"
        raise ValueError(f"{counts}; repeat each prompt once per sample")
    if isinstance(reward, WeightedRewards):
        graded = [grade_batch(part, completions, prompts, samples) for part in reward.rewards.values()]
        return tuple(join(grades) for grades in zip(*graded, strict=True))
    if isinstance(reward, UserReward):
        return reward.grade_groups(completions, prompts, samples)
    if isinstance(reward, BatchReward):
        return reward.grade_all(completions, [prompt.answer for prompt in prompts])
    grades = []
    for index, (completion, prompt) in enumerate(zip(completions, prompts, strict=True)):
        try:
            grades.append(reward(completion, prompt.answer, prompt.question))
        except RewardError as error:
            raise RewardError(f"completion {index}, question id {prompt.id}: {error}") from error.__cause__
    return tuple(grades)


def _grade(formatted: str | None, completion: str, gold: str) -> Grade:
    if is_equal(formatted, gold):
        return Grade(1.0, 1.0, formatted)
    last = extract_last_number(completion)
    return Grade(0.0, float(is_equal(last, gold)), last if formatted is None else formatted)
