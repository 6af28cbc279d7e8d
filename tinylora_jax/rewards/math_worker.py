r"""A program that compares mathematical answers by algebra (SymPy), with one JSON object per line.

    {"id": 3, "pairs": [["\\sqrt{8}", "2\\sqrt{2}"]], "relative": 0, "absolute": 0}   ->  {"id": 3, "equal": [true]}
    {"id": 4, "text": "so the answer is 2."}   ->  {"id": 4, "found": "2"}

It is started by its path and never imported, so that it loads neither JAX nor this package. A request may take forever
(9^{9^{9^9}}) or use all memory, inside code that no Python signal handler can interrupt. So a forked child answers
every request. The kernel kills it at a limit of processor time, and its memory is bounded. This process is unaffected
and replies {"id": 3, "failed": "time"}. A fork costs milliseconds; a new process would cost seconds.
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

_APPROXIMATION = 2e-6  # error allowed for a decimal in place of an exact number: 0.333333 is 1/3
_ROUNDING = 1e-11  # rounding error of doubles over a few operations, for expressions with decimals
_DIGITS, _EXACT = 50, 1e-35  # for expressions without decimals; x + 10^{12} is not x + 10^{12} + 1
_AGREEING = 3  # number of points at which two equal functions must agree
# Points: signs of the coordinates, and divisors of the primes; floors need large values, powers small ones.
_SIGNS = (0b000, 0b111, 0b001, 0b000, 0b110, 0b101)
_SCALES = (29, 7, 31, 3, 37, 11)
_PRIMES = (17, 41, 23, 61, 31, 53, 19, 47, 37, 67, 43, 59)
_IMAGINARY = re.compile(r"(?<![\\A-Za-z])i(?![A-Za-z])")
_INDEX_I = re.compile(r"_\s?\{?\s?i|i\s?=")
_APART = re.compile(r"(?<![_^])(?<![A-Za-z])[0-9.]\s+[0-9.]")
_BASED = re.compile(r"(?<![_A-Za-z0-9.])[0-9.]++\s?_")
_TWICE = re.compile(r"!\s?!")
_DECIMAL = re.compile(r"[-+]?[0-9]*+\.([0-9]*+)")
_RESPELLED = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<![\\A-Za-z])E\s?_", r"\\Xi_"),  # with an index, E would be read as Euler's number
        (r"\\hbar(?![A-Za-z])", r"\\eta "),
        (r"\\gamma(?![A-Za-z])", r"\\text{lower gamma} "),  # would be read as Euler's constant
        (r"\\Gamma(?![A-Za-z])", r"\\text{upper gamma} "),
        (r"(?<![\\A-Za-z])([A-Za-z])''", r"\\text{\1 second}"),  # primes would be dropped
        (r"(?<![\\A-Za-z])([A-Za-z])'", r"\\text{\1 prime}"),
        (r"\\frac\s?([0-9]|(?<=\s)[A-Za-z])\s?([0-9](?![0-9])|[A-Za-z])", r"\\frac{\1}{\2}"),
        (r"\\frac\s?([0-9]|(?<=\s)[A-Za-z])\s?\{", r"\\frac{\1}{"),
        (r"(\\frac\s?\{[^{}]*+\})\s?([0-9](?![0-9])|[A-Za-z])", r"\1{\2}"),
        (r"\\sqrt\s?([0-9A-Za-z])(?![0-9])", r"\\sqrt{\1}"),
        (r"\\binom\s?([0-9])\s?([0-9])", r"\\binom{\1}{\2}"),
        (r"\{?\s?([0-9A-Za-z]++)\s?\\choose\s?([0-9A-Za-z]++)\s?\}?", r"\\binom{\1}{\2}"),
        (r"(?<![\^_0-9.])([0-9]++)\s?(\\frac\{[0-9]++\}\{[0-9]++\})", r"(\1+\2)"),  # a mixed number
        (r"\*\*", "^"),
        (r"\^\s?\(([^()]*+)\)", r"^{\1}"),
    )
)
_COMMAND_OR_I = re.compile(r"(\\(?:text|begin|end)\s?\{[^{}]*+\}|\\[A-Za-z]++)|I")
MAX_FOUND_CHARS = 2000
WALL_FACTOR = 4  # wall-clock limit as a multiple of the time limit, for a child that waits for memory or a busy machine
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
    import mpmath

    mpmath.mp.dps = _DIGITS + 10
    for gold, found in zip(
        _WARM_UP, reversed(_WARM_UP), strict=True
    ):  # makes SymPy load its lazy modules before the fork
        _equal(gold, found, 0.0, 0.0)
        _equal(gold, gold + "+0", 0.0, 0.0)
        _found_in(f"The final answer is ${found}$.")
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
    """Answers one request in a child process, which exits here."""
    code = 1
    try:
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)  # the kernel kills the process, even inside C code
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * limit_s)
        for kind, most in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
            with contextlib.suppress(ValueError, OSError):  # macOS has no address-space limit
                resource.setrlimit(kind, (most, most))
        if "pairs" in request:
            tolerances = request["relative"], request["absolute"]
            reply = {"equal": [_equal(*pair, *tolerances) for pair in request["pairs"]]}
        else:
            reply = {"found": _found_in(request["text"])[:MAX_FOUND_CHARS]}
        _reply({"id": request["id"], **reply})
        code = 0
    except (MemoryError, RecursionError):
        pass
    finally:
        os._exit(code)


def _reply(message: dict) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")  # one write, shorter than a pipe's buffer


def _parse(latex: str):
    """Parses an expression, with upper and lower case as different symbols; None if any part cannot be read."""
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
    from sympy import I, Symbol

    # The converter would read 1 2 as 1 + 2, 12_5 as 12, and the double factorial as the factorial of a factorial.
    if _APART.search(latex) or _BASED.search(latex) or _TWICE.search(latex):
        return None
    is_complex = _IMAGINARY.search(latex) is not None and not _INDEX_I.search(latex)
    if is_complex:
        latex = _IMAGINARY.sub(r" \\text{i} ", latex)
    for pattern, replacement in _RESPELLED:
        latex = pattern.sub(replacement, latex)
    latex = _COMMAND_OR_I.sub(lambda match: match[1] or r"\text{upper i} ", latex)  # I would be the imaginary unit
    # The converter's removal of units treats the last letter of `5t` as a unit.
    latex = normalize_latex(latex, NormalizationConfig(boxed="none", units=False, malformed_operators=False))
    try:
        expression = latex2sympy(
            latex,
            is_real=None if is_complex else True,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
        return expression.subs(Symbol("i"), I) if is_complex else expression
    except (MemoryError, RecursionError):
        raise
    except Exception:  # the converter raises bare exceptions for what it cannot read
        return None


def _equal(gold: str, found: str, relative: float, absolute: float) -> bool:
    """Whether two atoms are equal."""
    wanted, value = _parse(gold), _parse(found)
    if wanted is None or value is None:
        return False
    try:
        if not relative and not absolute and not (_stands_for(found, wanted) and _stands_for(gold, value)):
            return False
        return _same(wanted, value, relative, absolute)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # SymPy may raise anything for malformed input
        return False


def _stands_for(written: str, value) -> bool:
    """Whether a decimal is a value truncated or rounded at its last digit; True for text that is not a decimal."""
    from sympy import Float, Rational

    decimal = _DECIMAL.fullmatch(written.strip())
    number = _number(value, _DIGITS) if decimal else None
    if number is None or not number.is_real or value.has(Float):
        return True
    places, given = len(decimal[1].rstrip("0")), Rational(written.strip())
    gap, parts = abs(number - given), 1 if abs(given) < abs(number) else 2
    return bool(gap <= abs(number) * _EXACT or (places and gap <= Rational(1, parts * 10**places)))


def _found_in(text: str) -> str:
    """The answer that math-verify finds in a text, as written; empty if it finds none."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    latex = LatexExtractionConfig(normalization_config=NormalizationConfig(boxed="last"))
    found = parse(text, extraction_config=(latex, ExprExtractionConfig()), parsing_timeout=None)
    return next((each for each in found[::-1] if isinstance(each, str)), "")


def _same(gold, found, relative: float = 0.0, absolute: float = 0.0) -> bool:
    """Whether two SymPy objects are equal; objects of different kinds never are: `x + 1 = 3` is not 3."""
    from sympy import Expr, FiniteSet, MatrixBase, Tuple
    from sympy.core.relational import Relational

    if isinstance(gold, MatrixBase) and isinstance(found, MatrixBase):
        return gold.shape == found.shape and all(map(_same, gold.flat(), found.flat()))
    if isinstance(gold, Relational) and isinstance(found, Relational):
        return _same_relations(gold, found)
    if isinstance(gold, Expr) and isinstance(found, Expr):
        return _same_expressions(gold, found, relative, absolute)
    if isinstance(gold, Tuple) and isinstance(found, Tuple):
        return len(gold) == len(found) and all(map(_same, gold, found))
    if isinstance(gold, FiniteSet) and isinstance(found, FiniteSet):
        left, right = list(gold.args), list(found.args)
        return len(left) == len(right) and all(any(_same(each, other) for other in right) for each in left)
    if _is_chain(gold) and _is_chain(found):
        pairs = list(zip(gold._unsorted_args, found._unsorted_args, strict=False))
        same_length = len(gold._unsorted_args) == len(found._unsorted_args)
        return same_length and all(_same_relations(*pair) for pair in pairs)
    return type(gold) is type(found) and bool(gold == found)


def _is_chain(expression) -> bool:
    """Whether an expression is a chain of relations, such as a < b < c."""
    from sympy.core.relational import Relational

    parts = getattr(expression, "_unsorted_args", ())
    return bool(parts) and all(isinstance(part, Relational) for part in parts)


def _same_relations(gold, found) -> bool:
    """Whether one relation is a constant multiple of the other, or both have the same solutions in every variable."""
    from sympy import Eq, Ne, solve

    left, right = _exact(gold.lhs - gold.rhs), _exact(found.lhs - found.rhs)
    if gold.rel_op != found.rel_op:
        if found.reversed.rel_op != gold.rel_op:
            return False
        right = -right
    symbols = left.free_symbols
    if not symbols or symbols != right.free_symbols:
        return False
    if left.has(_undefined()) or right.has(_undefined()):
        return left == right
    factor = _ratio(left, right)
    if factor is not None:
        return factor > 0 or isinstance(gold, (Eq, Ne))
    if not isinstance(gold, Eq):
        return len(symbols) == 1 and bool(gold.as_set() == found.as_set())
    for symbol in symbols:
        solutions = solve(left, symbol), solve(right, symbol)
        if not solutions[0] or len(solutions[0]) != len(solutions[1]):
            return False
        if not all(any(_same_expressions(each, other) for other in solutions[1]) for each in solutions[0]):
            return False
    return True


def _ratio(left, right) -> float | None:
    """The constant ratio of two functions; None if it is not constant."""
    ratios, rounding = [a / b for a, b in _at_points(left, right) if a != 0 and b != 0], _rounding(left, right)
    if len(ratios) < _AGREEING or any(abs(each - ratios[0]) > rounding * abs(each) for each in ratios):
        return None
    return float(ratios[0].real) if abs(ratios[0].imag) <= rounding * abs(ratios[0]) else None


def _exact(expression):
    """Replaces decimals with fractions: x - 1583556.5 is almost, but not exactly, a multiple of x - 1583555.5."""
    from sympy import Float, Rational

    return expression.xreplace({each: Rational(str(each)) for each in expression.atoms(Float)})


def _rounding(left, right) -> float:
    """The relative difference allowed between values of two equal expressions."""
    from sympy import Float

    return _ROUNDING if left.has(Float) or right.has(Float) else _EXACT


def _same_expressions(gold, found, relative: float = 0.0, absolute: float = 0.0) -> bool:
    """Whether two expressions are equal as numbers, or as functions of their variables."""
    from sympy import S, nan, oo, simplify, zoo

    if gold.has(_undefined()) or found.has(_undefined()):
        return bool(gold == found)
    if gold.has(oo, -oo, zoo, nan, S.ComplexInfinity) or found.has(oo, -oo, zoo, nan):
        return bool(gold == found) and gold in (oo, -oo)
    if not gold.free_symbols and not found.free_symbols:
        return _same_numbers(gold, found, relative, absolute)
    gold, found = _exact(gold), _exact(found)
    points, rounding = list(_at_points(gold, found)), _rounding(gold, found)
    if any(abs(a - b) > rounding * max(abs(a), abs(b)) for a, b in points):
        return False
    sure = rounding > _EXACT or _agree_closely(gold, found)
    return (sure and len(points) >= _AGREEING) or bool(simplify(gold - found) == 0)


def _agree_closely(left, right) -> bool:
    """Whether two expressions agree to 200 digits at a point: x + 10^40 is not x + 10^40 + 1."""
    from sympy import Rational

    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    point = [(symbol, Rational(_PRIMES[i % len(_PRIMES)], 7)) for i, symbol in enumerate(symbols)]
    sides = [side.doit().subs(point) for side in (left, right)]
    size = _number(sides[0])
    return size is None or _no_gap(*sides, size)


def _same_numbers(gold, found, relative: float, absolute: float) -> bool:
    from sympy import Float, simplify

    gold, found = gold.doit(), found.doit()
    wanted, value = _number(gold), _number(found)
    if wanted is None or value is None:
        return False
    decimals = [each.has(Float) for each in (gold, found)]
    if any(decimals) or relative or absolute:
        exact = not any(decimals) or all(decimals) or gold.is_Integer
        share = max(relative, 1e-12 if exact else _APPROXIMATION)
        near = bool(abs(wanted - value) <= max(absolute, abs(wanted) * share))
        if near or any(decimals):
            return near
    if gold.is_Rational and found.is_Rational:
        return bool(gold == found)
    if abs(wanted - value) > _ROUNDING * max(abs(wanted), abs(value)):
        return False
    return _no_gap(gold, found, wanted) or bool(simplify(gold - found) == 0)


def _no_gap(gold, found, size) -> bool:
    """Whether constants agree to 200 digits: 10^100 + √2 and 10^100 + √3 differ after the hundredth digit."""
    return bool(abs((gold - found).evalf(5, maxn=300)) <= abs(size) * 1e-200)


def _at_points(left, right):
    """Yields pairs of finite values of two expressions at fixed points, some with negative coordinates.

    A point where neither value is real is outside the domain of both, unless they contain complex numbers.
    """
    import mpmath
    from sympy import I, Rational

    left, right = left.doit(), right.doit()
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    is_complex = left.has(I) or right.has(I)
    for number, (signs, scale) in enumerate(zip(_SIGNS, _SCALES, strict=True)):
        places = [Rational(_PRIMES[(place + 5 * number) % len(_PRIMES)], scale) for place in range(len(symbols))]
        signed = [-x if signs >> (place % 3) & 1 else x for place, x in enumerate(places)]
        values = [_number(each.subs(list(zip(symbols, signed, strict=True))), _DIGITS) for each in (left, right)]
        if None in values:
            continue
        a, b = (mpmath.mpc(*(str(part) for part in each.as_real_imag())) for each in values)  # of any size
        if is_complex or abs(a.imag) <= _ROUNDING * abs(a) or abs(b.imag) <= _ROUNDING * abs(b):
            yield a, b


def _undefined():
    from sympy.core.function import AppliedUndef

    return AppliedUndef


def _number(expression, digits: int = 20):
    """The value of a constant expression, to the given number of digits; None if there is no such value."""
    if expression.free_symbols:
        return None
    try:
        value = expression.doit().evalf(digits)
        return value if value.is_finite and value.is_number else None
    except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError):
        return None


def main() -> None:
    """Serves with the limits from the command line: processor time in seconds, memory in bytes."""
    logging.disable(logging.CRITICAL)
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        _reply({"error": str(error)})
        return
    serve(float(sys.argv[1]), int(sys.argv[2]))


if __name__ == "__main__":
    main()
