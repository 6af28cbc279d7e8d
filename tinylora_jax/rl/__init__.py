"""One GRPO iteration as library calls: rollout, grading, advantages and update."""

from tinylora_jax.rl._distillation import DistillationLearner as DistillationLearner
from tinylora_jax.rl._distillation import Teacher as Teacher
from tinylora_jax.rl._distillation import distillation_advantages as distillation_advantages
from tinylora_jax.rl._evolution import EvolutionLearner as EvolutionLearner
from tinylora_jax.rl._learner import Learner as Learner
from tinylora_jax.rl._learner import Underway as Underway
from tinylora_jax.rl._learner import plan as plan
from tinylora_jax.rl._learner import rollout_metrics as rollout_metrics
from tinylora_jax.rl._refill import Refilled as Refilled
from tinylora_jax.rl._refill import refill as refill
from tinylora_jax.rl._refill import refill_sizes as refill_sizes
from tinylora_jax.rl._rollout import GradedRollout as GradedRollout
from tinylora_jax.rl._rollout import Rollout as Rollout
from tinylora_jax.rl._rollout import grade as grade
from tinylora_jax.rl._rollout import lower_rollout as lower_rollout
from tinylora_jax.rl._rollout import rollout as rollout
from tinylora_jax.rl._rollout import step_key as step_key
