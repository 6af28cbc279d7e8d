r"""A program that compares mathematical answers by algebra (`math-verify`, SymPy), one JSON object a line.

    {"id": 3, "pairs": [["\\sqrt{8}", "2\\sqrt{2}"]], "relative": 0, "absolute": 0}   ->  {"id": 3, "equal": [true]}
    {"id": 4, "gold": "2", "text": "so the answer is 2.", "relative": 0, "absolute": 0}  ->  {"id": 4, "equal": [true]}

It is started by its path, so that it imports neither JAX nor this package, and is never imported. What it is asked may
take forever (9^{9^{9^9}}) or all memory, within code that no Python signal handler interrupts. So every request is
answered by a forked child, which the kernel ends at a limit of processor time and whose memory is bounded; what is left
is this process, in which nothing happened: {"id": 3, "failed": "time"}. A fork costs milliseconds, a new start seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import resource
import signal
import sys

_APPROXIMATION = 2e-6  # what a decimal may miss an exact number by: 0.333333 is 1/3
_IMAGINARY = re.compile(r"(?<![\\A-Za-z{])i(?![A-Za-z])")
WALL_FACTOR = 4  # a child that waits, for memory or a busy machine, has so many times its limit
_INDEXED_E = re.compile(r"(?<![\\A-Za-z])E\s?_")
_WARM_UP = (
    r"\frac{1}{2}+\sqrt{3} \pi",
    r"(x+1)^2-\cos 2x",
    r"3x^2 \ge 5",
    "f(x)=2x",
    r"e^{i \pi}\log_2 8",
    "0.5",
    r"\binom{n}{2}",
)


def serve(limit_s: float, memory_bytes: int) -> None:
    """Answers requests from stdin until it is closed."""
    for gold, found in zip(
        _WARM_UP, reversed(_WARM_UP), strict=True
    ):  # what SymPy loads late, it loads before the fork
        _equal(gold, found, 0.0, 0.0)
        _equal(gold, gold + "+0", 0.0, 0.0)
        _found_in(gold, f"The final answer is ${found}$.", 0.0, 0.0)
    _reply({"ready": os.getpid()})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _answer(request, limit_s, memory_bytes)
        _, status = os.waitpid(child, 0)
        if status != 0:
            timed_out = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
            _reply({"id": request["id"], "failed": "time" if timed_out else "memory"})


def _answer(request: dict, limit_s: float, memory_bytes: int) -> None:
    """Answers one request in a child, which ends here."""
    code = 1
    try:
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)  # the kernel ends the process, in C code as well
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * limit_s)
        for kind, most in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
            with contextlib.suppress(ValueError, OSError):  # macOS has no limit of the address space
                resource.setrlimit(kind, (most, most))
        tolerances = request["relative"], request["absolute"]
        if "pairs" in request:
            equal = [_equal(*pair, *tolerances) for pair in request["pairs"]]
        else:
            equal = [_found_in(request["gold"], request["text"], *tolerances)]
        _reply({"id": request["id"], "equal": equal})
        code = 0
    except (MemoryError, RecursionError):
        pass
    finally:
        os._exit(code)


def _reply(message: dict) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")  # one write, shorter than a pipe's buffer


def _parse(latex: str) -> list:
    from math_verify import LatexExtractionConfig, parse

    # With its other ways to find an answer it would take a part for the whole. Of 274i and 274 i, it would take one for
    # a variable; an E with an index, for Euler's number and no expression.
    latex = _INDEXED_E.sub(r"\\Xi_", _IMAGINARY.sub(" i ", latex)).replace(r"\hbar", r"\eta")
    return parse(f"${latex}$", extraction_config=(LatexExtractionConfig(),), parsing_timeout=None)[:1]


def _equal(gold: str, found: str, relative: float, absolute: float) -> bool:
    """Whether two atoms are equal."""
    parsed = _parse(gold), _parse(found)
    return all(parsed) and _same(parsed[0][0], parsed[1][0], relative, absolute)


def _found_in(gold: str, text: str, relative: float, absolute: float) -> bool:
    """Whether what math-verify takes for the answer of a text is the gold answer."""
    from math_verify import parse

    wanted = _parse(gold)
    return (
        any(_same(wanted[0], each, relative, absolute) for each in parse(text, parsing_timeout=None))
        if wanted
        else False
    )


def _same(gold, found, relative: float, absolute: float) -> bool:
    from math_verify import verify
    from sympy import Expr, Float

    if isinstance(gold, Expr) and isinstance(found, Expr):
        wanted, value = _number(gold), _number(found)
        decimals = [each.has(Float) for each in (gold, found)]
        if wanted is not None and value is not None and (any(decimals) or relative or absolute):
            # math-verify rounds decimals to six places, where all small numbers are zero.
            exact = not any(decimals) or all(decimals) or gold.is_Integer
            share = max(relative, 1e-12 if exact else _APPROXIMATION)
            near = bool(abs(wanted - value) <= max(absolute, abs(wanted) * share))
            if near or any(decimals):
                return near
    return bool(verify(gold, found, timeout_seconds=None))


def _number(expression):
    """The value of a constant expression, to 20 digits; None if it has variables or none."""
    if expression.free_symbols:
        return None
    try:
        value = expression.doit().evalf(20)
        return value if value.is_finite and value.is_number else None
    except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError):
        return None


def main() -> None:
    """Serves with the limits of the command line: seconds of processor time, bytes of memory."""
    logging.disable(logging.CRITICAL)
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        _reply({"error": str(error)})
        return
    serve(float(sys.argv[1]), int(sys.argv[2]))


if __name__ == "__main__":
    main()
