"""Completions and gold answers as no model and no person writes them: every one gets a grade, in time."""

from __future__ import annotations

import math
import time
from random import Random

from mutator import damaged_bytes

from tinylora_jax.rewards import Grade, RewardError, load_reward

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


def grade_something(seed: int, number: int, seconds: float) -> str | None:
    """Grades one made-up completion by each text grader; what is wrong, or None."""
    random = Random(f"{seed}/grader/{number}")
    completion = "".join(random.choice(_PIECES) for _ in range(random.randrange(1, 30)))
    if random.random() < 0.3:
        completion = damaged_bytes(random, completion.encode("utf-8", "replace")).decode("utf-8", "replace")
    gold = random.choice(_GOLDS)
    for name in ("hash", "boxed"):
        how = f"{name}, seed {seed}, case {number}: {completion!r:.300} against {gold!r}"
        started = time.monotonic()
        try:
            grade = load_reward(name)(completion, gold, "a question")
        except RewardError:
            continue
        except Exception as error:  # what it raised is the find
            return f"{how}: {type(error).__name__}: {error}"
        if not isinstance(grade, Grade) or not all(math.isfinite(x) for x in (grade.strict, grade.lenient)):
            return f"{how}: {grade}"
        if time.monotonic() - started > seconds:
            return f"{how}: took {time.monotonic() - started:.1f} s"
    return None
