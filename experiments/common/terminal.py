"""Prints answers while they are generated: a single one directly, several line by line with labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TextIO

from transformers import PreTrainedTokenizerBase

# A model's text must not move the cursor, change colours or send input to the terminal.
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class TextStream:
    """Decodes the tokens of one completion to text, without partial characters and with visible control codes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._given = 0

    def push(self, tokens: Iterable[int]) -> str:
        """Returns the text that these tokens add; bytes of an incomplete character wait for the next tokens."""
        self._tokens += map(int, tokens)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = text.rstrip("\ufffd")  # placeholder for such bytes at the end
        new, self._given = text[self._given :], max(self._given, len(text))
        return new.translate(_VISIBLE)


class Screen:
    """Writes several answers at once.

    Args:
      out: output terminal or file.
      labels: label of each answer. A single answer is written immediately; several are written line by line, as
        `label │ line`.
    """

    def __init__(self, out: TextIO, labels: Sequence[str]):
        self._out = out
        width = max(map(len, labels))
        self._labels = [label.ljust(width) for label in labels]
        self._lines: list[str | None] = [""] * len(labels)  # incomplete lines; None once an answer ended

    def write(self, row: int, text: str) -> None:
        """Appends text to an answer."""
        if len(self._lines) == 1:
            self._out.write(text)
        else:
            *complete, self._lines[row] = (self._lines[row] + text).split("\n")
            self._out.writelines(f"{self._labels[row]} │ {line}\n" for line in complete)
        self._out.flush()

    def end(self, row: int) -> None:
        """Ends an answer; repeated calls have no effect."""
        if self._lines[row] is not None:
            self.write(row, "\n")
            self._lines[row] = None

    def close(self) -> None:
        """Ends all answers, complete or not."""
        for row in range(len(self._lines)):
            self.end(row)
