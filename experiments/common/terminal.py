"""Prints answers: a single one while it is generated, several as one block for each prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TextIO

from transformers import PreTrainedTokenizerBase

from experiments.common.changes import printable, side_by_side
from experiments.common.progress import clear
from experiments.common.wording import paragraph

_SIDE_BY_SIDE = 3  # largest number of columns that are wide enough to read

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


class Blocks:
    """Writes one block for each prompt, in the order of the prompts: the prompt, then its answers side by side.

    The answer to a single prompt is written while it is generated.

    Args:
      out: output terminal or file.
      prompts: prompts to repeat; None for each that the user has just typed.
      names: name of each adapter; a prompt has `samples` answers of each.
      samples: number of answers per prompt and adapter.
      first: number of prompts answered before.
    """

    def __init__(
        self, out: TextIO, prompts: Sequence[str | None], names: Sequence[str], samples: int = 1, first: int = 0
    ):
        self._out, self._prompts, self._names, self._samples, self._first = out, prompts, names, samples, first
        self._each = len(names) * samples
        self._texts = [""] * (len(prompts) * self._each)
        self._open = [True] * len(self._texts)
        self._written = 0  # number of finished blocks
        self._streams = len(self._texts) == 1
        if self._streams:
            self._echo(0)

    def write(self, row: int, text: str) -> None:
        """Appends text to an answer."""
        self._texts[row] += text
        if self._streams:
            self._put(text)

    def end(self, row: int) -> None:
        """Ends an answer, and writes the blocks that are complete; repeated calls have no effect."""
        if not self._open[row]:
            return
        self._open[row] = False
        if self._streams:
            self._put("\n")
            return
        while self._written < len(self._prompts) and not any(self._open[self._rows(self._written)]):
            self._block(self._written)
            self._written += 1

    def close(self) -> None:
        """Ends all answers, complete or not."""
        for row in range(len(self._texts)):
            self.end(row)

    def _rows(self, prompt: int) -> slice:
        return slice(prompt * self._each, (prompt + 1) * self._each)

    def _put(self, text: str) -> None:
        clear()
        self._out.write(text)
        self._out.flush()

    def _echo(self, prompt: int) -> None:
        text = self._prompts[prompt]
        if text is not None:
            number = f"{self._first + prompt + 1}  " if len(self._prompts) > 1 or self._first else ""
            self._put(paragraph(printable(text), " " * len(number), number) + "\n")

    def _block(self, prompt: int) -> None:
        self._echo(prompt)
        texts, names = self._texts[self._rows(prompt)], self._names
        for sample in range(self._samples):
            own = [texts[place * self._samples + sample] for place in range(len(names))]
            number = f" #{sample + 1}" if self._samples > 1 else ""
            heads = [f"{name}{number}" for name in names]
            beside = _SIDE_BY_SIDE if len(names) <= _SIDE_BY_SIDE else 1
            for start in range(0, len(names), beside):
                part = slice(start, start + beside)
                self._put("\n".join(side_by_side(heads[part], own[part])) + "\n")
        self._put("\n")
