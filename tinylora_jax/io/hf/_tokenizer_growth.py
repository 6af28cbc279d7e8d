"""Bounds how much longer a `tokenizer.json` may make a text: thirty doublings would fill any memory."""

from __future__ import annotations

import math
from typing import Any

MAX_GROWTH = 1000
"""Largest accepted growth factor of a text; known models add at most a character or a token or two."""

_STEPS = ("normalizers", "processors", "decoders")
_BY_KIND = {"NFKC": 18.0, "NFKD": 18.0, "NFC": 3.0, "NFD": 4.0, "Lowercase": 3.0}  # for the worst Unicode character
_MAX_DEPTH = 20


def check_growth(tokenizer: Any) -> None:
    """Raises an error if a `tokenizer.json` could turn a short text into a very long one.

    Raises:
      ValueError: a part may expand texts too much; the message names it.
    """
    for name in ("normalizer", "post_processor", "decoder"):
        part = tokenizer.get(name) if isinstance(tokenizer, dict) else None
        if (growth := _growth(part)) > MAX_GROWTH:
            raise ValueError(
                f"its {name} could make a text {growth:.3g} times as long, expected at most {MAX_GROWTH}; download the"
                " model from another source"
            )


def _growth(part: Any, depth: int = 0) -> float:
    """The largest growth factor of a text; the tokenizers library rejects what is not recognized here."""
    if not isinstance(part, dict):
        return 1.0
    if depth > _MAX_DEPTH:
        return math.inf
    steps = [step for name in _STEPS if isinstance(part.get(name), list) for step in part[name]]
    if steps:
        return math.prod(_growth(step, depth + 1) for step in steps)
    length = lambda value: len(value) if isinstance(value, str | list) else 0
    match part.get("type"):
        case "Replace":
            pattern = part.get("pattern")
            given = pattern.get("String") if isinstance(pattern, dict) else None
            # A regular expression may match the empty string, and so match between any two characters.
            return max(1.0, length(part.get("content")) / length(given)) if given else 1.0 + length(part.get("content"))
        case "Prepend":
            return 1.0 + length(part.get("prepend"))
        case "TemplateProcessing":
            return max(1.0, float(length(part.get("single"))), length(part.get("pair")) / 2)
    return _BY_KIND.get(str(part.get("type")), 1.0)
