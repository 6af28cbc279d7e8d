r"""All prompt templates, and their rendering to tokens.

A trained vector depends on its prompt, and an untrained score even more: the paper alone reports 58.8, 75.6 and
88.2 % for one model on GSM8K. After a change here, measure the baselines again.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from tinylora_jax.data.chat_template import render_within_bounds
from tinylora_jax.data.sources import DataError

_SLOT = "{question}"


@runtime_checkable
class Tokenizer(Protocol):
    """The methods of a transformers tokenizer that rendering needs."""

    chat_template: object

    def apply_chat_template(self, conversation, *args, **kwargs):
        """Renders messages to text."""

    def encode(self, text, *args, **kwargs):
        """Encodes text to token ids."""


@dataclass(frozen=True)
class PromptTemplate:
    """The messages around a question; `{question}` is replaced, and all other braces are literal.

    Attributes:
      system: system message. None leaves it to the tokenizer's chat template; Qwen2.5's adds its own.
      user: user message, which contains `{question}`.
      shots: worked examples: (question, answer) pairs shown as earlier turns of the conversation.
    """

    system: str | None
    user: str
    shots: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        if _SLOT not in self.user:
            raise ValueError(f"the user message of a prompt template needs {_SLOT}, got {self.user!r}")

    @property
    def text(self) -> str:
        """All its messages, one below the other."""
        return "\n".join((self.system or "", self.user, *(part for shot in self.shots for part in shot)))


TEMPLATES: Mapping[str, PromptTemplate] = MappingProxyType(
    {
        "gsm8k": PromptTemplate(
            system=None,
            user="{question}\n"
            'Think step by step. End with "#### " and the final answer as a plain number, on its own line.',
        ),
        # SimpleRL's wording, which the paper used on MATH.
        "boxed": PromptTemplate(
            system="You are a helpful assistant.",
            user="{question}\nPlease reason step by step, and put your final answer within \\boxed{}.",
        ),
        # One example teaches a 135M model the format; without it almost no answer is graded right.
        "arithmetic": PromptTemplate(
            system="", user="{question}", shots=(("What is 21 + 32?", "21 + 32 = 53\n#### 53"),)
        ),
        "plain": PromptTemplate(system=None, user="{question}"),
    }
)


def get_template(name: str) -> PromptTemplate:
    """Finds a template by name; an unknown name raises ValueError with the closest names."""
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1) or list(TEMPLATES)
        raise ValueError(f"unknown prompt template {name!r}; did you mean {', '.join(near)}?")
    return TEMPLATES[name]


def render(template: PromptTemplate, question: str, tokenizer: Tokenizer) -> list[int]:
    """Renders a question to prompt tokens.

    Args:
      template: messages around the question.
      question: text of the question; braces and `{question}` in it are literal.
      tokenizer: transformers tokenizer. Without a chat template, the messages are joined by blank lines.

    Returns:
      Token ids, with exactly one beginning-of-sequence token if the model expects one.

    Raises:
      DataError: the model's chat template fails or does not finish in time.
    """
    messages = [] if template.system is None else [{"role": "system", "content": template.system}]
    for asked, answered in template.shots:
        messages.append({"role": "user", "content": template.user.replace(_SLOT, asked)})
        messages.append({"role": "assistant", "content": answered})
    messages.append({"role": "user", "content": template.user.replace(_SLOT, question)})
    if tokenizer.chat_template is None:
        return encode(tokenizer, "\n\n".join(filter(None, (m["content"] for m in messages))))
    apply = lambda: tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    text = render_within_bounds(tokenizer.chat_template, apply)
    # Chat templates add the beginning-of-sequence token themselves (Llama's does).
    return encode(tokenizer, text, add_special_tokens=False)


def encode(tokenizer: Tokenizer, text: str, **options: bool) -> list[int]:
    """Encodes a text to token ids.

    Args:
      tokenizer: transformers tokenizer.
      text: text to encode.
      **options: keyword arguments of the tokenizer's `encode`.

    Raises:
      DataError: the tokenizer fails, for example because of a regular expression that never finishes.
    """
    try:
        return _ids(tokenizer.encode(text, **options))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # panics of the tokenizers library are not an `Exception`
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"the model's tokenizer cannot encode {text!r:.80} ({what:.300}); fix or replace it") from error


def _ids(ids: Sequence[int]) -> list[int]:
    return [int(token) for token in ids]
