"""Plans an update: sequences for every device, as long as memory allows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from tinylora_jax.models import ModelConfig
from tinylora_jax.models.sharding import AXES, DATA, FSDP, dividing
from tinylora_jax.training.batch import SequenceShape, sequence_shapes
from tinylora_jax.training.grpo import GRPO, Plan

_ROOM = 2  # places in a row per token: a TPU computes all of them, while a GPU skips empty ones
_SHARE = 0.6  # of device memory for activations; without recomputation a 7B model uses 45 of a v5p's 95 GB
_UNKNOWN_BYTES = 8e9  # if the device does not report its memory
# Shorter sequences are slightly slower, but recomputing the blocks costs a third of the update.
_SHORTER = (1.0, 0.75, 0.5)


class Bounds(NamedTuple):
    """The largest rollout of a run.

    Attributes:
      prompts: number of prompts.
      prompt_tokens: padded prompt length, in tokens.
      samples: number of completions per prompt.
      completion_tokens: longest completion, in tokens.
    """

    prompts: int
    prompt_tokens: int
    samples: int
    completion_tokens: int

    @property
    def tokens(self) -> int:
        """Number of tokens of prompts and completions if all have the greatest length."""
        return self.prompts * (self.prompt_tokens + self.samples * self.completion_tokens)


def plan_sequences(mesh: Mesh | None, bounds: Bounds, stream_tokens: int) -> tuple[tuple[SequenceShape, ...], int]:
    """Chooses the shapes of an update's sequences, and how many of them run at once.

    Each device gets one sequence, and sequences are shortened if some devices would otherwise get none. If even the
    shortest are too many for the longest rollout, each group of devices that share a layer's weights gets one.

    Args:
      mesh: device mesh; None for a single device.
      bounds: bounds of the largest rollout.
      stream_tokens: largest number of tokens in a sequence.
    """
    if mesh is None:
        return sequence_shapes(*bounds, stream_tokens), 1
    for sequences in (mesh.size, mesh.shape[DATA] * mesh.shape[FSDP]):
        shapes = sequence_shapes(*bounds, min(stream_tokens, -(-bounds.tokens // sequences)), _ROOM)
        if shapes[-1].tokens * sequences <= 2 * bounds.tokens:
            break
    return shapes, sequences


def activation_bytes(plan: Plan, dtype: DTypeLike, mesh: Mesh | None) -> float:
    """Estimates the activation bytes per device that the backward pass needs without recomputation.

    Args:
      plan: plan of the update.
      dtype: dtype of the weights.
      mesh: device mesh; None for a single device.
    """
    c = plan.config
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    # A block stores the inputs and outputs of its two norms, q, k, v twice (sequences and rows), the attention output,
    # and four arrays of the MLP's width.
    kept = 6 * c.hidden_size + 4 * heads + 4 * c.intermediate_size
    shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in dividing(mesh, AXES, plan.sequences))
    return float(plan.sequences // shards * plan.shapes[0].tokens * c.num_layers * np.dtype(dtype).itemsize * kept)


def plan_update(
    config: ModelConfig,
    grpo: GRPO,
    temperature: float,
    bounds: Bounds,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    device_bytes: float | None = None,
) -> Plan:
    """Plans an update whose activations fit: with shorter sequences if that suffices, else with recomputation.

    Args:
      config: architecture of the model.
      grpo: GRPO settings; `remat="auto"` leaves the choice to this function.
      temperature: sampling temperature of the policy.
      bounds: bounds of the largest rollout.
      dtype: dtype of the weights.
      mesh: device mesh; None for a single device.
      device_bytes: memory of one device in bytes; None if unknown.
    """

    def planned(share: float) -> Plan:
        shapes, sequences = plan_sequences(mesh, bounds, max(1, int(share * grpo.stream_tokens)))
        longest, remat = bounds.completion_tokens, grpo.remat == "on"
        return Plan(config, grpo, temperature, longest, shapes, sequences, remat, bounds.prompts)

    memory = _SHARE * (_UNKNOWN_BYTES if device_bytes is None else device_bytes)
    if grpo.remat == "auto":
        for share in _SHORTER if device_bytes is not None else (1.0,):
            plan = planned(share)
            if activation_bytes(plan, dtype, mesh) <= memory:
                return plan
        return replace(planned(1.0), remat=True)
    return planned(1.0)
