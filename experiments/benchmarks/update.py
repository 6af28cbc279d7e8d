"""Measures one GRPO update with natural lengths, compared with the device's measured matrix rate.

python -m experiments.benchmarks.update --model=random:qwen2.5-0.5b --prompts=64 --new_tokens=512
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags

from experiments.benchmarks import common
from experiments.common.architectures import matrix_params
from experiments.common.cli import use_compilation_cache
from experiments.common.meshes import replicate
from experiments.common.opening import parse_flags
from tinylora_jax.models import active_mesh, device_bytes
from tinylora_jax.training import (
    GRPO,
    Batch,
    Bounds,
    Optimizer,
    Plan,
    Update,
    grpo_loss,
    init_state,
    pack,
    plan_update,
)

FLAGS = flags.FLAGS


def natural_batch(vocab: int, bounds: Bounds) -> Batch:
    """Random tokens with lengths distributed like GSM8K answers: mean 0.57, deviation 0.22 of the cap."""
    rng = np.random.default_rng(0)
    prompts, prompt_tokens, samples, new_tokens = bounds
    shape = (prompts, samples, new_tokens)
    ends = np.clip(rng.normal(0.57, 0.22, shape[:2]) * new_tokens, 1, new_tokens).astype(int)
    lengths = np.clip(rng.normal(0.45, 0.12, prompts) * prompt_tokens, 1, prompt_tokens).astype(np.int32)
    return Batch(
        prompts=rng.integers(0, vocab, (prompts, prompt_tokens)).astype(np.int32),
        lengths=lengths,
        completions=rng.integers(0, vocab, shape).astype(np.int32),
        mask=np.arange(new_tokens) < ends[:, :, None],
        rollout_logprobs=np.full(shape, -12.0, np.float32),
        advantages=rng.standard_normal(shape[:2]).astype(np.float32),
    )


def flops_ratio(plan: Plan, model: common.Model, microbatch) -> float:
    """XLA's operation count for loss and gradient, relative to the loss alone."""
    loss = lambda v, policy, microbatch: grpo_loss(v, plan, policy, microbatch)[0]

    def count(function) -> float:
        compiled = jax.jit(function).lower(model.v, model.policy, microbatch).compile()
        return compiled.cost_analysis()["flops"]

    return count(jax.value_and_grad(loss)) / count(loss)


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    with common.measuring():
        model = common.load()
        bounds = Bounds(FLAGS.prompts, FLAGS.prompt_tokens, FLAGS.samples, FLAGS.new_tokens)
        batch = natural_batch(model.config.vocab_size, bounds)
        grpo = GRPO(stream_tokens=FLAGS.stream_tokens, remat=FLAGS.remat)
        plan = plan_update(model.config, grpo, 1.0, bounds, common.dtype(), active_mesh(), device_bytes())
        optimizer = Optimizer(1e-3).transform()
        step, state = Update(plan, optimizer), replicate(init_state(model.v, optimizer))
        timing = common.measure(lambda index: step(state, model.policy, batch))
        microbatches = list(pack(batch, np.zeros(batch.mask.shape, np.float32), plan.shapes, plan.sequences))
        shape = plan.shapes[-1]
        tokens = int(batch.mask.sum() + batch.lengths.sum())
        matrices, rate = matrix_params(model.config), common.matrix_rate(common.dtype())
        peak, count = common.peak_bytes(), len(common.devices())
        ratio = flops_ratio(plan, model, microbatches[0]) if model.config.num_layers < 4 else None
    common.report(
        "update",
        {
            "model": model.name,
            "dtype": str(common.dtype()),
            "quantize": FLAGS.quantize,
            "parameters": model.policy.factors.num_params,
            "prompts × samples": f"{bounds.prompts} × {bounds.samples}",
            "tokens of prompts and completions": tokens,
            "streams": f"{len(microbatches)} x {plan.sequences} of {shape.tokens} tokens, {shape.rows} rows",
            "stream tokens in use": tokens / (len(microbatches) * plan.sequences * shape.tokens),
            "remat": plan.remat,
            "seconds": timing.median_s,
            "first call, seconds": timing.first_s,
            "tokens per second": tokens / timing.median_s,
            "tokens per second, a device": tokens / timing.median_s / count,
            "peak memory of a device, GB": peak and peak / 1e9,
            "matrix rate of a device, measured, TFLOP/s": rate / 1e12,
            "4·N·tokens, TFLOP/s a device": 4 * matrices * tokens / timing.median_s / 1e12 / count,
            "of the matrix rate": 4 * matrices * tokens / timing.median_s / rate / count,
            "operations, loss and gradient over loss (XLA; small models)": ratio,
        },
    )


if __name__ == "__main__":
    common.define_flags()
    flags.DEFINE_integer("prompts", 4, "Prompts.", lower_bound=1)
    flags.DEFINE_integer("samples", 4, "Number of completions per prompt.", lower_bound=2)
    flags.DEFINE_integer("prompt_tokens", 320, "Padded prompt length, in tokens.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 64, "Longest allowed completion, in tokens.", lower_bound=1)
    flags.DEFINE_integer("stream_tokens", 8192, "GRPO.stream_tokens.", lower_bound=1)
    flags.DEFINE_enum("remat", "auto", ["auto", "on", "off"], "GRPO.remat.")
    app.run(main, flags_parser=parse_flags)
