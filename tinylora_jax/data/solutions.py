r"""Worked solutions as target completions for SFT."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tinylora_jax.data.pipeline import Prompt
from tinylora_jax.data.prompts import Tokenizer, encode
from tinylora_jax.data.sources import DataError
from tinylora_jax.rewards import BUILT_IN, accuracy_name

_CALCULATOR = re.compile(r"<<[^<>]*>>")
MAX_REPORTED = 5


def solution_text(solution: str, answer: str, reward: str) -> str:
    r"""Formats a worked solution for a reward: removes GSM8K's calculator annotations and ends with the answer.

    Args:
      solution: worked solution from the data source.
      answer: final answer.
      reward: name of the reward whose answer format is appended if the solution lacks it; a reward that is not built in
        leaves the solution unchanged.

    >>> solution_text("48/2 = <<48/2=24>>24 clips", "24", "hash")
    '48/2 = 24 clips\n#### 24'
    """
    text = _CALCULATOR.sub("", solution).strip()
    reward = accuracy_name(reward)
    if reward not in BUILT_IN or BUILT_IN[reward].marker in text:
        return text
    return f"{text}\n{BUILT_IN[reward].ending.format(answer)}"


def encode_solutions(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, reward: str, stop_token: int, max_tokens: int
) -> tuple[tuple[int, ...], ...]:
    """Encodes the target completion of every prompt: its worked solution, then the stop token.

    Args:
      prompts: prompts with worked solutions.
      tokenizer: transformers tokenizer of the model.
      reward: name of the reward, see `solution_text`.
      stop_token: id of the token that ends every completion.
      max_tokens: longest allowed completion in tokens, including the stop token.

    Raises:
      DataError: prompts have no solution, or solutions are too long (the message names the first few).
    """
    without = [prompt.id for prompt in prompts if not prompt.solution]
    if without:
        raise DataError(
            f"{_some(without, prompts)} have no worked solution to train on; name their column with"
            " config.train_data.solution_column"
        )
    texts = (solution_text(prompt.solution or "", prompt.answer, reward) for prompt in prompts)
    found = tuple((*encode(tokenizer, text, add_special_tokens=False), stop_token) for text in texts)
    long = {prompt.id: len(tokens) for prompt, tokens in zip(prompts, found, strict=True) if len(tokens) > max_tokens}
    if long:
        raise DataError(
            f"solutions of {_some(list(long), prompts)} are longer than max_new_tokens={max_tokens} (longest:"
            f" {max(long.values())} tokens); raise config.max_new_tokens, or exclude these questions"
        )
    return found


def _some(ids: Sequence[int], prompts: Sequence[Prompt]) -> str:
    shown = ", ".join(map(str, ids[:MAX_REPORTED])) + (", ..." if len(ids) > MAX_REPORTED else "")
    return f"{len(ids)} of {len(prompts)} questions (ids {shown})"
