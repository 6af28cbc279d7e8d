"""Sampling and generation as jitted programs."""

from tinylora_jax.rollout.continuous import ContinuousBatch as ContinuousBatch
from tinylora_jax.rollout.continuous import Progress as Progress
from tinylora_jax.rollout.continuous import QueueSizes as QueueSizes
from tinylora_jax.rollout.continuous import lower_continuous as lower_continuous
from tinylora_jax.rollout.generate import Completions as Completions
from tinylora_jax.rollout.generate import decode_step as decode_step
from tinylora_jax.rollout.generate import empty_state as empty_state
from tinylora_jax.rollout.generate import generate as generate
from tinylora_jax.rollout.sampling import Sampling as Sampling
from tinylora_jax.rollout.sampling import completion_keys as completion_keys
from tinylora_jax.rollout.sampling import sample as sample
from tinylora_jax.rollout.stream import stream as stream
