"""Calls a user's reward function for a completion, a group or a batch; it may be `async`."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tinylora_jax.rewards.grade import Grade, RewardError, is_finite, shown

_SHOWN = 80  # characters of a question in a message


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


class _Asked(NamedTuple):
    id: int
    question: str
    answer: str


class _Call(NamedTuple):
    """One call of the function, for `graded` completions; `place` and `question` name them in messages."""

    arguments: tuple[Any, ...]
    graded: int
    place: str
    question: str


@dataclass(frozen=True)
class UserReward:
    """Wraps a user's function as a `Reward`; failures and invalid results become one clear error.

    Attributes:
      name: name `module:function`, for messages.
      function: function that returns a `Grade`, or a number for both the strict and the lenient grade; for several
        completions, one of these per completion. The results of an `async` function are awaited concurrently.
      takes: arguments of the function: `completion` (completion, answer, question), `group` (all completions of one
        prompt, answer, question) or `batch` (completions, answers and questions of many prompts).
    """

    name: str
    function: Callable[..., object]
    takes: str = "completion"

    @classmethod
    def of(cls, name: str, function: Callable[..., object]) -> UserReward:
        """Wraps a function; its parameter names say what it takes.

        Raises:
          RewardError: it cannot be called with three positional arguments.
        """
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # a function written in C may have no signature
            return cls(name, function)
        try:
            first, second, _ = signature.bind("completion", "answer", "question").arguments
        except TypeError as error:
            expected = "expected three positional arguments: completion, answer, question"
            raise RewardError(f"reward {name} takes {signature}; {expected}") from error
        except ValueError:  # such as *arguments, whose names say nothing
            return cls(name, function)
        several = "batch" if second == "answers" else "group"
        return cls(name, function, several if first == "completions" else "completion")

    def __call__(self, completion: str, answer: str, question: str) -> Grade:
        """Grades one completion; a failure raises `RewardError`, which names the function and the question."""
        (call,) = self._calls([completion], [_Asked(0, question, answer)], 1)
        (grade,) = self._run([call._replace(place="")])
        return grade

    def grade_groups(self, completions: Sequence[str], prompts: Sequence[Gradable], samples: int) -> tuple[Grade, ...]:
        """Grades completions, of which each `samples` consecutive ones are the group of one prompt.

        Raises:
          RewardError: the function failed, or a result is invalid.
        """
        return self._run(self._calls(completions, prompts, samples))

    def _calls(self, completions: Sequence[str], prompts: Sequence[Gradable], samples: int) -> list[_Call]:
        if self.takes == "batch":
            columns = list(completions), [p.answer for p in prompts], [p.question for p in prompts]
            return [_Call(columns, len(completions), "", "")] if completions else []
        if self.takes == "group":
            firsts = range(0, len(completions), samples)
            group = lambda at: list(completions[at : at + samples])
            ask = lambda at, p: _Call((group(at), p.answer, p.question), samples, f"question id {p.id}: ", p.question)
            return [ask(at, prompts[at]) for at in firsts]
        return [
            _Call((text, p.answer, p.question), 1, f"completion {index}, question id {p.id}: ", p.question)
            for index, (text, p) in enumerate(zip(completions, prompts, strict=True))
        ]

    def _run(self, calls: Sequence[_Call]) -> tuple[Grade, ...]:
        function = self.function
        # An object may have an `async` method `__call__`.
        if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
            values = _in_a_loop(lambda: self._awaited(calls), self.name)
        else:
            values = []
            for call in calls:
                with self._reporting(call):
                    values.append(function(*call.arguments))
        return tuple(grade for call, value in zip(calls, values, strict=True) for grade in self._grades(call, value))

    async def _awaited(self, calls: Sequence[_Call]) -> list[object]:
        async def one(call: _Call) -> object:
            with self._reporting(call):
                return await self.function(*call.arguments)  # type: ignore[misc]

        return await asyncio.gather(*map(one, calls))

    @contextmanager
    def _reporting(self, call: _Call) -> Iterator[None]:
        """Context of a call of the user's code, which may raise anything."""
        try:
            yield
        except KeyboardInterrupt as error:  # raised by the user or by the code
            error.add_note(f"in reward {self.name}")
            raise
        except asyncio.CancelledError:  # another call failed
            raise
        except BaseException as error:  # SystemExit would end the run as if it had succeeded
            problem = f"raised {type(error).__name__}: {error!s:.200}"
            raise self._error(call, problem, "return 0.0 for completions that it cannot grade") from error

    def _grades(self, call: _Call, value: object) -> list[Grade]:
        """Checks the result of a call."""
        if self.takes == "completion":
            return [self._grade(call, value)]
        try:
            values = list(value)  # type: ignore[call-overload]
        except TypeError:
            values = []
        if len(values) != call.graded:
            found = f"{len(values)} value{'s' if len(values) > 1 else ''}" if values else shown(value)
            advice = f"return one number or Grade for each of the {call.graded} completions"
            raise self._error(call, f"returned {found}", advice)
        return [self._grade(call, each) for each in values]

    def _grade(self, call: _Call, value: object) -> Grade:
        if isinstance(value, Grade):
            return value
        if not is_finite(value):
            advice = "return a finite float of at most 1e6 in size, or a tinylora_jax.rewards.Grade"
            raise self._error(call, f"returned {shown(value)}", advice)
        return Grade(float(value), float(value))  # type: ignore[arg-type]

    def _error(self, call: _Call, problem: str, advice: str) -> RewardError:
        question = call.question if len(call.question) <= _SHOWN else f"{call.question[: _SHOWN - 3]}..."
        where = f" on question {question!r}" if self.takes != "batch" else f" for {call.graded} completions"
        return RewardError(f"{call.place}reward {self.name} {problem}{where}; {advice}")


def _in_a_loop(make: Callable[[], Any], name: str) -> list[object]:
    """Runs a coroutine to its end, in another thread if this one already runs a loop, as in a notebook."""
    try:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(make())
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: asyncio.run(make())).result()
    except asyncio.CancelledError as error:
        raise RewardError(f"reward {name} cancelled its own task; return 0.0 instead") from error
