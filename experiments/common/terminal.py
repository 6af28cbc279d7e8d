"""Prints answers while they are drawn: one as it comes, several line by line with labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TextIO

from transformers import PreTrainedTokenizerBase

# A model's text is not to move the cursor, change colours or type into the terminal.
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class TextStream:
    """The text of one completion as its tokens come: never half a character, control codes made visible."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._given = 0

    def push(self, tokens: Iterable[int]) -> str:
        """What these tokens add; bytes of a character that is not complete wait for the next ones."""
        self._tokens += map(int, tokens)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = text.rstrip("\ufffd")  # what stands for such bytes, until something follows
        new, self._given = text[self._given :], max(self._given, len(text))
        return new.translate(_VISIBLE)


class Screen:
    """Where several answers are written at once.

    Args:
      out: the terminal or file.
      labels: one per answer. A single answer is written as it comes; of several, each line as soon as it is complete,
        `label │ line`.
    """

    def __init__(self, out: TextIO, labels: Sequence[str]):
        self._out = out
        width = max(map(len, labels))
        self._labels = [label.ljust(width) for label in labels]
        self._lines: list[str | None] = [""] * len(labels)  # begun and not yet written; None when it has ended

    def write(self, row: int, text: str) -> None:
        """Adds to an answer."""
        if len(self._lines) == 1:
            self._out.write(text)
        else:
            *complete, self._lines[row] = (self._lines[row] + text).split("\n")
            self._out.writelines(f"{self._labels[row]} │ {line}\n" for line in complete)
        self._out.flush()

    def end(self, row: int) -> None:
        """Ends an answer; again does nothing."""
        if self._lines[row] is not None:
            self.write(row, "\n")
            self._lines[row] = None

    def close(self) -> None:
        """Ends all answers, with what there is of them."""
        for row in range(len(self._lines)):
            self.end(row)
