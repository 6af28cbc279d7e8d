"""What an update is compiled for: sequences that give every device some, as long as the memory allows."""

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

_ROOM = 2  # places in a row for each token: a TPU computes all of them, where a GPU skips those of no token
_SHARE = 0.6  # of the device's memory for activations; the 7B without recomputation has 45 GB of v5p's 95 in use
_UNKNOWN_BYTES = 8e9  # where the device does not say
# Shorter sequences are a little slower, but recomputing the blocks costs a third of the update.
_SHORTER = (1.0, 0.75, 0.5)


class Bounds(NamedTuple):
    """The largest rollout of a run.

    Attributes:
      prompts: number of prompts.
      prompt_tokens: padded width of the prompts.
      samples: completions per prompt.
      completion_tokens: longest completion.
    """

    prompts: int
    prompt_tokens: int
    samples: int
    completion_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of prompts and completions when all are of the greatest length."""
        return self.prompts * (self.prompt_tokens + self.samples * self.completion_tokens)


def plan_sequences(mesh: Mesh | None, bounds: Bounds, stream_tokens: int) -> tuple[tuple[SequenceShape, ...], int]:
    """The shapes of an update's sequences, and how many of them run at once.

    There is one sequence for every device, and sequences are shorter if it takes that to give each of them something.
    Where even the shortest are too many for the longest rollout, there is one for every group of devices that share a
    layer's weights.

    Args:
      mesh: devices; None for a single one.
      bounds: largest rollout.
      stream_tokens: most tokens of a sequence.
    """
    if mesh is None:
        return sequence_shapes(*bounds, stream_tokens), 1
    for sequences in (mesh.size, mesh.shape[DATA] * mesh.shape[FSDP]):
        shapes = sequence_shapes(*bounds, min(stream_tokens, -(-bounds.tokens // sequences)), _ROOM)
        if shapes[-1].tokens * sequences <= 2 * bounds.tokens:
            break
    return shapes, sequences


def activation_bytes(plan: Plan, dtype: DTypeLike, mesh: Mesh | None) -> float:
    """Bytes on one device of what the blocks keep for the backward pass when nothing is recomputed.

    Args:
      plan: plan of the update.
      dtype: dtype of the weights.
      mesh: devices; None for a single one.
    """
    c = plan.config
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    # A block keeps its two norms' inputs and outputs, q, k, v twice (sequences and rows), the mixed heads, and four
    # arrays of the MLP's width.
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
    """The plan of an update whose activations fit: by shorter sequences if that is enough, else by recomputing them.

    Args:
      config: architecture.
      grpo: settings; `remat="auto"` leaves the choice to this function.
      temperature: temperature of the policy.
      bounds: largest rollout.
      dtype: dtype of the weights.
      mesh: devices; None for a single one.
      device_bytes: memory of one device; None where it is not known.
    """

    def planned(share: float) -> Plan:
        shapes, sequences = plan_sequences(mesh, bounds, max(1, int(share * grpo.stream_tokens)))
        return Plan(config, grpo, temperature, bounds.completion_tokens, shapes, sequences, grpo.remat == "on")

    memory = _SHARE * (_UNKNOWN_BYTES if device_bytes is None else device_bytes)
    if grpo.remat == "auto":
        for share in _SHORTER if device_bytes is not None else (1.0,):
            plan = planned(share)
            if activation_bytes(plan, dtype, mesh) <= memory:
                return plan
        return replace(planned(1.0), remat=True)
    return planned(1.0)
