"""Completions and gold answers as no model and no person writes them: every one gets a grade, in time."""

from __future__ import annotations

import math
import time
from random import Random

from mutator import damaged_bytes

from tinylora_jax.rewards import Grade, load_reward

_PIECES = (
    *("1", "72", "1,000", "-3", "0.5", "\\frac{1}{2}", "\\frac", "{", "}", "\\boxed{", "\\boxed{7}", "####", "#### 7"),
    *(
        " ",
        "\n",
        "x",
        "^",
        "^{99999999}",
        "9" * 400,
        "1e999",
        "(",
        ")",
        "[",
        "]",
        "\\infty",
        "\\sqrt{2}",
        "%",
        "$",
        "\\",
    ),
    *(
        "\\left(",
        "\\right)",
        "\\begin{pmatrix}",
        "\\cup",
        "=",
        "!",
        "!!!!",
        "/",
        "/0",
        "\\text{",
        "\u0664",
        "\ud7ff",
        "\x00",
    ),
)
_GOLDS = ("72", "1/2", "\\frac{1}{2}", "(1,2)", "x^2+1", "5\\%", "", "\\text{yes}", "10^{10^{10}}", "[0,\\infty)")


BY_TEXT, BY_ALGEBRA = ("hash", "boxed"), ("math", "minerva")


def made_up(random: Random) -> tuple[str, str]:
    """A completion that nobody would write, and a gold answer."""
    completion = "".join(random.choice(_PIECES) for _ in range(random.randrange(1, 30)))
    if random.random() < 0.3:
        completion = damaged_bytes(random, completion.encode("utf-8", "replace")).decode("utf-8", "replace")
    return completion, random.choice(_GOLDS)


def grade_something(seed: int, number: int, seconds: float, names: tuple[str, ...] = BY_TEXT) -> str | None:
    """Grades one made-up completion by the graders of these names; what is wrong, or None.

    The time is that of this process: algebra is done by workers, which have a limit of their own.
    """
    completion, gold = made_up(Random(f"{seed}/grader/{number}"))
    for name in names:
        how = f"{name}, seed {seed}, case {number}: {completion!r:.300} against {gold!r}"
        started = time.process_time()
        try:
            grade = load_reward(name)(completion, gold, "a question")
        except Exception as error:  # what it raised is the find
            return f"{how}: {type(error).__name__}: {error}"
        if not isinstance(grade, Grade) or not all(math.isfinite(x) for x in (grade.strict, grade.lenient)):
            return f"{how}: {grade}"
        if grade.lenient < grade.strict:
            return f"{how}: {grade} is stricter where it should be lenient"
        if time.process_time() - started > seconds:
            return f"{how}: took {time.process_time() - started:.1f} s"
    return None
