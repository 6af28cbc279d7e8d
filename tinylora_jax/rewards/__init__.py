"""Extraction of answers from completions and exact-match grading; plain Python, no JAX."""

from tinylora_jax.rewards.answers import (
    extract_boxed,
    extract_hash,
    extract_last_number,
    is_equal,
    normalize,
)
from tinylora_jax.rewards.reward import (
    Grade,
    Reward,
    RewardError,
    grade_batch,
    grade_boxed,
    grade_hash,
    load_reward,
)

__all__ = [
    "Grade",
    "Reward",
    "RewardError",
    "extract_boxed",
    "extract_hash",
    "extract_last_number",
    "grade_batch",
    "grade_boxed",
    "grade_hash",
    "is_equal",
    "load_reward",
    "normalize",
]
