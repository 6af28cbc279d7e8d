"""Measures tokens per second of generation, compared with the limit from reading weights and cache.

python -m experiments.benchmarks.rollout --model=random:qwen2.5-0.5b --prompts=64 --samples=4
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.benchmarks import common
from experiments.common.cli import use_compilation_cache
from experiments.common.fitting import cache_bytes, head_bytes
from experiments.common.opening import parse_flags
from tinylora_jax.adapters import merge
from tinylora_jax.models import CACHE_SCHEMES
from tinylora_jax.rollout import Sampling, generate

FLAGS = flags.FLAGS
ADAPTERS = ("unmerged", "merged", "none", "per_row")


def rollout(model: common.Model, prompts: tuple[jax.Array, ...], adapter: str, samples: int, new_tokens: int) -> Any:
    """Builds the function that generates, given a run's index."""
    policy, v, sampling = model.policy, model.v, Sampling(new_tokens, quantize_cache=FLAGS.quantize_cache)
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


def floor_s(model: common.Model, rows: int, prompt_tokens: int, new_tokens: int, rate: float) -> float:
    """Lower bound in seconds: reading every weight once per step, and every row's cache at its mean length.

    It counts the share of each device, at its `rate` in bytes per second.
    """
    mesh, config = common.mesh_of_devices(), model.config
    read = common.weight_bytes(model.policy.params, config.tie_embeddings)
    weights = read / (mesh.size // mesh.shape["data"])
    head = head_bytes(config, common.dtype(), FLAGS.quantize_cache)
    cache = cache_bytes(config, mesh, rows, 1, head) * (prompt_tokens + new_tokens / 2)
    return new_tokens * (weights + cache) / rate


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    with common.measuring():
        unknown = set(FLAGS.adapters) - set(ADAPTERS)
        if unknown or not FLAGS.adapters:
            raise ValueError(f"--adapters={','.join(FLAGS.adapters)}: expected some of {', '.join(ADAPTERS)}")
        model = common.load()
        samples, prompt_tokens, new_tokens = FLAGS.samples, FLAGS.prompt_tokens, FLAGS.new_tokens
        prompts = common.random_prompts(model.config, FLAGS.prompts, prompt_tokens)
        rows = FLAGS.prompts * samples
        rate = common.bandwidth()
        floor = floor_s(model, rows, prompt_tokens, new_tokens, rate)
        table = {
            "model": model.name,
            "layers": model.config.num_layers,
            "dtype": str(common.dtype()),
            "quantize": FLAGS.quantize,
            "quantize_cache": FLAGS.quantize_cache,
            "weights read per step, GB": common.weight_bytes(model.policy.params, model.config.tie_embeddings) / 1e9,
            "parameters": model.policy.factors.num_params,
            "completions": rows,
            "slots": FLAGS.slots or rows,
            "prompt tokens, new tokens": f"{prompt_tokens}, {new_tokens}",
            "bandwidth of a device, measured, GB/s": rate / 1e9,
            "floor: tokens per second": rows * new_tokens / floor,
        }
        for adapter in FLAGS.adapters:
            run = rollout(model, prompts, adapter, samples, new_tokens)
            timing = common.measure(run, profiled=adapter == FLAGS.adapters[0])
            table |= {
                f"{adapter}: tokens per second": rows * new_tokens / timing.median_s,
                f"{adapter}: tokens per second, a device": rows * new_tokens / timing.median_s / len(common.devices()),
                f"{adapter}: seconds": timing.median_s,
                f"{adapter}: milliseconds a step": 1e3 * timing.median_s / new_tokens,
                f"{adapter}: of the floor": floor / timing.median_s,
                f"{adapter}: first call, seconds": timing.first_s,
                f"{adapter}: slot efficiency": rows * new_tokens / int(run(0).slot_steps),
            }
        if FLAGS.prefill:
            alone = common.measure(rollout(model, prompts, FLAGS.adapters[0], samples, 1), profiled=False)
            table["prefill and one token, seconds"] = alone.median_s
        peak = common.peak_bytes()
        table["peak memory of a device, GB"] = peak and peak / 1e9
    common.report("rollout", table)


if __name__ == "__main__":
    common.define_flags()
    flags.DEFINE_integer("prompts", 4, "Prompts.", lower_bound=1)
    flags.DEFINE_integer("samples", 4, "Number of completions per prompt.", lower_bound=1)
    flags.DEFINE_integer("prompt_tokens", 128, "Length of every prompt, in tokens.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 64, "Tokens generated per completion; none stops early.", lower_bound=1)
    flags.DEFINE_integer("slots", 0, "Number of completions decoded at once; 0 for all.", lower_bound=0)
    flags.DEFINE_enum("quantize_cache", "none", list(CACHE_SCHEMES), "Storage of the KV cache.")
    flags.DEFINE_list("adapters", ["unmerged"], f"Some of {', '.join(ADAPTERS)}; per_row: one per prompt.")
    flags.DEFINE_bool("prefill", False, "Also time the prefill.")
    app.run(main, flags_parser=parse_flags)
