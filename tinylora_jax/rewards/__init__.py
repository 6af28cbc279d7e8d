"""Extracts answers from completions and grades them, exactly or by algebra; plain Python without JAX."""

from tinylora_jax.rewards.answers import (
    extract_boxed,
    extract_hash,
    extract_last_number,
    is_equal,
    normalize,
)
from tinylora_jax.rewards.golds import unpayable
from tinylora_jax.rewards.grade import BatchReward, Grade, Reward, RewardError
from tinylora_jax.rewards.math_reward import MathReward
from tinylora_jax.rewards.reward import (
    BUILT_IN,
    BuiltIn,
    grade_batch,
    grade_boxed,
    grade_hash,
    load_reward,
)

__all__ = [
    "BUILT_IN",
    "BatchReward",
    "BuiltIn",
    "Grade",
    "MathReward",
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
    "unpayable",
]
