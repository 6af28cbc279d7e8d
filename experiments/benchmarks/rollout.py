"""Tokens per second of generation, beside what reading the weights and the cache alone would take.

python -m experiments.benchmarks.rollout --model=random:qwen2.5-0.5b --prompts=64 --samples=4
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.benchmarks import common
from experiments.cli import parse_flags, reporting_errors, use_compilation_cache
from tinylora_jax.adapters import merge
from tinylora_jax.rollout import Sampling, generate

FLAGS = flags.FLAGS


def rollout(model: common.Model, prompts: tuple[jax.Array, ...], adapter: str, samples: int, new_tokens: int) -> Any:
    """The function of a run's index that generates."""
    policy, v, sampling = model.policy, model.v, Sampling(new_tokens)
    if adapter == "per_row":
        v = v * jnp.linspace(0.5, 1.5, prompts[0].shape[0])[:, None, None]
    weights = {
        "none": lambda: policy.params,
        "merged": lambda: jax.jit(merge)(policy.params, policy.factors, v),
    }.get(adapter, lambda: None)()

    @jax.jit
    def program(weights, policy, v, key):
        return generate(
            model.config,
            policy(v) if weights is None else weights,
            *prompts,
            key,
            sampling,
            samples,
            FLAGS.slots,
        )

    return lambda index: program(weights, policy, v, jax.random.key(index))


def floor_s(config: Any, rows: int, prompt_tokens: int, new_tokens: int, rate: float, itemsize: int) -> float:
    """Seconds to read every weight once a step, and every row's cache at its mean length, and no more."""
    weights = common.matrix_params(config) * itemsize
    entry = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    cache = rows * (prompt_tokens + new_tokens / 2) * entry
    return new_tokens * (weights + cache) / rate


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    with reporting_errors():
        model = common.load()
        samples, prompt_tokens, new_tokens = FLAGS.samples, FLAGS.prompt_tokens, FLAGS.new_tokens
        prompts = common.random_prompts(model.config, FLAGS.prompts, prompt_tokens)
        run = rollout(model, prompts, FLAGS.adapter, samples, new_tokens)
        timing = common.measure(run)
        only_prefill = common.measure(rollout(model, prompts, FLAGS.adapter, samples, 1))
        rows = FLAGS.prompts * samples
        rate = common.bandwidth()
        floor = floor_s(model.config, rows, prompt_tokens, new_tokens, rate, common.dtype().itemsize)
        efficiency = rows * new_tokens / int(run(0).slot_steps)
    common.report(
        "rollout",
        {
            "model": model.name,
            "dtype": str(common.dtype()),
            "adapter": f"{FLAGS.adapter}, {model.policy.factors.num_params} parameters",
            "completions": rows,
            "slots": FLAGS.slots or rows,
            "prompt tokens, new tokens": f"{prompt_tokens}, {new_tokens}",
            "seconds": timing.median_s,
            "first call, seconds": timing.first_s,
            "prefill and one token, seconds": only_prefill.median_s,
            "tokens per second": rows * new_tokens / timing.median_s,
            "milliseconds a step": 1e3 * timing.median_s / new_tokens,
            "slot efficiency": efficiency,
            "bandwidth, measured, GB/s": rate / 1e9,
            "floor: tokens per second": rows * new_tokens / floor,
            "of the floor": floor / timing.median_s,
        },
    )


if __name__ == "__main__":
    common.define_flags()
    flags.DEFINE_integer("prompts", 4, "Prompts.", lower_bound=1)
    flags.DEFINE_integer("samples", 4, "Completions a prompt.", lower_bound=1)
    flags.DEFINE_integer("prompt_tokens", 128, "Length of every prompt.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 64, "Tokens generated per completion: none stops early.", lower_bound=1)
    flags.DEFINE_integer("slots", 0, "Completions decoded at once; 0 is all.", lower_bound=0)
    flags.DEFINE_enum(
        "adapter", "unmerged", ["unmerged", "merged", "none", "per_row"], "per_row: another vector for every prompt."
    )
    app.run(main, flags_parser=parse_flags)
