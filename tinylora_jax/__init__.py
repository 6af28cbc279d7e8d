"""TinyLoRA in JAX/Flax: reinforcement learning of language models in as few as 13 parameters.

Transforms of any pytree of weights, in the order of use:

    factors = factorize(params, TinyLoRA(rank=2, u=1, n_tie=16))    # once: an SVD of each adapted weight
    v = init(factors)                                               # zeros; the only trained parameters
    adapted = apply(params, factors, v)                             # base and update separate; needs `matmul`
    merged = merge(params, factors, v)                              # dense weights, for any other code

`Policy(params, factors)` holds the frozen part: `policy(v)` is `apply`. Subpackages build on this: `models` (a
decoder), `rollout` (`generate`, `stream`), `training` (GRPO), `data`, `rewards` and `io` (`io.load_pretrained`,
`io.adapter.save_adapter`, `io.adapter.load_adapter`, `io.peft`). The command-line programs are in `experiments`.
"""

from tinylora_jax.adapters import (
    AdaptedKernel,
    Factors,
    Policy,
    Target,
    TinyLoRA,
    apply,
    delta,
    factorize,
    init,
    matmul,
    merge,
)

__version__ = "0.1.0"  # read by setup.py too

__all__ = [
    "AdaptedKernel",
    "Factors",
    "Policy",
    "Target",
    "TinyLoRA",
    "apply",
    "delta",
    "factorize",
    "init",
    "matmul",
    "merge",
]
