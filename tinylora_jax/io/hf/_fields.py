"""Reads typed values from parsed JSON, and collects all problems."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tinylora_jax.files import is_number

MAX_SIZE = 2**31 - 1


class FieldReader:
    """Reads typed values from a mapping and collects all problems.

    Args:
      values: parsed JSON object.
      problems: list to which each problem is added.
      where: beginning of every message, such as `rope: `.
    """

    def __init__(self, values: Mapping[str, Any], problems: list[str], where: str = ""):
        self.values, self.problems, self.where = values, problems, where

    def number(self, name: str, default: float | None, low: float, high: float = math.inf) -> float:
        """Reads a finite number in [low, high]; `default` if absent (None means required)."""
        value = self.values.get(name, default)
        if is_number(value) and low <= value <= high:
            return float(value)
        limit = "" if high == math.inf else f" and at most {high:g}"
        self.problems.append(f"{self.where}{name}: expected a number of at least {low:g}{limit}, got {value!r:.80}")
        return math.nan  # all comparisons with it are false, so a problem is reported only once

    def size(self, name: str, default: int | None, high: int = MAX_SIZE) -> int:
        """Reads a positive integer of at most `high`."""
        value = self.values.get(name, default)
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= high:
            return value
        self.problems.append(f"{self.where}{name}: expected an integer from 1 to {high}, got {value!r:.80}")
        return 1

    def flag(self, name: str, default: bool) -> bool:
        """Reads True or False."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            self.problems.append(f"{self.where}{name}: expected true or false, got {value!r:.80}")
        return value is True

    def fixed(self, expected: Mapping[str, Any]) -> None:
        """Checks fields that must be absent, null or exactly as expected."""
        for name, only in expected.items():
            value = self.values.get(name)
            if value is not None and value != only:
                self.problems.append(f"{self.where}{name}={value!r:.80} is not supported; expected {only!r}")

    def unknown(self, known: frozenset[str]) -> None:
        """Reports fields outside `known` that are set; null counts as not set."""
        for name, value in self.values.items():
            if name not in known and value is not None:
                self.problems.append(f"{self.where}{name}={value!r:.80} is not a known field")
