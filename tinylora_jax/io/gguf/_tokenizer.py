"""Builds a byte-level BPE tokenizer from GGUF metadata without torch, unlike transformers' reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

# Word patterns from the models' tokenizer.json files. Those of Llama 3 and Qwen 2 differ only in the length of digit
# runs.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2, _LLAMA3, _SMOLLM = "qwen2", "llama-bpe", "smollm"
_PREFIX = "tokenizer.ggml."
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Metadata names one end-of-sequence token; a vocabulary may have more, as lists in generation_config.json show.
_ENDS = (
    *("<|im_end|>", "<|endoftext|>"),  # Qwen, SmolLM2
    *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),  # Llama 3
    *("<|end|>", "<end_of_turn>", "</s>", "<|eot|>", "<|return|>"),  # of other models, which may have been merged in
)


def end_tokens(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Finds the ids of all tokens that end a turn or a text.

    Args:
      metadata: metadata of a GGUF file whose tokenizer `build_tokenizer` accepts.

    Returns:
      The sorted ids: those named in the metadata, and those of control tokens with a known name.
    """
    tokens, kinds = metadata[_PREFIX + "tokens"], metadata[_PREFIX + "token_type"]
    named = (metadata.get(f"{_PREFIX}{name}_token_id") for name in ("eos", "eot", "eom"))
    control = (int(index) for index in np.flatnonzero(kinds == TokenType.CONTROL))
    found = {*(i for i in named if isinstance(i, int)), *(i for i in control if tokens[i] in _ENDS)}
    return tuple(sorted(found))


def build_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Builds the tokenizer described by GGUF metadata.

    Args:
      metadata: metadata of a file whose `tokenizer.ggml.model` is `gpt2` (byte-level BPE) and whose
        `tokenizer.ggml.pre` is `qwen2`, `llama-bpe` or `smollm`.

    Returns:
      A transformers tokenizer with the file's special tokens and chat template.

    Raises:
      ValueError: the tokenizer is of another kind, or its lists are inconsistent; lists all problems.
    """
    problems = _kind_problems(metadata)
    tokens = _strings(metadata, "tokens", problems)
    merges = [tuple(merge.split(" ")) for merge in _strings(metadata, "merges", problems)]
    kinds = metadata.get(_PREFIX + "token_type")
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        got = len(kinds) if isinstance(kinds, np.ndarray) else kinds
        problems.append(f"{_PREFIX}token_type: expected {len(tokens)} numbers, one per token, got {got!r}")
    problems += _vocabulary_problems(tokens, merges)
    roles = _roles(metadata, tokens, problems)
    if problems:
        raise ValueError("the GGUF tokenizer cannot be built:\n  " + "\n  ".join(problems))
    pre = metadata[_PREFIX + "pre"]
    # Llama 3 looks up a whole word before it merges; the others only merge.
    model = BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        ignore_merges=pre == _LLAMA3,
    )
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    if pre == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    _add_tokens(tokenizer, tokens, kinds)
    _set_bos(tokenizer, metadata, roles.get("bos_token"))
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=template if isinstance(template, str) else None,
        **roles,
    )


def _kind_problems(metadata: Mapping[str, Any]) -> list[str]:
    problems = []
    if (model := metadata.get(_PREFIX + "model")) != "gpt2":
        problems.append(f"{_PREFIX}model={model!r:.40} is not supported; expected 'gpt2' (byte-level BPE)")
    if (pre := metadata.get(_PREFIX + "pre")) not in (_QWEN2, _LLAMA3, _SMOLLM):
        problems.append(f"{_PREFIX}pre={pre!r:.40} is not supported; expected {_QWEN2!r}, {_LLAMA3!r} or {_SMOLLM!r}")
    for name in ("add_space_prefix", "add_eos_token"):
        if metadata.get(_PREFIX + name):
            problems.append(f"{_PREFIX}{name}=true is not supported for byte-level BPE")
    return problems


def _strings(metadata: Mapping[str, Any], name: str, problems: list[str]) -> list[str]:
    values = metadata.get(_PREFIX + name)
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return values
    problems.append(f"{_PREFIX}{name}: expected an array of strings, got {type(values).__name__}")
    return []


def _vocabulary_problems(tokens: list[str], merges: list[tuple[str, ...]]) -> list[str]:
    vocabulary = set(tokens)
    problems = []
    if len(vocabulary) != len(tokens):
        twice = [token for token, count in Counter(tokens).most_common(4) if count > 1]
        problems.append(f"{_PREFIX}tokens: {len(tokens) - len(vocabulary)} tokens are repeated, such as {twice!r}")
    wrong = [merge for merge in merges if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary]
    if wrong:
        problems.append(
            f"{_PREFIX}merges: {len(wrong)} are not pairs of known tokens, such as {' '.join(wrong[0])!r:.80}"
        )
    return problems


def _roles(metadata: Mapping[str, Any], tokens: list[str], problems: list[str]) -> dict[str, str]:
    roles = {}
    for role, name in _ROLES.items():
        index = metadata.get(_PREFIX + name)
        if isinstance(index, int) and 0 <= index < len(tokens):
            roles[role] = tokens[index]
        elif index is not None:
            problems.append(f"{_PREFIX}{name}={index!r:.40}: expected an index below {len(tokens)}")
    return roles


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    """Splits text into words, and maps their bytes to the vocabulary's alphabet."""
    if pre == _SMOLLM:
        # Each digit is a separate word; GPT-2's pattern splits the rest.
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    pattern = _WORDS.replace("DIGITS", r"\p{N}{1,3}" if pre == _LLAMA3 else r"\p{N}")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: np.ndarray) -> None:
    """Registers tokens at which text is split before merging; control tokens are special tokens."""
    for index in np.flatnonzero(np.isin(kinds, (TokenType.CONTROL, TokenType.USER_DEFINED))):
        special = bool(kinds[index] == TokenType.CONTROL)
        tokenizer.add_tokens([AddedToken(tokens[index], normalized=False, special=special)])


def _set_bos(tokenizer: Tokenizer, metadata: Mapping[str, Any], bos: str | None) -> None:
    # llama.cpp starts Llama 3 texts with BOS even if the file does not say so; other texts only on request.
    default = metadata[_PREFIX + "pre"] == _LLAMA3
    steps: list[processors.PostProcessor] = [processors.ByteLevel(trim_offsets=False)]
    if metadata.get(_PREFIX + "add_bos_token", default) and bos is not None:
        steps.append(
            processors.TemplateProcessing(
                single=[bos, "$A"],
                pair=[bos, "$A", bos + ":1", "$B:1"],
                special_tokens=[(bos, tokenizer.token_to_id(bos))],
            )
        )
    tokenizer.post_processor = processors.Sequence(steps)
