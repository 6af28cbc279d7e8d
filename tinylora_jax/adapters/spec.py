"""The frozen description of what TinyLoRA trains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinylora_jax.adapters.projections import projection
from tinylora_jax.adapters.targets import LINEAR_MAPS, Target

_MAX_PROJECTION = 2**20  # numbers in one module's P; u > r² matrices only repeat directions


@dataclass(frozen=True)
class TinyLoRA:
    """A frozen, hashable description of what to train; the trained vector has `u` numbers per tie group.

    Attributes:
      rank: r, the rank of the truncated SVD (2 in the paper's main experiments).
      u: number of trained parameters per tie group.
      n_tie: number of modules per tie group.
      tying: `tiled` (ties adjacent modules of any type) or `structured` (ties modules of the same type).
      targets: regular expressions over leaf paths, or `Target`s for kernels that are not `[in, out]`.
      seed: seed of the fixed projections P.
      projection: `random` as in the paper, or `standard`. With `standard` each Pᵢ has a single nonzero entry, a one, so
        that the u = rank² numbers of a group are the entries of its matrix R; without tying, this is LoRA-XS.

    >>> TinyLoRA(rank=0)
    Traceback (most recent call last):
    ...
    ValueError: TinyLoRA needs rank >= 1, got 0
    """

    rank: int = 2
    u: int = 1
    n_tie: int = 1
    tying: str = "tiled"
    targets: tuple[str | Target, ...] = LINEAR_MAPS
    seed: int = 0
    projection: str = "random"

    needs_svd = True

    def __post_init__(self):
        for name in ("rank", "u", "n_tie"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"TinyLoRA needs {name} >= 1, got {value!r}")
        if self.u * self.rank**2 > _MAX_PROJECTION:
            raise ValueError(f"TinyLoRA u={self.u} at rank {self.rank}: u · rank² must be at most {_MAX_PROJECTION}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"TinyLoRA needs an integer seed >= 0, got {self.seed!r}")
        if self.tying not in ("tiled", "structured"):
            raise ValueError(f"TinyLoRA tying {self.tying!r}: expected 'tiled' or 'structured'")
        if self.projection not in ("random", "standard"):
            raise ValueError(f"TinyLoRA projection {self.projection!r}: expected 'random' or 'standard'")
        if self.projection == "standard" and self.u != self.rank**2:
            need = f"needs u = {self.rank**2}, got {self.u}"
            raise ValueError(f"TinyLoRA projection='standard' at rank {self.rank} {need}")
        if not self.targets or isinstance(self.targets, str):
            raise ValueError(f"TinyLoRA targets {self.targets!r}: expected a tuple of patterns or Targets, not empty")
        object.__setattr__(self, "targets", tuple(t if isinstance(t, Target) else Target(t) for t in self.targets))

    def P(self, module_name: str) -> np.ndarray:
        """The fixed projections of a module, float32 `[u, rank, rank]`."""
        if self.projection == "standard":
            return np.eye(self.u, dtype=np.float32).reshape(self.u, self.rank, self.rank)
        return projection(self.seed, module_name, self.u, self.rank)


def lora_xs(rank: int = 2, targets: tuple[str | Target, ...] = LINEAR_MAPS) -> TinyLoRA:
    """LoRA-XS (arXiv 2405.17604): one trained matrix R `[rank, rank]` per module, ΔW = U Σ R Vᵀ.

    >>> lora_xs(2).u
    4
    """
    return TinyLoRA(rank, u=rank**2, n_tie=1, targets=targets, projection="standard")
