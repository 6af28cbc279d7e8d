"""Measures the cost of merging inside the compiled step, compared with the unmerged loss and gradient.

python -m experiments.benchmarks.merging --model=random:smollm2-135m --layers=2 --rows=4 --tokens=256

Merging is for forward code that cannot use an unmerged kernel. With merged weights, the backward pass computes dL/dW
for every adapted matrix, which costs one more product per matrix, and holds a second copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.benchmarks import common
from experiments.common.architectures import matrix_params
from experiments.common.cli import use_compilation_cache
from experiments.common.opening import parse_flags
from tinylora_jax.adapters import apply, merge
from tinylora_jax.models import forward

FLAGS = flags.FLAGS


def make_step(model: common.Model, transform: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a loss of the last hidden states and its gradient as a function of `(v, policy, tokens)`."""

    def loss(v, policy, tokens):
        hidden, _ = forward(model.config, transform(policy.params, policy.factors, v), tokens)
        return jnp.mean(hidden.astype(jnp.float32) ** 2)

    return jax.jit(jax.value_and_grad(loss))


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    with common.measuring(alone=True):
        model = common.load()
        tokens = common.random_prompts(model.config, FLAGS.rows, FLAGS.tokens)[1]
        rows = {
            "model": model.name,
            "dtype": str(common.dtype()),
            "layers": model.config.num_layers,
            "rows × tokens": f"{FLAGS.rows} × {FLAGS.tokens}",
            "adapted weights, MB": matrix_params(model.config, head=False) * common.dtype().itemsize / 1e6,
        }
        for name, transform in (("unmerged", apply), ("merged", merge)):
            step = make_step(model, transform).lower(model.v, model.policy, tokens).compile()
            timing = common.measure(lambda index, step=step: step(model.v * (1 + index), model.policy, tokens))
            rows |= {
                f"{name}: seconds": timing.median_s,
                f"{name}: operations, G (XLA)": step.cost_analysis()["flops"] / 1e9,
                f"{name}: temporary memory, MB (XLA)": step.memory_analysis().temp_size_in_bytes / 1e6,
            }
        for what in ("seconds", "operations, G (XLA)", "temporary memory, MB (XLA)"):
            rows[f"merged over unmerged: {what.split(',')[0]}"] = rows[f"merged: {what}"] / rows[f"unmerged: {what}"]
    common.report("merging", rows)


if __name__ == "__main__":
    common.define_flags()
    flags.DEFINE_integer("rows", 4, "Number of rows of tokens.", lower_bound=1)
    flags.DEFINE_integer("tokens", 256, "Number of tokens per row.", lower_bound=2)
    app.run(main, flags_parser=parse_flags)
