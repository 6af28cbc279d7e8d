"""What every test runs under: one platform, strict dtypes, warnings as errors, nothing from the network."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib  # noqa: E402
import io  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import matplotlib.image  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tinylora_jax import AdaptedKernel, Factors, Policy, TinyLoRA, factorize  # noqa: E402
from tinylora_jax.adapters import FullPolicy, FusedKernel, LoRAPolicy, OffsetPolicy, QuantizedKernel, Shifted  # noqa: E402
from tinylora_jax.adapters.factors import LeafFactors  # noqa: E402
from tinylora_jax.models import (  # noqa: E402
    KVCache,
    ModelConfig,
    Packing,
    QuantizedEntries,
    Rope,
    forward,
    init_params,
    logits,
)
from tinylora_jax.rollout import Completions, Progress, continuous  # noqa: E402
from tinylora_jax.training import Batch, Microbatch, TrainState  # noqa: E402

generate_module = importlib.import_module("tinylora_jax.rollout.generate")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The type-checking hook also checks the fields of dataclasses. But JAX rebuilds pytrees with whatever a
# transformation puts in them (shapes, shardings, what `lower` reports), and so may tests.
for _pytree in (
    *(
        AdaptedKernel,
        FusedKernel,
        Batch,
        Completions,
        Factors,
        FullPolicy,
        KVCache,
        LeafFactors,
        LoRAPolicy,
        Packing,
        Policy,
        QuantizedEntries,
        QuantizedKernel,
        Microbatch,
        OffsetPolicy,
        Shifted,
        TrainState,
    ),
    *(generate_module._Prefilled, generate_module._Slots, generate_module._State, Progress, continuous._Buffers),
):
    _pytree.__init__ = getattr(_pytree.__init__, "__wrapped__", _pytree.__init__)

# Later lines win, so the exceptions stand after the rule.
_WARNINGS = (
    "error",
    "ignore:builtin type .* has no __module__ attribute:DeprecationWarning",  # SWIG modules (sentencepiece)
)


collect_ignore = [
    "type_checking/user_code.py",
    "sharding/on_eight_devices.py",
    "sharding/load_on_eight_devices.py",
    "sharding/decode_on_eight_devices.py",
]  # set their own number of devices


_MOST_BYTES = 3 * 2**30


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Forgets compiled programs after a file of tests when the process has grown large: two of them share a machine."""
    yield
    with open("/proc/self/statm") if sys.platform == "linux" else io.StringIO("0 0") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize()
    if resident > _MOST_BYTES:
        jax.clear_caches()


def pytest_addoption(parser):
    """Options of tests/fuzz and of the kills, which only this file can define."""
    parser.addoption(
        "--kills", type=int, default=20, help="How many processes tests/experiments/test_many_kills.py kills."
    )
    parser.addoption("--kill_seed", type=int, default=None, help="Of their moments; absent: another one every time.")
    parser.addoption("--minutes", type=float, default=1.0, help="How long `-m fuzz` takes.")
    parser.addoption("--fuzz_seed", type=int, default=None, help="Of the damage; absent: another one every time.")
    parser.addoption("--fuzz_log", default=None, help="A file to which finds are added when they are found.")


def pytest_configure(config):
    """Turns warnings into errors."""
    for line in _WARNINGS:
        config.addinivalue_line("filterwarnings", line)


class Tiny(NamedTuple):
    """A model small enough to compile in a second, with nothing left at its trivial initial value."""

    config: ModelConfig
    params: Any


_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
}
FAMILIES = {
    "qwen2": ModelConfig(**_SIZES, qkv_bias=True, tie_embeddings=True, rope=Rope(theta=1e6)),
    "qwen3": ModelConfig(**{**_SIZES, "head_dim": 12}, qk_norm=True, rope=Rope(theta=1e6)),
    "llama": ModelConfig(
        **_SIZES, rope=Rope(theta=5e5, kind="llama3", factor=8.0, original_max_positions=16), rms_norm_eps=1e-5
    ),
    "smollm": ModelConfig(**{**_SIZES, "num_kv_heads": 4}, tie_embeddings=True, rope=Rope(theta=1e5)),
}


def _randomized(config: ModelConfig, seed: int) -> Any:
    """Initial weights, then norms away from 1, biases away from 0 and an embedding that gives peaked logits."""
    rng = np.random.default_rng(seed)

    def change(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        kind = path[-1].key
        new = {"scale": 1 + 0.2 * noise, "bias": 0.3 * noise, "embedding": 0.3 * noise}.get(kind)
        return leaf if new is None else jnp.asarray(new, leaf.dtype)

    return jax.tree_util.tree_map_with_path(change, init_params(config, seed))


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Tiny]:
    """The tiny model of a family, by name; made once."""
    made: dict[str, Tiny] = {}

    def get(name: str) -> Tiny:
        if name not in made:
            made[name] = Tiny(FAMILIES[name], _randomized(FAMILIES[name], seed=len(name)))
        return made[name]

    return get


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request, tiny) -> Tiny:
    """Every family in turn."""
    return tiny(request.param)


@pytest.fixture(scope="session")
def qwen2(tiny) -> Tiny:
    """The tiny model for tests that need just one."""
    return tiny("qwen2")


@pytest.fixture(scope="session")
def policy(qwen2) -> Policy:
    """The Qwen2 model with 4 vectors of 2 numbers: 14 modules in groups of 4."""
    return Policy(qwen2.params, factorize(qwen2.params, TinyLoRA(rank=2, u=2, n_tie=4, seed=3)))


@pytest.fixture(scope="session")
def v(policy) -> jax.Array:
    """A vector that moves every module visibly (ΔW about a third of W's leading part)."""
    shape = (policy.factors.num_groups, policy.factors.spec.u)
    return jnp.asarray(0.3 * np.random.default_rng(5).standard_normal(shape), jnp.float32)


# The insides of the five panels of a run's picture, as shares of it: left, right, top, bottom; without the axes.
_PANELS = (
    (0.075, 0.615, 0.105, 0.42),
    (0.695, 0.922, 0.105, 0.42),
    (0.075, 0.288, 0.575, 0.91),
    (0.421, 0.634, 0.575, 0.91),
    (0.767, 0.98, 0.575, 0.91),
)


@pytest.fixture(scope="session")
def blank_panels() -> Callable[[bytes], list[int]]:
    """Which panels of a run's PNG show nothing but paper and grid."""

    def find(png: bytes) -> list[int]:
        pixels = matplotlib.image.imread(io.BytesIO(png))[..., :3]
        height, width = pixels.shape[:2]
        inside = [
            pixels[int(top * height) : int(bottom * height), int(left * width) : int(right * width)]
            for left, right, top, bottom in _PANELS
        ]
        return [place for place, panel in enumerate(inside) if np.sum(panel.min(axis=-1) < 0.85) < 10]

    return find


@pytest.fixture(scope="session")
def full_logits() -> Callable[..., jax.Array]:
    """Logits of a forward pass without a cache, compiled: `(config, params, tokens, remat=False)`."""

    def run(config, params, tokens, remat=False):
        return logits(config, params, forward(config, params, tokens, remat=remat)[0])

    return jax.jit(run, static_argnames=("config", "remat"))
