"""Measures the seconds to factorize a model's matrices by each method, and the differences of updates.

python -m experiments.benchmarks.factorize --model=random:qwen2.5-0.5b --methods=exact,subspace
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.benchmarks import common
from experiments.common.cli import use_compilation_cache
from experiments.common.opening import parse_flags
from tinylora_jax.adapters import TinyLoRA, delta, factorize

FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    with common.measuring():
        model = common.load()
        spec = TinyLoRA(rank=FLAGS.rank, n_tie=model.policy.factors.spec.n_tie)
        rows, deltas = {"model": model.name, "rank": FLAGS.rank}, []
        for method in FLAGS.methods:
            kept = {}

            def run(index, method=method, kept=kept):
                kept["factors"] = factorize(model.policy.params, spec, method)
                return kept["factors"]

            timing = common.measure(run)
            rows[f"{method}, seconds"] = timing.median_s
            rows[f"{method}, first call, seconds"] = timing.first_s
            deltas.append(delta(kept["factors"], jnp.ones_like(model.v)))
        if len(deltas) == 2:
            far = jax.tree.map(lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)), *deltas)
            rows["largest relative difference of ΔW"] = max(jax.tree.leaves(far))
        rows["modules"] = sum(len(leaf.groups) for leaf in model.policy.factors.leaves.values())
    common.report("factorize", rows)


if __name__ == "__main__":
    common.define_flags()
    flags.DEFINE_list("methods", ["exact", "subspace"], "SVD methods to time.")
    flags.DEFINE_integer("rank", 2, "Rank.", lower_bound=1)
    app.run(main, flags_parser=parse_flags)
