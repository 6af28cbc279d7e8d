"""Measures many adapters in one batch: tokens per second, and the time to load and switch adapters.

    python -m experiments.benchmarks.adapters --model=random:qwen2.5-0.5b --adapters=1000 --rows=256 --new_tokens=128

The adapters are first written to disk and then read from there. With --peft=N, N of them also answer in transformers
with PEFT on the same weights, one after the other; this needs a model from files, torch and peft.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.benchmarks import common, peers
from experiments.common.cli import use_compilation_cache
from experiments.common.opening import parse_flags
from experiments.common.progress import tell
from tinylora_jax.adapters import AdaptedKernel, Factors, Policy
from tinylora_jax.extras import lacking
from tinylora_jax.io.adapter import AdapterReader, base_fingerprint, save_adapter
from tinylora_jax.models import ModelConfig
from tinylora_jax.multihost import to_host
from tinylora_jax.rollout import Completions, Sampling, generate

FLAGS = flags.FLAGS


def write_adapters(root: Path, model: common.Model, count: int) -> tuple[list[Path], np.ndarray]:
    """Writes different adapters of one model as bfloat16 files; returns folders and vectors."""
    factors, fingerprint = model.policy.factors, base_fingerprint(model.policy.params)
    rng = np.random.default_rng(0)
    v = rng.normal(0, 0.02, (count, factors.num_groups, factors.spec.u)).astype(jnp.bfloat16)
    folders = [root / str(place) for place in range(count)]
    save_adapter(folders[0], factors, jnp.asarray(v[0], jnp.float32), FLAGS.model, fingerprint=fingerprint)
    text = (folders[0] / "adapter.json").read_text()
    sha256 = lambda row: hashlib.sha256(row.tobytes()).hexdigest()
    for folder, row in zip(folders[1:], v[1:], strict=True):  # `save_adapter` would compute the same probes each time
        folder.mkdir()
        (folder / "vector.bin").write_bytes(row.tobytes())
        (folder / "adapter.json").write_text(text.replace(sha256(v[0]), sha256(row)))
    return folders, v.astype(np.float32)


@partial(jax.jit, static_argnames=("config", "new_tokens"))
def _answer(config: ModelConfig, policy: Policy, v: Any, prompts: Any, key: Any, new_tokens: int) -> Completions:
    return generate(config, policy(v), *prompts, key, Sampling(new_tokens))


@jax.jit
def _cores(policy: Policy, v: jax.Array) -> list[jax.Array]:
    """The parts of the weights that an adapter changes."""
    adapted = lambda leaf: isinstance(leaf, AdaptedKernel)
    return [leaf.core for leaf in jax.tree.leaves(policy(v), is_leaf=adapted) if adapted(leaf)]


def throughput(model: common.Model, v: np.ndarray, rows: int) -> dict[str, float]:
    """Tokens per second over batches until every adapter has answered, and the same with a single adapter."""
    prompts = common.random_prompts(model.config, rows, FLAGS.prompt_tokens)
    padded = np.concatenate([v, v[: -len(v) % rows]])  # the last batch runs the same program; padding is not counted
    batches = padded.reshape(-1, rows, *v.shape[1:])

    def run(vectors: Sequence[np.ndarray], index: int) -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(index), len(vectors))
        calls = zip(vectors, keys, strict=True)
        answer = partial(_answer, model.config, model.policy, new_tokens=FLAGS.new_tokens)
        return [answer(jnp.asarray(each), prompts, key).tokens for each, key in calls]

    own = common.measure(partial(run, list(batches)))
    compiled = _answer._cache_size()
    shared = common.measure(partial(run, [v[0]] * len(batches)), profiled=False)
    if _answer._cache_size() != compiled + 1:
        raise AssertionError("a batch of other adapters must not compile anything")
    per_batch = FLAGS.new_tokens * rows * len(batches)
    return {
        "another adapter in every row: tokens per second": len(v) * FLAGS.new_tokens / own.median_s,
        "one adapter in all rows: tokens per second": per_batch / shared.median_s,
        "ratio, filler of the last batch counted": shared.median_s / own.median_s,
    }


def _median_ms(run: Callable[[Any], Any], over: Sequence[Any]) -> tuple[float, float]:
    """Milliseconds of the first call, and the median of the others."""
    seconds = []
    for item in over:
        started = time.perf_counter()
        jax.block_until_ready(run(item))
        seconds.append(time.perf_counter() - started)
    return 1e3 * seconds[0], 1e3 * statistics.median(seconds[1:])


def switching(model: common.Model, factors: Factors, folders: Sequence[Path], v: np.ndarray) -> dict[str, float]:
    """Milliseconds to read an adapter, to copy it to the device, and to answer with a new and with the same one."""
    reader, policy = AdapterReader(model.policy.params, factors), model.policy
    first_read, read = _median_ms(reader.read, folders)
    put = _median_ms(jax.device_put, v)[1]
    first, switch = _median_ms(lambda folder: _cores(policy, jax.device_put(reader.read(folder))), folders)
    prompt = common.random_prompts(model.config, 1, FLAGS.prompt_tokens)
    token = lambda each: _answer(model.config, policy, jnp.asarray(each), prompt, jax.random.key(0), 1).tokens
    few = v[:32]
    another, same = _median_ms(token, few)[1], _median_ms(token, [v[0]] * len(few))[1]
    return {
        "read from disk, ms": read,
        "read from disk, the first, ms": first_read,
        "host to device, ms": put,
        "read, to the device, into the weights, ms": switch,
        "the same, the first, ms": first,
        "one token, another adapter each time, ms": another,
        "one token, the same adapter, ms": same,
    }


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    with common.measuring(alone=True), tempfile.TemporaryDirectory() as root:
        if FLAGS.peft and FLAGS.model.startswith("random:"):
            raise ValueError(f"--peft={FLAGS.peft} needs a model from files, got {FLAGS.model}")
        if FLAGS.peft and (missing := peers.missing("torch", "peft")):
            raise ValueError(f"--peft={FLAGS.peft}: {lacking(missing, 'test')}")
        model = common.load()
        factors = to_host(model.policy.factors)
        tell("writing the adapters")
        folders, v = write_adapters(Path(root), model, FLAGS.adapters)
        rows = min(FLAGS.rows, FLAGS.adapters)
        table = {
            "model": model.name,
            "layers": model.config.num_layers,
            "dtype": str(common.dtype()),
            "adapters × parameters": f"{len(v)} × {factors.num_params}",
            "bytes of an adapter": (folders[0] / "vector.bin").stat().st_size,
            "rows of a batch": rows,
            "prompt tokens, new tokens": f"{FLAGS.prompt_tokens}, {FLAGS.new_tokens}",
            **throughput(model, v, rows),
            **switching(model, factors, folders, v),
        }
        if FLAGS.peft:
            prompt = np.asarray(common.random_prompts(model.config, 1, FLAGS.prompt_tokens)[1])
            table |= peers.their_adapters(Path(root), factors, v[: FLAGS.peft], prompt, FLAGS.new_tokens)
    common.report("adapters", table)


if __name__ == "__main__":
    common.define_flags()
    flags.DEFINE_integer("adapters", 16, "Number of different adapters.", lower_bound=2)
    flags.DEFINE_integer("rows", 8, "Number of rows in a batch, each with a different adapter.", lower_bound=1)
    flags.DEFINE_integer("prompt_tokens", 16, "Length of every prompt, in tokens.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 8, "Tokens generated per row; no row stops early.", lower_bound=1)
    flags.DEFINE_integer("peft", 0, "Number of adapters to run with PEFT too, one by one.", lower_bound=0)
    app.run(main, flags_parser=parse_flags)
