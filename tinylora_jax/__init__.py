"""TinyLoRA in JAX/Flax: reinforcement learning of language models in as few as 13 parameters.

Transforms of any pytree of weights, in the order of their use:

    factors = factorize(params, TinyLoRA(rank=2, u=1, n_tie=16))    # once: an SVD of every adapted weight
    v = init(factors)                                               # zeros; all that is trained
    adapted = apply(params, factors, v)                             # base and update apart, for code that uses `matmul`
    merged = merge(params, factors, v)                              # dense weights, for any other code

`Policy(params, factors)` keeps the frozen part together: `policy(v)` is `apply`. The floors above: `models` (a
decoder), `rollout` (`generate`, `stream`), `training` (GRPO), `data`, `rewards`, and `io`:
`io.load_pretrained`, `io.adapter.save_adapter` and `load_adapter`, `io.peft`. What a person runs is in
`experiments`.
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
