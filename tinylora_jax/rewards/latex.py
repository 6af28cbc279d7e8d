r"""LaTeX of answers: spellings and units brought together, and the numbers that are written in digits."""

from __future__ import annotations

import re
from fractions import Fraction

from tinylora_jax.rewards.answers import normalize

MAX_ATOM_CHARS = 1000
"""Longer atoms are equal only to the same text."""

_SPELLINGS = (
    *(("−", "-"), ("–", "-"), ("×", r"\times "), ("·", r"\cdot "), ("÷", "/"), ("π", r"\pi "), ("∞", r"\infty ")),
    *(
        ("∪", r"\cup "),
        ("±", r"\pm "),
        ("≤", r"\le "),
        ("≥", r"\ge "),
        ("∈", r"\in "),
        ("°", ""),
        ("½", r"\frac{1}{2}"),
    ),
    *((r"\displaystyle", ""), (r"\$", ""), (r"\%", "%")),
    *((r"^{\circ}", ""), (r"^\circ", ""), (r"{}^\circ", ""), (r"\degree", ""), ("{,}", ","), ("$", "")),
    *((r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), (r"\cfrac", r"\frac"), (r"\lbrace", r"\{"), (r"\rbrace", r"\}")),
    *((r"\geqslant", r"\ge "), (r"\leqslant", r"\le "), (r"\geq", r"\ge "), (r"\leq", r"\le "), (r"\bigcup", r"\cup ")),
    *(("np.", "\\"), ("^{\\prime}", "'"), ("^\\prime", "'")),
)
# A backslash before the command's own ends a row of a matrix.
_GLUE = re.compile(r"(?<!\\)\\(?:!\s*+|[()\[\]])")
_SPACES = re.compile(r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])|\s++")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?")
_UNIT_TEXT = re.compile(
    r"(?<=[^\s\\])\s?\\(?:text|mbox|mathrm|textrm)\s?\{[A-Za-z/ .^0-9-]++\}\s?(?:\^\s?\{?[23]\}?)?\Z"
)
_UNIT_WORD = re.compile(
    r"(?<=[0-9}])\s?(?:(?:square|cubic|sq\.?)\s?)?(?:dollars?|cents?|degrees?|radians?|percent|minutes?|mins?|hours?|days?"
    r"|weeks?|months?|years?|seconds?|units?|[ckm]m|meters?|feet|foot|ft|inch(?:es)?|miles?|mph|km/h|m/s|pounds?|lbs?"
    r"|grams?|kg|people|ways?|points?|students?)\.?(?:\^\{?[23]\}?)?\Z"
)
_PREFIX = re.compile(r"(?:[A-Za-z]\s?\\in(?![A-Za-z])|\\approx(?![A-Za-z])|=)\s?")
_ROOT = re.compile(r"√\s?(?:\(([^()]*+)\)|([0-9]++|[A-Za-z]))")
_FRACTION = r"\\frac\s?(?:\{([0-9]{1,30})\}\s?\{([0-9]{1,30})\}|([0-9])\s?([0-9]))"
_MIXED = re.compile(rf"(-?)([0-9]{{1,30}})\s?{_FRACTION}")
_FACTOR = r"([-+]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++))\s?(?:\\times|\\cdot|\*|x)\s?"
_SCIENTIFIC = re.compile(rf"(?:{_FACTOR})?10\s?(?:\^|\*\*)\s?\{{?\s?([-+]?[0-9]{{1,3}})\s?\}}?")
_POINT_RATIO = re.compile(r"(-?[0-9]{1,40})\.?/([0-9]{1,40})\.?")
_PLAIN = re.compile(r"-?[0-9]++(?:\.[0-9]++|/[0-9]++)?")


def clean(answer: str) -> str:
    """Brings spellings of LaTeX and Unicode together, and drops units, `$`, degrees and a final period."""
    text = _GLUE.sub("", answer)  # 10,\!080
    for spelling, canonical in _SPELLINGS:
        text = text.replace(spelling, canonical)
    text = _ROOT.sub(r"\\sqrt{\1\2}", text)
    text = _trim(_SPACES.sub(" ", _SIZES.sub("", text)))
    if prefix := _PREFIX.match(text):
        text = text[prefix.end() :]
    return _trim(_UNIT_WORD.sub("", _UNIT_TEXT.sub("", text)))


def value_of(atom: str) -> Fraction | None:
    r"""The number that an atom writes in digits; None if it is anything else.

    >>> value_of("4.5e3"), value_of(r"2 \times 10^{-3}"), value_of(r"1\frac{4}{5}"), value_of("x")
    (Fraction(4500, 1), Fraction(1, 500), Fraction(9, 5), None)
    """
    if len(atom) > MAX_ATOM_CHARS:
        return None
    atom = atom.rstrip("%").strip()
    if scientific := _SCIENTIFIC.fullmatch(atom):
        factor, power = scientific.groups()
        return Fraction(factor or "1") * Fraction(10) ** int(power)
    if mixed := _MIXED.fullmatch(atom):
        sign, whole, *parts = (part for part in mixed.groups() if part is not None)
        above, below = map(int, parts)
        size = int(whole) + Fraction(above, below) if below else None
        return -size if size is not None and sign else size
    if ratio := _POINT_RATIO.fullmatch(atom):
        atom = f"{ratio[1]}/{ratio[2]}"
    text = normalize(atom)
    if not _PLAIN.fullmatch(text) or (text.partition("/")[2] or "1").strip("0") == "":
        return None
    return Fraction(text)


def _trim(text: str) -> str:
    return text.lstrip(" ,;:").rstrip(" .,;:")
