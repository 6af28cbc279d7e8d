"""Finds a mesh and sizes that fit a topology: predicts first, then verifies by compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from experiments.aot import estimate
from experiments.aot.chips import Topology
from experiments.aot.programs import Case
from experiments.common.fitting import ROOM, rollout_bytes
from experiments.common.progress import tell
from tinylora_jax.models import MeshSpec

_MOST_COMPILED = 4


class Candidate(NamedTuple):
    """A choice of settings and its predictions."""

    topology: Topology
    mesh: MeshSpec
    slots: int
    stream_tokens: int
    predicted_bytes: float
    tokens_per_s: float


MakeCase = Callable[[Topology, MeshSpec, int, int], Case]


def predict(case: Case, topology: Topology) -> tuple[float, float]:
    """Predicts bytes per device during decoding, and tokens per second of all devices at the bandwidth limit.

    A step also reduces two activations per layer over the devices that share its weights.
    """
    c, model = case.config, case.model
    weights = estimate.weight_bytes(case)
    cache = estimate.cache_bytes(case, c.max_prompt_tokens + c.max_new_tokens)
    shared = case.mesh.size // case.mesh.shape["data"]
    reduced = 16.0 * model.num_layers * case.slots / case.mesh.shape["data"] * model.hidden_size * (1 - 1 / shared)
    step = (weights + cache) / topology.chip.bandwidth + reduced / topology.chip.ici
    refilled = case.slots < case.rows
    return rollout_bytes(model, c, case.mesh, case.slots, joined=False, refilled=refilled), case.slots / step


def candidates(topologies: Sequence[Topology], make: MakeCase, rows: int, stream_tokens: int) -> Iterator[Candidate]:
    """Every mesh without `fsdp` (decoding should not gather weights), with all slots, half of them, a quarter, …"""
    for topology in topologies:
        devices = len(topology.devices)
        for tensor in (n for n in range(1, devices + 1) if devices % n == 0):
            slots = rows
            while slots >= max(1, devices // tensor):
                mesh = MeshSpec(tensor=tensor)
                predicted, speed = predict(make(topology, mesh, slots, stream_tokens), topology)
                if predicted <= ROOM * topology.chip.hbm_bytes:
                    yield Candidate(topology, mesh, slots, stream_tokens, predicted, speed)
                    break  # fewer slots would only be slower
                slots //= 2


def ranked(topologies: Sequence[Topology], found: Iterable[Candidate]) -> list[Candidate]:
    """Sorts by number of devices, then by the user's order of topologies, then by speed."""
    named = [topology.name for topology in topologies]
    return sorted(found, key=lambda c: (len(c.topology.devices), named.index(c.topology.name), -c.tokens_per_s))


def search(
    topologies: Sequence[Topology],
    make: MakeCase,
    rows: int,
    stream_tokens: int,
    prove: Callable[[Case, Topology], dict[str, Any]],
) -> dict[str, Any]:
    """Finds the cheapest candidate that compiles and fits.

    Args:
      topologies: topologies to choose from; among equal numbers of devices, the cheaper one must come first.
      make: function from a topology, a mesh, slots and sequence tokens to a case.
      rows: number of completions of a rollout.
      stream_tokens: number of tokens differentiated at once, from the configuration.
      prove: function that compiles a case and returns its summary.

    Raises:
      ValueError: nothing fits.
    """
    found = ranked(topologies, candidates(topologies, make, rows, stream_tokens))
    for candidate in found[:_MOST_COMPILED]:
        for tokens in (candidate.stream_tokens, candidate.stream_tokens // 2):
            tell(
                f"trying {candidate.topology.name}, mesh 0,1,{candidate.mesh.tensor}, {candidate.slots} slots,"
                f" sequences of {tokens} tokens: {candidate.predicted_bytes / 1e9:.1f} GB predicted"
            )
            result = prove(make(candidate.topology, candidate.mesh, candidate.slots, tokens), candidate.topology)
            if result["fits"]:
                chosen = {"tensor": candidate.mesh.tensor, "slots": candidate.slots, "stream_tokens": tokens}
                return {**result, "suggestion": chosen}
            if all(p["fits"] for p in result["programs"] if not p["program"].startswith("update")):
                continue  # only the update is too large: try shorter sequences
            break
    names = ", ".join(t.name for t in topologies)
    raise ValueError(
        f"nothing fits {names}: even the smallest pool of slots needs more memory; use a larger topology,"
        " or lower config.max_new_tokens or config.batch_size"
    )
