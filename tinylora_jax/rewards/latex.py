r"""Normalizes spellings and units in LaTeX answers, and parses numbers written in digits."""

from __future__ import annotations

import re
from fractions import Fraction

from tinylora_jax.rewards.answers import drop_parenthesized_unit, group_thousands, normalize

MAX_ATOM_CHARS = 1000
"""Longest atom that is parsed; a longer one equals only the same text."""

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
    *((r"\varnothing", r"\emptyset "), ("∅", r"\emptyset "), (r"\neq", r"\ne "), ("≠", r"\ne ")),
    *((">=", r"\ge "), ("<=", r"\le "), (r"\langle", "("), (r"\rangle", ")"), ("⟨", "("), ("⟩", ")")),
)
# A backslash before the command's own ends a row of a matrix.
_GLUE = re.compile(r"(?<!\\)\\(?:!\s*+|[()\[\]])")
_SPACES = re.compile(r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])|\s++")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?")
_UNIT_TEXT = re.compile(
    r"(?<=[^\s\\])\s?\\(?:text|mbox|mathrm|textrm)\s?\{[A-Za-z/ .^0-9-]++\}\s?(?:\^\s?\{?[23]\}?)?\Z"
)
_UNITS = {
    spelling: names.split()[0]
    for names in (
        "mm millimeter millimeters millimetre millimetres",
        "cm centimeter centimeters centimetre centimetres",
        "m meter meters metre metres",
        "km kilometer kilometers kilometre kilometres",
        "in inch inches",
        "ft foot feet",
        "yd yard yards",
        "mi mile miles",
        "s sec second seconds",
        "min mins minute minutes",
        "h hr hrs hour hours",
        "d day days",
        "week weeks",
        "month months",
        "year years yr yrs",
        "g gram grams",
        "kg kilogram kilograms",
        "lb lbs pound pounds",
        "oz ounce ounces",
        "L l liter liters litre litres",
        "dollar dollars",
        "cent cents",
        "degree degrees",
        "radian radians rad",
        "am a.m AM A.M",
        "pm p.m PM P.M",
    )
    for spelling in names.split()
}
_POWERS = {"square": "2", "sq": "2", "sq.": "2", "cubic": "3"}
_MEASURED = re.compile(
    r"[0-9}]\s*+(?:\\[,; ])?\s*+(?:\\(?:text|mbox|mathrm|textrm)\s?\{\s?)?"
    r"(?P<kind>square |sq\.? |cubic )?(?P<unit>[A-Za-z]++(?:\.[mM])?)\.?\s?\}?\s?(?:\^\s?\{?(?P<power>[23])\}?)?\}?\Z"
)
_UNIT_WORD = re.compile(
    r"(?<=[0-9}])\s?(?:(?:square|cubic|sq\.?)\s?)?(?:"
    + "|".join(
        sorted(
            {re.escape(name) for name in _UNITS if len(name) > 1} - {"min", "oz"} | {"mph", "km/h", "m/s"},
            key=len,
            reverse=True,
        )
    )
    + r"|percent|units?|people|ways?|points?|students?)\.?(?:\^\{?[23]\}?)?\Z"
)
_PERCENT_WORD = re.compile(
    r"(?<=[0-9}])\s?(?:\\(?:text|mbox|mathrm|textrm)\s?\{\s?per\s?cent\s?\}|per\s?cent(?:age points)?)\Z"
)
_MULTIPLE = re.compile(
    r"(?<=[0-9])\s?(?:\\(?:text|mbox|mathrm|textrm)\s?\{\s?(?P<in_text>NAME)(?:\s[a-z]++)?\s?\}|(?P<plain>NAME)(?![A-Za-z]))".replace(
        "NAME", "hundred|thousand|million|billion|trillion"
    )
)
_MULTIPLES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_FUNCTION_WORD = re.compile(r"(?<![\\A-Za-z{])(pi|sqrt|sin|cos|tan|ln|log|arcsin|arccos|arctan)(?![A-Za-z])")
_ROOT_CALL = re.compile(r"\\sqrt\s?\(([^()]*+)\)")
_REALS = re.compile(
    r"\\mathbb\s?\{?\s?R\s?\}?|\\(?:text|mbox)\{\s?all real numbers\s?\}|all real numbers", re.IGNORECASE
)
_MAX_GROUPING = 4  # braces around an answer
_PREFIX = re.compile(r"(?:\\approx(?![A-Za-z])|=)\s?")
_ROOT = re.compile(r"√\s?(?:\(([^()]*+)\)|([0-9]++|[A-Za-z]))")
_FACTOR = r"([-+]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++))\s?(?:\\times|\\cdot|\*|x)\s?"
_SCIENTIFIC = re.compile(rf"(?:{_FACTOR})?10\s?(?:\^|\*\*)\s?\{{?\s?([-+]?[0-9]{{1,3}})\s?\}}?")
_POINT_RATIO = re.compile(r"(-?[0-9]{1,40})\.?/([0-9]{1,40})\.?")
_REPEATING = re.compile(r"(-?)([0-9]{0,40})\.([0-9]{0,40})\\(?:overline|bar)\s?\{?([0-9]{1,40})\}?")
_PLAIN = re.compile(r"-?[0-9]++(?:\.[0-9]++|/[0-9]++)?")


def clean(answer: str) -> str:
    """Normalizes spellings of LaTeX and Unicode, and drops units, `$`, degrees and a final period."""
    text = _GLUE.sub("", drop_parenthesized_unit(answer))  # 10,\!080
    for spelling, canonical in _SPELLINGS:
        text = text.replace(spelling, canonical)
    text = _ROOT.sub(r"\\sqrt{\1\2}", text)
    text = _trim(group_thousands(_SPACES.sub(" ", _SIZES.sub("", text))))
    if prefix := _PREFIX.match(text):
        text = text[prefix.end() :]
    text = _ungrouped(text)
    text = _ROOT_CALL.sub(r"\\sqrt{\1}", _FUNCTION_WORD.sub(r"\\\1 ", text))
    text = _MULTIPLE.sub(
        lambda match: rf" \times 10^{{{_MULTIPLES[match['in_text'] or match['plain']]}}}", _PERCENT_WORD.sub("%", text)
    )
    text = _trim(_UNIT_WORD.sub("", _UNIT_TEXT.sub("", text)))
    return r"(-\infty,\infty)" if _REALS.fullmatch(text) else text


def unit_of(answer: str) -> str | None:
    """Finds the unit after a number, in canonical spelling; None if there is no known unit.

    >>> unit_of("15 square feet"), unit_of(r"15\\text{ ft}^2"), unit_of("15"), unit_of("15 apples")
    ('ft2', 'ft2', None, None)
    """
    answer = answer.strip().rstrip(".")
    if answer.endswith("$"):
        answer = answer.strip("$ ")
    if answer.endswith(("°", r"^\circ", r"^{\circ}")):
        return "degree"
    if answer.startswith(r"\$") or (answer.startswith("$") and answer.count("$") == 1):  # not the end of $5$
        return "dollar"
    if match := _MEASURED.search(answer[-60:]):
        unit = _UNITS.get(match["unit"].rstrip("."))
        power = match["power"] or _POWERS.get((match["kind"] or "").strip(), "")
        return unit and unit + power
    return None


def units_differ(answer: str, other: str) -> bool:
    """Whether both answers have units and these differ: 5 cm is not 5 m."""
    units = unit_of(answer), unit_of(other)
    return None not in units and units[0] != units[1]


def _ungrouped(text: str) -> str:
    """Drops braces that enclose a whole text."""
    for _ in range(_MAX_GROUPING):
        if not text.startswith("{") or not text.endswith("}") or text.endswith("\\}"):
            break
        level = 0
        for place, character in enumerate(text):
            level += (character == "{") - (character == "}")
            if level == 0 and place < len(text) - 1:
                return text
        text = text[1:-1].strip() if level == 0 else ""
    return text


def value_of(atom: str) -> Fraction | None:
    r"""Parses the number that an atom writes in digits; None for any other atom.

    >>> value_of("4.5e3"), value_of(r"1\frac{4}{5}"), value_of(r"0.3\overline{6}"), value_of("x")
    (Fraction(4500, 1), Fraction(9, 5), Fraction(11, 30), None)
    """
    if len(atom) > MAX_ATOM_CHARS:
        return None
    atom = atom.removesuffix("%").strip()
    if "%" in atom:
        return None
    if repeating := _REPEATING.fullmatch(atom):
        sign, whole, fixed, period = repeating.groups()
        nines = 10 ** len(fixed) * (10 ** len(period) - 1)
        value = Fraction(int(whole + fixed + period) - int(whole + fixed or 0), nines)
        return -value if sign else value
    if scientific := _SCIENTIFIC.fullmatch(atom):
        factor, power = scientific.groups()
        return Fraction(factor or "1") * Fraction(10) ** int(power)
    if ratio := _POINT_RATIO.fullmatch(atom):
        atom = f"{ratio[1]}/{ratio[2]}"
    text = normalize(atom)
    if not _PLAIN.fullmatch(text) or (text.partition("/")[2] or "1").strip("0") == "":
        return None
    return Fraction(text)


def _trim(text: str) -> str:
    return text.lstrip(" ,;:").rstrip(" .,;:")
