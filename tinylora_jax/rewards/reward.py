"""Rewards, which map a completion and the gold answer to a strict and a lenient grade.

Training uses `Grade.strict`: the right value in the required format. `Grade.lenient`, which also accepts the right
value as the last number of the text, is logged too. If the lenient score stays high while the strict one falls, the
format has collapsed, which a lenient grader alone would hide.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from tinylora_jax.rewards.answers import extract_boxed, extract_hash, extract_last_number, is_equal
from tinylora_jax.rewards.grade import BatchReward, Grade, Reward, RewardError, is_finite, shown
from tinylora_jax.rewards.math_reward import MathReward


@runtime_checkable
class Gradable(Protocol):
    """The attributes of a prompt that grading needs, as in `tinylora_jax.data.Prompt` and `Question`."""

    @property
    def id(self) -> int:
        """The stable id of the question."""

    @property
    def question(self) -> str:
        """The text of the question."""

    @property
    def answer(self) -> str:
        """The gold answer."""


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
class UserReward:
    """Wraps a user's function as a `Reward`; failures and invalid results become one clear error.

    Attributes:
      name: name `module:function`, for messages.
      function: function of (completion, answer, question) that returns a `Grade`, or a number for both the strict and
        the lenient grade.
    """

    name: str
    function: Callable[..., object]

    def __call__(self, completion: str, answer: str, question: str) -> Grade:
        """Grades one completion; a failure raises `RewardError`, which names the function and the question."""
        asked = question if len(question) <= 80 else f"{question[:77]}..."
        try:
            value = self.function(completion, answer, question)
        except KeyboardInterrupt as error:  # raised by the user or by the code
            error.add_note(f"in reward {self.name}")
            raise
        except BaseException as error:  # SystemExit would end the run as if it had succeeded
            problem = f"raised {type(error).__name__}: {error!s:.200}"
            advice = "return 0.0 for completions that it cannot grade"
            raise RewardError(f"reward {self.name} {problem} on question {asked!r}; {advice}") from error
        if isinstance(value, Grade):
            return value
        if not is_finite(value):
            advice = "return a finite float of at most 1e6 in size, or a tinylora_jax.rewards.Grade"
            raise RewardError(f"reward {self.name} returned {shown(value)} on question {asked!r}; {advice}")
        return Grade(float(value), float(value))


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
_MODULE_FUNCTION = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")


def load_reward(name: str) -> Reward:
    """Finds a reward by name.

    Args:
      name: name of the reward: `hash` (`#### n`); `boxed`, compared as text and number; `math`, boxed and compared by
        algebra; `minerva`, the same with a tolerance of 1 % for numbers (see `MathReward`); or `module:function`,
        imported from the Python path. The function gets (completion, answer, question) as positional strings and
        returns a number or a `Grade`. It is called for one completion at a time and must be fast and deterministic.

    Returns:
      The reward function.

    Raises:
      RewardError: the name is unknown, its module cannot be imported, or the module has no such function.
    """
    if name in BUILT_IN:
        package = BUILT_IN[name].package
        if package and importlib.util.find_spec(package) is None:
            raise RewardError(
                f"reward {name!r} needs a package: pip install 'math-verify>=0.9' (or tinylora_jax's extra `eval`)"
            )
        return BUILT_IN[name].reward
    if not _MODULE_FUNCTION.fullmatch(name):
        close = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        if "/" in name:  # ./my_rewards:f
            hint = "; name the module without its folder, which is the current one or on PYTHONPATH"
        expected = f"{', '.join(BUILT_IN)} or module:function"
        raise RewardError(f"unknown reward {name!r}: expected {expected}{hint}")
    module_name, function_name = name.split(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:  # importing runs the user's code, which may raise anything, including SystemExit
        problem = f"{type(error).__name__}: {error}"
        advice = "its folder must be the current folder or on PYTHONPATH"
        if module_name.endswith(".py"):
            advice = f"write {module_name.removesuffix('.py')}:{function_name}, without `.py`"
        raise RewardError(f"reward {name}: cannot import {module_name} ({problem}); {advice}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "it is not callable" if hasattr(module, function_name) else "there is no such function"
        close = difflib.get_close_matches(function_name, dir(module), n=1)
        hint = f"; did you mean {module_name}:{close[0]}?" if close and function is None else ""
        raise RewardError(f"reward {name}: {found} in {module.__file__ or module_name}{hint}")
    _check_signature(name, function)
    return UserReward(name, function)


def _check_signature(name: str, function: Callable[..., object]) -> None:
    """Refuses a function that cannot be called with (completion, answer, question), before a model is loaded."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function written in C may have no signature
        return
    try:
        signature.bind("completion", "answer", "question")
    except TypeError as error:
        raise RewardError(
            f"reward {name} takes {signature}; expected three positional arguments: completion, answer, question"
        ) from error


def grade_batch(reward: Reward, completions: Sequence[str], prompts: Sequence[Gradable]) -> tuple[Grade, ...]:
    """Grades each completion against its prompt.

    Args:
      reward: reward function from `load_reward`.
      completions: completions, decoded without special tokens.
      prompts: prompt of each completion, in the same order; a group's prompt is repeated for each sample.

    Returns:
      One grade per completion, in order.

    Raises:
      RewardError: the reward failed; the message gives the completion's index and the question's id.
      ValueError: the counts differ.
    """
    if len(completions) != len(prompts):
        counts = f"{len(completions)} completions for {len(prompts)} prompts"
        raise ValueError(f"{counts}; repeat each prompt once per sample")
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
