"""Losses, the trained state and the jitted GRPO step."""

from tinylora_jax.training.grpo import GRPO as GRPO
from tinylora_jax.training.grpo import Batch as Batch
from tinylora_jax.training.grpo import make_grpo_step as make_grpo_step
from tinylora_jax.training.grpo import score as score
from tinylora_jax.training.logprobs import completion_logprobs as completion_logprobs
from tinylora_jax.training.losses import group_advantages as group_advantages
from tinylora_jax.training.state import Optimizer as Optimizer
from tinylora_jax.training.state import TrainState as TrainState
from tinylora_jax.training.state import init_state as init_state
