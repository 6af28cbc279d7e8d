"""Scores of evaluations with intervals, and tests of the difference between two; without JAX."""

from tinylora_jax.metrics.paired import Difference, compare_means, compare_paired, compare_right_or_wrong
from tinylora_jax.metrics.scores import Estimate, estimate, majority, pass_at_k

__all__ = [
    "Difference",
    "Estimate",
    "compare_means",
    "compare_paired",
    "compare_right_or_wrong",
    "estimate",
    "majority",
    "pass_at_k",
]
