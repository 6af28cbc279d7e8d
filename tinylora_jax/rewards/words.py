r"""Compares answers that are words or letters of choices, which must never go through algebra."""

from __future__ import annotations

import re

_MAX_CHARS = 4000
_WRAPPED = re.compile(r"\\(?:text|mbox|mathrm|textbf|textrm|mathbf|operatorname)\s?\{([^{}]*+)\}")
_LABEL = re.compile(
    r"\\(?:text|textbf|textrm|mathbf|mathrm|mbox)\s?\{\s?\(?(?P<wrapped>[A-H])\)?[.:]?\s?\}(?P<after>.*)"
    r"|\((?P<enclosed>[A-Ha-h])\)(?P<behind>(?:\s?\Z|[\s~\\:]).*)|(?P<plain>[A-H])(?P<content>(?:[).:]\s?.*)?)",
    re.DOTALL,
)
_OPERATION = re.compile(r"\s?(?:\\(?:cdot|times|cup|cap|pm|le|ge|in|to)(?![A-Za-z])|[-+*/^=<>_,(!'|&])")
_PLAIN_WORD = re.compile(
    r"(?=[A-Za-z ]*[aeiouyAEIOUY])[A-Za-z]{4,}+(?: [A-Za-z]++)*+|[A-Za-z]{2,}+(?: [A-Za-z]{2,}+)++|[A-Z]{3,}+"
    r"|(?i:yes|no|odd|none)|\\(?:angle|triangle|overline|overrightarrow|widehat)(?![A-Za-z]).*"
)
_WORDS_IN_ANY_CASE = frozenset("yes no true false none never always odd even".split())


def is_word(text: str) -> bool:
    """Whether a text is a word, a name or a sequence of letters, which algebra would read as a product."""
    return bool(_WRAPPED.fullmatch(text) or _PLAIN_WORD.fullmatch(text))


def words_equal(left: str, right: str) -> bool:
    """Whether two words are equal, ignoring case unless they may be products of letters."""
    if left.startswith("\\") and not _WRAPPED.fullmatch(left):  # an angle, a segment
        return re.sub(r"[{} ]", "", left) == re.sub(r"[{} ]", "", right)
    words = _word(left), _word(right)
    if not _WRAPPED.fullmatch(left) and _unwrapped(left).isupper() != _unwrapped(right).isupper():
        return words[0] == words[1] and words[0].casefold() in _WORDS_IN_ANY_CASE
    return words[0] == words[1] != ""


def choices_equal(gold: str, found: str) -> bool:
    r"""Whether both name the same choice; one may include its content: `B` and `\textbf{(B)}\ 12`.

    >>> choices_equal("B", r"\textbf{(B)}\ 12"), choices_equal("B", "(b)"), choices_equal("B", "b")
    (True, True, False)
    """
    labels = _label(gold), _label(found)
    return None not in labels and labels[0][0] == labels[1][0] and not (labels[0][1] and labels[1][1])


def _label(answer: str) -> tuple[str, str] | None:
    """The letter of a choice and the text after it."""
    match = _LABEL.fullmatch(answer.strip()) if len(answer) <= _MAX_CHARS else None
    if not match:
        return None
    letter = match["wrapped"] or match["enclosed"] or match["plain"]
    content = (match["after"] or match["behind"] or match["content"] or "").strip()
    return None if _OPERATION.match(content) else (letter.upper(), content.lstrip(").: \\~"))


def _unwrapped(text: str) -> str:
    return _WRAPPED.sub(r"\1", text).strip(" .,;()")


def _word(text: str) -> str:
    """Unwraps a word: letters of choices keep their case and lose parentheses; other words become lower case."""
    inside = _unwrapped(text)
    return inside if len(inside) == 1 else " ".join(inside.casefold().split())
