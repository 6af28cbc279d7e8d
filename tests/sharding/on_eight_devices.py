"""Generates and updates once on eight CPU devices, and prints what came out as JSON; run as a program of its own.

    python tests/sharding/on_eight_devices.py MODEL MODES DATA FSDP TENSOR

MODEL is a family of tests/conftest.py, perhaps with the storage of the weights and of the cache, as in `llama:int4` or
`qwen2:none:int8`, and then with what is trained, as in `qwen3:none:none:offsets`. MODES is `sampled` or
`greedy,sampled`, or `natural` for natural gradients of a given rollout. Other tests share a process in which there is
one device.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import dataclasses  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from conftest import FAMILIES, _randomized  # noqa: E402

from tinylora_jax import TinyLoRA  # noqa: E402
from tinylora_jax.adapters import LoRA, adapt, biases, joint_spec, norm_scales  # noqa: E402
from tinylora_jax.io.hf import quantize_maps  # noqa: E402
from tinylora_jax.models.sharding import MeshSpec, policy_shardings  # noqa: E402
from tinylora_jax.rollout import ContinuousBatch, QueueSizes, Sampling, generate  # noqa: E402
from tinylora_jax.training import GRPO, Batch, Bounds, Optimizer, Plan, Update, init_state, plan_sequences  # noqa: E402

PROMPTS, SAMPLES, WIDTH, NEW = 8, 2, 6, 8
SPECS = {
    "tinylora": TinyLoRA(rank=2, u=2, n_tie=4, seed=3),
    "one layer": TinyLoRA(rank=2, u=2, n_tie=4, seed=3, targets=("layers/1/.*kernel",)),
    "offsets": joint_spec(biases(), [biases(), norm_scales()]),
    "frozen": LoRA(rank=2, freeze_a=True),
}
SEQUENCE_LEVEL = GRPO(importance_sampling_level="sequence", tis_mode="sequence_truncate")


def noise(cache):
    """The key of a rollout.

    Rounding to int8 is not continuous: one number in 10,000 rounds to its other neighbor where the order of a sum
    differs. With key 0 a uniform number lies on the border of two tokens.
    """
    return jax.random.key(0 if cache == "none" else 1)


def arguments(config, greedy, cache):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config.vocab_size, (PROMPTS, WIDTH)).astype(np.int32)
    lengths = np.array([3, 5, 1, 6, 2, 6, 4, 1], np.int32)
    stops = tuple(range(0, 97, 9))
    return tokens, lengths, Sampling(NEW, temperature=0.0 if greedy else 1.0, stop_tokens=stops, quantize_cache=cache)


def rollout(config, policy, v, greedy, slots=0, cache="none"):
    tokens, lengths, sampling = arguments(config, greedy, cache)
    run = jax.jit(
        lambda policy, v: generate(
            config,
            policy(v),
            jnp.arange(PROMPTS, dtype=jnp.uint32),
            tokens,
            lengths,
            noise(cache),
            sampling,
            SAMPLES,
            slots,
        )
    )
    return tokens, lengths, jax.device_get(run(policy, v))


def arriving(config, policy, v, greedy, slots, chunk, cache):
    """The completions of the same prompts if these arrive in chunks."""
    tokens, lengths, sampling = arguments(config, greedy, cache)
    sizes = QueueSizes(PROMPTS, chunk, SAMPLES, slots, WIDTH)
    batch = ContinuousBatch(config, policy, v, noise(cache), sampling, sizes)
    waiting, progress = 0, None
    while progress is None or (progress.lengths == 0).any():
        if batch.num_added < PROMPTS and not waiting:
            part = slice(batch.num_added, batch.num_added + chunk)
            batch.add(np.arange(PROMPTS, dtype=np.uint32)[part], tokens[part], lengths[part])
        batch.advance(3, batch.num_added < PROMPTS)
        progress = batch.progress()
        waiting = int(progress.waiting)
    return progress


def update(config, policy, v, mesh, tokens, lengths, completions):
    """Two updates on a rollout; the second shows a program that compiles again."""
    shape = (PROMPTS, SAMPLES, NEW)
    batch = Batch(
        prompts=tokens,
        lengths=lengths,
        completions=completions.tokens.reshape(shape),
        mask=(np.arange(NEW) < completions.lengths[:, None]).reshape(shape),
        rollout_logprobs=completions.logprobs.reshape(shape),
        advantages=np.random.default_rng(2).standard_normal(shape[:2]).astype(np.float32),
    )
    shapes, sequences = plan_sequences(mesh, Bounds(PROMPTS, WIDTH, SAMPLES, NEW), 64)
    plan = Plan(config, GRPO(), 1.0, NEW, shapes, sequences, remat=bool(mesh))
    optimizer = Optimizer(1e-2).transform()
    step, state = Update(plan, optimizer), init_state(v, optimizer)
    if mesh is not None:
        state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    state, metrics = step(state, policy, batch)
    state, _ = step(state, policy, batch)
    counts = {"compiled": step.accumulate._cache_size(), "shapes": len(shapes)}
    # The rollout is no longer on-policy: the sequence-level ratios of two updates ago differ from 1.
    sequence_level = Update(dataclasses.replace(plan, grpo=SEQUENCE_LEVEL), optimizer)
    _, sums, gradient = sequence_level.gradient(state.v, policy, batch)
    counts |= {"importance": float(sums["importance"]), "sequence_level": numbers(gradient)}
    return {"v": numbers(state.v), "grad_norm": float(metrics["grad_norm"]), "sequences": sequences} | counts


def numbers(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).tolist()


def natural(config, policy, v, mesh):
    """Gradients of prompts, and two steps with their matrix, on a rollout that no device drew."""
    rng, shape = np.random.default_rng(1), (PROMPTS, SAMPLES, NEW)
    batch = Batch(
        prompts=rng.integers(0, config.vocab_size, (PROMPTS, WIDTH)).astype(np.int32),
        lengths=np.array([3, 5, 1, 6, 2, 6, 4, 1], np.int32),
        completions=rng.integers(0, config.vocab_size, shape).astype(np.int32),
        mask=np.arange(NEW) < rng.integers(1, NEW + 1, (*shape[:2], 1)),
        rollout_logprobs=-np.abs(rng.standard_normal(shape)).astype(np.float32),
        advantages=rng.standard_normal(shape[:2]).astype(np.float32),
    )
    shapes, sequences = plan_sequences(mesh, Bounds(PROMPTS, WIDTH, SAMPLES, NEW), 64)
    plan = Plan(config, GRPO(), 1.0, NEW, shapes, sequences, remat=bool(mesh), prompts=PROMPTS)
    optimizer = Optimizer(1e-2, method="natural", kl_radius=1e-3).transform()
    step, state = Update(plan, optimizer), init_state(v, optimizer)
    if mesh is not None:
        state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    _, _, apart = step.gradient(state.v, policy, batch)
    state, _ = step(state, policy, batch)
    state, metrics = step(state, policy, batch)
    counts = {"compiled": step.accumulate._cache_size(), "shapes": len(shapes), "sequences": sequences}
    return {"apart": apart.tolist(), "v": state.v.tolist(), "step_kl": float(metrics["step_kl"])} | counts


def run(family, modes, sizes):
    """Everything on one mesh; (1, 1, 1) is one device without a mesh."""
    family, scheme, cache, method = [*family.split(":"), *("none", "none", "tinylora")[family.count(":") :]]
    config = FAMILIES[family]
    params = quantize_maps(_randomized(config, seed=3), scheme)
    policy, rng = adapt(params, SPECS[method]), np.random.default_rng(5)
    v = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), policy.init())
    mesh = None if sizes == (1, 1, 1) else MeshSpec(*sizes).make(jax.devices())
    if mesh is None:
        return measure(config, policy, v, None, modes, cache)
    with jax.set_mesh(mesh):
        return measure(config, jax.device_put(policy, policy_shardings(mesh, policy)), v, mesh, modes, cache)


def measure(config, policy, v, mesh, modes, cache):
    if modes == ["natural"]:
        return natural(config, policy, v, mesh)
    found = {}
    for mode in modes:
        tokens, lengths, completions = rollout(config, policy, v, mode == "greedy", cache=cache)
        found[mode] = {"tokens": completions.tokens.tolist(), "lengths": completions.lengths.tolist()}
        _, _, waiting = rollout(config, policy, v, mode == "greedy", 8, cache)  # half of them wait for a slot
        assert (waiting.tokens == completions.tokens).all() and (waiting.lengths == completions.lengths).all(), mode
        if len(modes) == 1:
            continue  # the fast tests
        added = arriving(config, policy, v, mode == "greedy", 8, 4, cache)
        assert (added.tokens == completions.tokens).all() and (added.lengths == completions.lengths).all(), mode
    return found | update(config, policy, v, mesh, tokens, lengths, completions)


if __name__ == "__main__":
    family, modes, *sizes = sys.argv[1:]
    print(json.dumps(run(family, modes.split(","), tuple(int(size) for size in sizes))))
