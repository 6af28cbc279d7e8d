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
    SHAPING,
    BuiltIn,
    grade_batch,
    grade_boxed,
    grade_hash,
    load_reward,
)
from tinylora_jax.rewards.shaping import relative_brevity
from tinylora_jax.rewards.weighted import WeightedRewards, accuracy_name, accuracy_of

__all__ = [
    "BUILT_IN",
    "SHAPING",
    "BatchReward",
    "BuiltIn",
    "Grade",
    "MathReward",
    "Reward",
    "RewardError",
    "WeightedRewards",
    "accuracy_name",
    "accuracy_of",
    "extract_boxed",
    "extract_hash",
    "extract_last_number",
    "grade_batch",
    "grade_boxed",
    "grade_hash",
    "is_equal",
    "load_reward",
    "normalize",
    "relative_brevity",
    "unpayable",
]
