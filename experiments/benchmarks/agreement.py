"""Measures how often quantized weights or a quantized cache keep the most likely token of 16 bit.

python -m experiments.benchmarks.agreement --model=….gguf --dtype=bfloat16 --quantize=int8 --source=gsm8k_test.jsonl.gz
python -m experiments.benchmarks.agreement --model=….gguf --quantize_cache=int8 --source=gsm8k_test.jsonl.gz
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.benchmarks import common
from experiments.common.opening import parse_flags
from tinylora_jax.data import DataSpec, load_questions
from tinylora_jax.io import Pretrained, load_pretrained
from tinylora_jax.models import CACHE_SCHEMES, KVCache, forward, logits

FLAGS = flags.FLAGS
_WIDTH, _ROWS = 256, 4  # tokens of a text, and texts at once


def texts_of(model: Pretrained, source: str, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Questions as right-padded tokens, int32 `[rows, 256]`, and which of these are no padding."""
    rows, count = [], 0
    for question in load_questions(DataSpec(source)):
        if count >= tokens:
            break
        rows.append(model.tokenizer.encode(f"{question.question}\n{question.solution or question.answer}")[:_WIDTH])
        count += len(rows[-1])
    rows += [[0]] * (-len(rows) % _ROWS)
    padded = np.stack([np.pad(np.asarray(row, np.int32), (0, _WIDTH - len(row))) for row in rows])
    return padded, np.arange(_WIDTH) < np.array([len(row) for row in rows])[:, None]


def predictions(model: Pretrained, tokens: np.ndarray, quantize_cache: str) -> tuple[np.ndarray, np.ndarray]:
    """The most likely next tokens, and the log-probabilities of the actual ones (the last column is not one).

    With a quantized cache, every token attends to rounded keys and values only, as a generated token does.
    """
    config, attend = model.config, {}
    if quantize_cache != "none":
        cache = KVCache.empty(config, _ROWS, _WIDTH, common.dtype(), quantize_cache)
        attend = {"start": jnp.zeros(_ROWS, jnp.int32), "cache": cache}

    @jax.jit
    def run(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = jax.nn.log_softmax(logits(config, params, forward(config, params, tokens, **attend)[0]))
        actual = jnp.take_along_axis(scores, jnp.roll(tokens, -1, axis=1)[..., None], axis=-1)[..., 0]
        return jnp.argmax(scores, axis=-1), actual

    parts = [jax.device_get(run(model.params, tokens[i : i + _ROWS])) for i in range(0, len(tokens), _ROWS)]
    best, actual = zip(*parts, strict=True)
    return np.concatenate(best), np.concatenate(actual)


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    with common.measuring(alone=True):
        load = lambda scheme: load_pretrained(FLAGS.model, common.dtype(), quantize=scheme)
        model = load("none")
        tokens, mask = texts_of(model, FLAGS.source, FLAGS.tokens)
        found = [predictions(model, tokens, "none")]
        del model  # one model at a time
        found.append(predictions(load(FLAGS.quantize), tokens, FLAGS.quantize_cache))
    inner = mask[:, 1:] & mask[:, :-1]
    before, after = (actual[:, :-1][inner] for _, actual in found)
    rows = {
        "model": FLAGS.model,
        "dtype": str(common.dtype()),
        "quantize": FLAGS.quantize,
        "quantize_cache": FLAGS.quantize_cache,
        "tokens": int(mask.sum()),
        "same most likely token": float((found[0][0] == found[1][0])[mask].mean()),
        "mean difference of a token's probability": float(np.abs(np.exp(before) - np.exp(after)).mean()),
        "mean negative log-probability before": float(-before.mean()),
        "mean negative log-probability after": float(-after.mean()),
    }
    common.report("agreement", rows)


if __name__ == "__main__":
    common.define_flags()
    flags.DEFINE_string("source", "openai/gsm8k:main", "Questions, as for `config.eval_data.source`.")
    flags.DEFINE_enum("quantize_cache", "none", list(CACHE_SCHEMES), "Storage of the KV cache.")
    flags.DEFINE_integer("tokens", 6000, "Number of tokens to compare, at least.", lower_bound=1)
    app.run(main, flags_parser=parse_flags)
