"""Losses, the training state and the jitted GRPO step."""

from tinylora_jax.training.batch import Batch as Batch
from tinylora_jax.training.batch import Microbatch as Microbatch
from tinylora_jax.training.batch import SequenceShape as SequenceShape
from tinylora_jax.training.batch import pack as pack
from tinylora_jax.training.batch import sequence_shapes as sequence_shapes
from tinylora_jax.training.batch import unpack as unpack
from tinylora_jax.training.grpo import GRPO as GRPO
from tinylora_jax.training.grpo import Metrics as Metrics
from tinylora_jax.training.grpo import Plan as Plan
from tinylora_jax.training.grpo import grpo_loss as grpo_loss
from tinylora_jax.training.grpo import score as score
from tinylora_jax.training.logprobs import packed_logprobs as packed_logprobs
from tinylora_jax.training.losses import group_advantages as group_advantages
from tinylora_jax.training.plan import Bounds as Bounds
from tinylora_jax.training.plan import plan_sequences as plan_sequences
from tinylora_jax.training.plan import plan_update as plan_update
from tinylora_jax.training.sft import SFT_OBJECTIVE as SFT_OBJECTIVE
from tinylora_jax.training.sft import solutions_batch as solutions_batch
from tinylora_jax.training.state import Optimizer as Optimizer
from tinylora_jax.training.state import TrainState as TrainState
from tinylora_jax.training.state import init_state as init_state
from tinylora_jax.training.update import DivergenceError as DivergenceError
from tinylora_jax.training.update import Objective as Objective
from tinylora_jax.training.update import Update as Update
from tinylora_jax.training.update import empty_microbatches as empty_microbatches
from tinylora_jax.training.update import finite_metrics as finite_metrics
