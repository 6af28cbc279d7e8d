r"""Extracts final answers from completions, normalizes them, and compares them exactly.

A completion is untrusted data: nothing is evaluated, no number is converted before its size is checked, and every
function takes linear time. The regular expressions use possessive quantifiers, which do not backtrack.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_SCANNED_CHARS = 100_000
"""Number of last characters of a completion that are searched, because the answer is at the end."""

_HASH = re.compile(
    r"(?<!\#)\#\#\#\#[ ](-?(?:[0-9]{1,3}(?:,[0-9]{3})++|[0-9]++)(?:\.[0-9]++)?+)(?=\.?(?:\s|\Z))(?!\.?[ \t]++[0-9])",
    re.VERBOSE,
)
_BRACE = re.compile(r"\\boxed\s*+\{|\\[{}]|[{}]")
# Each group of thousands checks its own end: a check after the whole run would take quadratic time on long runs.
_LAST_NUMBER = re.compile(
    r"(?:[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))++|[0-9]++)(?:\.[0-9]++)?+(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?|\.[0-9]++"
)
_SIGN = re.compile(r"(?<![\w)\]}])[-−]\Z")

_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mbox)\s*+\{([^{}]*+)\}")
_SIZE = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\!\s*+")
_SPACE = re.compile(r"(?:\\[,;: ]|[~\s])++")
# It starts at a number without a preceding one: a check from every group would take quadratic time on long runs.
_SPACED_THOUSANDS = re.compile(r"(?<![0-9.,])(?<![0-9] )[1-9][0-9]{0,2}(?: [0-9]{3}(?![0-9]))++(?! ?[0-9/]|,[0-9])")
# All spaces except those between numbers, and those of a list in which commas without a space may group thousands.
_IDLE_SPACE = re.compile(
    r"(?<=[0-9]) (?=[0-9])|(?<=[0-9],) (?=[0-9]{3}(?![0-9]))"
    r"|(?<=,) (?=[0-9]{1,3},[0-9]{3}(?![0-9]))|(?<=[0-9],[0-9]{3},) |( )"
)
_GROUP = re.compile(r"[0-9]{3}(?![0-9])")
_UNIT_IN_PARENTHESES = re.compile(
    r"(?<=[0-9}%])(?:\s?\(\\(?:text|mbox|mathrm)\s?\{[A-Za-z][A-Za-z .-]*+\}\)|\s\([A-Za-z]{2}[A-Za-z .-]*+\))\s*+\Z"
)
_SPELLINGS = (
    ("−", "-"),
    ("{,}", ","),
    ("\\$", ""),
    ("$", ""),
    ("\\%", "%"),
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
)
# "cents" or "km" would change the value or its meaning; these four only repeat what the question asks for.
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?P<whole>[1-9][0-9]{0,2}(?:,[0-9]{3})++|[0-9]++|(?=\.[0-9]))(?:\.(?P<fraction>[0-9]*+))?"
    r"(?:[eE](?P<exponent>[-+]?[0-9]{1,3}))?(?:dollars?|percent|degrees?|%)?"
)
_RATIO = re.compile(
    r"(?P<sign>[-+]?)(?:(?P<whole>[0-9]{1,40})(?: |(?=\\frac)))?(?:"
    r"\\frac\{(?P<above>[-+]?[0-9]{1,40})\}\{(?P<below>[0-9]{1,40})\}"
    r"|\\frac(?P<digit>[0-9])(?P<under>[0-9])|(?P<left>[0-9]{1,40})/(?P<right>[0-9]{1,40}))"
)


def extract_hash(text: str) -> str | None:
    """Finds the last strictly formatted `#### n`: four hashes, one space, a plain number, a word boundary.

    This is the usual GSM8K format. A dollar sign, a missing space (`####72`) or a ratio (`#### 72/5`) does not match.

    Args:
      text: completion to search.

    Returns:
      The number as written (`1,000` keeps its comma), or None.

    >>> extract_hash("#### 1\\nNo, wait.\\n#### 1,072.")
    '1,072'
    >>> extract_hash("The answer is 72") is None
    True
    """
    last = None
    for match in _HASH.finditer(text[-MAX_SCANNED_CHARS:]):
        last = match
    return last[1] if last else None


def extract_boxed(text: str) -> str | None:
    r"""Finds the content of the last balanced `\boxed{...}`.

    Among nested boxes the last innermost one counts. A box that never closes (in a truncated completion) is skipped
    in favour of an earlier one.

    Args:
      text: completion to search.

    Returns:
      The content without surrounding whitespace, possibly empty, or None.

    >>> extract_boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    text = text[-MAX_SCANNED_CHARS:]
    opened: list[int | None] = []
    best: tuple[int, int] | None = None
    for token in _BRACE.finditer(text):
        if token[0].startswith("\\boxed"):
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, token.start())
    return text[best[0] : best[1]].strip() if best else None


def extract_last_number(text: str) -> str | None:
    """Finds the last number in any format, for lenient grading.

    It handles thousands separators, decimals, `$`, `%`, a closing period and a leading minus. A minus between two
    operands (`5-3`) is not a sign.

    Args:
      text: completion to search.

    Returns:
      The number as written, without currency or percent signs, or None.

    >>> extract_last_number("He lost -$1,250.50.")
    '-1,250.50'
    """
    text = text[-MAX_SCANNED_CHARS:]
    last = None
    for match in _LAST_NUMBER.finditer(text):
        last = match
    if last is None:
        return None
    before = text[max(0, last.start() - 4) : last.start()].rstrip("$\\")
    return f"-{last[0]}" if _SIGN.search(before) else last[0]


def normalize(answer: str) -> str:
    r"""Converts an answer to canonical text; equal texts mean equal answers.

    Numbers lose currency and percent signs, thousands separators, and leading and trailing zeros. Ratios of integers
    are reduced, and written as decimals if these are finite (1/2 is 0.5). Spaces group thousands if every group has
    three digits; other numbers stay separate (`1 2` is not 12), and a comma followed by a space separates list items.
    A unit in parentheses is dropped: `9 (apples)` is 9. Other text only loses spacing and spelling variants of LaTeX;
    symbolic equivalence is not decided here. Numbers are shifted as text, so `1e999999999` costs nothing (exponents of
    more than three digits stay text).

    Args:
      answer: gold or extracted answer.

    Returns:
      The canonical text; empty if nothing is left.

    >>> [normalize(a) for a in ("$1,072.00", "007", r"\dfrac{3}{6}", "-0", r"10,\!000", "10 000", "32, 349")]
    ['1072', '7', '0.5', '0', '10000', '10000', '32, 349']
    """
    text = _TEXT.sub(r"\1", drop_parenthesized_unit(answer))
    for spelling, canonical in _SPELLINGS:
        text = text.replace(spelling, canonical)
    text = group_thousands(_SPACE.sub(" ", _SIZE.sub("", text)).replace(" ,", ", ")).strip().rstrip(".")
    if "," in text and (listed := _list(text)):
        return listed
    text = _IDLE_SPACE.sub(lambda match: "" if match[1] else match[0], text).strip().rstrip(".")
    return _number(text) or text


def group_thousands(text: str) -> str:
    """Joins groups of three digits that are separated by single spaces.

    >>> group_thousands("10 000"), group_thousands("1 2"), group_thousands("1 2000")
    ('10000', '1 2', '1 2000')
    """
    return _SPACED_THOUSANDS.sub(lambda match: match[0].replace(" ", ""), text)


def drop_parenthesized_unit(answer: str) -> str:
    """Drops a unit in parentheses after a number.

    >>> drop_parenthesized_unit("9 (apples)"), drop_parenthesized_unit("3(x)")
    ('9', '3(x)')
    """
    return _UNIT_IN_PARENTHESES.sub("", answer)


def is_equal(predicted: str | None, gold: str) -> bool:
    """Whether two answers are equal after `normalize`; a missing or empty answer equals nothing.

    >>> is_equal("72.0", "72"), is_equal("7/2", "3.5"), is_equal(None, "72"), is_equal("72.1", "72")
    (True, True, False, False)
    """
    if predicted is None:
        return False
    canonical = normalize(predicted)
    return canonical != "" and canonical == normalize(gold)


def _number(text: str) -> str | None:
    """Writes a number or a ratio of numbers in canonical form; None for any other text."""
    if number := _NUMBER.fullmatch(text):
        whole = number["whole"].replace(",", "")
        return _decimal(number["sign"] == "-", whole, number["fraction"] or "", int(number["exponent"] or 0))
    value = _ratio(match) if (match := _RATIO.fullmatch(text)) else None
    return None if value is None else _rational(value)


def _list(text: str) -> str | None:
    """Writes a list of numbers so that no comma can be read as grouping thousands; None for any other text."""
    pieces = [
        part
        for piece in text.split(", ")
        for part in ([piece] if _NUMBER.fullmatch(piece.strip()) else piece.split(","))
    ]
    items = [_number(piece.strip()) for piece in pieces]
    if len(items) < 2 or None in items:
        return None
    listed = items[0] or ""
    for item in items[1:]:
        listed += (", " if _GROUP.match(item or "") else ",") + (item or "")
    return listed


def _decimal(negative: bool, whole: str, fraction: str, exponent: int = 0) -> str:
    """Writes ±whole.fraction·10^exponent without exponent, redundant zeros or negative zero."""
    digits, point = whole + fraction, len(whole) + exponent
    if point < 0:
        digits, point = "0" * -point + digits, 0
    digits = digits.ljust(point, "0")
    whole, fraction = digits[:point].lstrip("0") or "0", digits[point:].rstrip("0")
    text = f"{whole}.{fraction}" if fraction else whole
    return f"-{text}" if negative and text != "0" else text


def _ratio(match: re.Match) -> Fraction | None:
    """The value of a fraction or a mixed number; None if it has none."""
    above = int(match["above"] or match["digit"] or match["left"])
    below = int(match["below"] or match["under"] or match["right"])
    whole = int(match["whole"] or 0)
    if not below or (match["whole"] and above < 0):
        return None
    value = whole + Fraction(above, below)
    return -value if match["sign"] == "-" else value


def _rational(value: Fraction) -> str:
    """Writes a fraction as a decimal if that is finite, else reduced as p/q, so that equal values give equal texts."""
    rest, exponents = value.denominator, {2: 0, 5: 0}
    for prime in exponents:
        while rest % prime == 0:
            rest //= prime
            exponents[prime] += 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(exponents.values())
    scaled = abs(value.numerator) * 10**places // value.denominator
    return _decimal(value < 0, str(scaled), "", -places)
