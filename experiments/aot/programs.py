"""Lowers and compiles the programs of a run for devices that need not exist, and collects estimates."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from experiments.aot import hlo
from experiments.common.abstract import abstract_policy
from experiments.common.architectures import matrix_params
from experiments.common.progress import tell
from experiments.common.specs import Specs, sampling_of
from experiments.common.wording import size
from tinylora_jax.adapters import (
    BATCH_BYTES,
    Policy,
    TinyLoRA,
    batches,
    init,
    jnp_svd,
    leaves_by_path,
    mesh_of,
    select,
    subspace_svd,
    svd_shapes,
)
from tinylora_jax.io.hf import param_shapes
from tinylora_jax.models import KVCache, ModelConfig, abstract_at, abstract_everywhere, heads_axes
from tinylora_jax.rl import lower_rollout
from tinylora_jax.rollout import Sampling, decode_step, empty_state
from tinylora_jax.training import (
    Bounds,
    Microbatch,
    Plan,
    SequenceShape,
    Update,
    empty_microbatches,
    init_state,
    plan_update,
)

_STOP_TOKENS = (1, 2)  # the program depends on their number, not on their values
# "Used 17.30G of 15.75G hbm", "the total memory required for HLO temporaries (19.06G) exceeds available HBM (15.75G)"
_REFUSED = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMGT]?)\)? (?:of|exceeds)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Case:
    """A run and the devices for which it is compiled.

    Attributes:
      config: run configuration.
      specs: parsed run configuration.
      model: architecture of the model.
      mesh: device mesh.
      device_bytes: memory per device, in bytes.
      name: display name of the model; empty for `config.model`.
    """

    config: ConfigDict
    specs: Specs
    model: ModelConfig
    mesh: Mesh
    device_bytes: float
    name: str = ""

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the weights."""
        return jnp.dtype(self.config.dtype)

    @property
    def rows(self) -> int:
        """Number of completions of a rollout."""
        return self.config.batch_size * self.config.samples

    @property
    def slots(self) -> int:
        """Number of completions decoded at once."""
        return min(self.config.slots or self.rows, self.rows)

    @property
    def sampling(self) -> Sampling:
        """The sampling settings of the rollout."""
        return sampling_of(self.config, _STOP_TOKENS)

    def plan(self) -> Plan:
        """The plan of the update; the memory of the target device decides whether blocks are recomputed."""
        c = self.config
        bounds = Bounds(c.batch_size, c.max_prompt_tokens, c.samples, c.max_new_tokens)
        return plan_update(self.model, self.specs.grpo, c.temperature, bounds, self.dtype, self.mesh, self.device_bytes)

    def policy(self) -> Policy:
        """Shapes and shardings of weights and factors."""
        return _abstract_policy(self.model, self.specs.adapter, self.dtype, self.config.quantize, self.mesh)

    def vector(self) -> jax.ShapeDtypeStruct:
        """Shape and sharding of v."""
        return self.replicated(jax.eval_shape(init, self.policy().factors))

    def replicated(self, tree: Any) -> Any:
        """The shapes of a tree that is replicated on every device."""
        return abstract_everywhere(tree, self.mesh)


@lru_cache(maxsize=4)
def _abstract_policy(model: ModelConfig, adapter: TinyLoRA, dtype: jnp.dtype, quantize: str, mesh: Mesh) -> Policy:
    return abstract_policy(param_shapes(model, dtype, quantize), adapter, mesh)


class Program(NamedTuple):
    """A program with its number of operations per device, `flops`, according to the model's arithmetic."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    flops: float
    tokens: int


@dataclass(frozen=True)
class Compiled:
    """The compiler's results for a program, per device.

    Attributes:
      name: name of the program.
      seconds: time to trace, lower and compile, in parallel with other programs.
      arguments: size of the arguments, in bytes.
      outputs: size of the outputs that do not alias arguments, in bytes.
      temporaries: size of temporary memory, in bytes.
      refused: bytes needed, if the compiler reports that the program does not fit; else None.
      model_flops: number of operations according to the model's arithmetic.
      xla_flops: XLA's count of operations, in which a loop's body counts once.
      cost: cycles and collectives; None if the program does not fit.
    """

    name: str
    seconds: float
    arguments: float
    outputs: float
    temporaries: float
    refused: float | None
    model_flops: float
    xla_flops: float
    cost: hlo.Cost | None

    @property
    def total(self) -> float:
        """Memory in use during execution, in bytes."""
        return self.refused or self.arguments + self.outputs + self.temporaries


def compile_program(program: Program, mesh: Mesh) -> Compiled:
    """Compiles a program; not fitting in memory is also a result."""
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = program.lower()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            used = _REFUSED.search(str(error))
            if used is None:
                raise
            needed = float(used.group(1)) * _UNITS[used.group(2)]
            return Compiled(program.name, time.perf_counter() - started, 0, 0, 0, needed, program.flops, 0, None)
    seconds = time.perf_counter() - started
    memory, cost = compiled.memory_analysis(), hlo.read(compiled.as_text())
    own = memory.output_size_in_bytes - memory.alias_size_in_bytes
    xla = (compiled.cost_analysis() or {}).get("flops", 0.0)
    return Compiled(
        program.name,
        seconds,
        memory.argument_size_in_bytes,
        own,
        memory.temp_size_in_bytes,
        None,
        program.flops,
        xla,
        cost,
    )


class Build(NamedTuple):
    """Programs of a run compiled in parallel, with wall-clock time and processor time in seconds."""

    programs: Sequence[Compiled]
    seconds: float
    cpu_s: float


def compile_all(case: Case, only: Sequence[str] = (), at_once: int | None = None) -> Build:
    """Compiles the programs of a run whose names start with one of `only` (empty: all), `at_once` in parallel."""
    started, cpu = time.perf_counter(), time.process_time()
    wanted = [p for p in all_programs(case) if not only or p.name.startswith(tuple(only))]

    def build(program: Program) -> Compiled:
        tell(f"compiling {program.name}")
        compiled = compile_program(program, case.mesh)
        tell(f"{compiled.name}: {size(compiled.total)} per chip, after {compiled.seconds:.0f} s")
        return compiled

    with ThreadPoolExecutor(at_once or os.cpu_count()) as pool:  # XLA compiles one program on about one core
        programs = list(pool.map(build, wanted))
    return Build(programs, time.perf_counter() - started, time.process_time() - cpu)


def factorizations(case: Case) -> Iterator[Program]:
    """The decomposition of each kernel shape, in the batches of `factorize`.

    There are none for `exact`, which runs on the host.
    """
    if case.config.svd == "exact":
        return
    leaves, rank = leaves_by_path(case.policy().params), case.specs.adapter.rank
    parts = batches(select(case.policy().params, case.specs.adapter.targets), BATCH_BYTES)
    for W, triplets in svd_shapes(leaves, parts, rank):
        if case.config.svd == "jnp":
            lower = partial(jnp_svd.lower, W, triplets)
        else:  # the meaning of `auto` on a TPU, which has no float64
            lower = partial(subspace_svd.lower, W, triplets, "float32", mesh=mesh_of(W))
        yield Program(f"factorize {' x '.join(map(str, W.shape))}", lower, 0.0, 0)


def rollout(case: Case) -> Program:
    """The whole rollout: prefill, admission, decoding in a shrinking pool, and sampling."""
    c = case.config
    prompts = (
        jax.ShapeDtypeStruct((c.batch_size,), jnp.uint32),
        jax.ShapeDtypeStruct((c.batch_size, c.max_prompt_tokens), jnp.int32),
        jax.ShapeDtypeStruct((c.batch_size,), jnp.int32),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    lower = lambda: lower_rollout(
        case.model,
        case.policy(),
        case.vector(),
        case.replicated(prompts),
        case.replicated(key),
        case.sampling,
        c.samples,
        case.slots,
    )
    tokens = c.batch_size * c.max_prompt_tokens + case.rows * c.max_new_tokens
    flops = 2 * matrix_params(case.model) * tokens / case.mesh.size
    return Program("rollout (prefill and decode loop)", lower, flops, case.rows * c.max_new_tokens)


def decoding_state(case: Case) -> Any:
    """The shapes of the decoding loop's state with the full pool."""
    width = case.config.max_prompt_tokens
    return jax.eval_shape(
        lambda: empty_state(case.model, None, case.rows, case.slots, width, case.sampling, case.dtype)
    )


def step(case: Case) -> Program:
    """One decoding step of the full pool: the body of the rollout's loop, in the layout that XLA chooses."""

    def lower() -> jax.stages.Lowered:
        state = decoding_state(case)
        rows, heads = heads_axes(case.mesh, case.slots, case.model.num_kv_heads)
        cache = NamedSharding(case.mesh, P(rows or None, None, heads or None, None))
        whole = NamedSharding(case.mesh, P())
        is_cache = lambda x: isinstance(x, KVCache)
        places = jax.tree.map(
            lambda x: jax.tree.map(lambda _: cache, x) if is_cache(x) else whole, state, is_leaf=is_cache
        )
        noise = jax.ShapeDtypeStruct((case.rows, case.config.max_new_tokens), jnp.float32)

        def run(policy, v, noise, state):
            state = replace(state, slots=replace(state.slots, params=policy(v)))
            state = decode_step(case.model, case.sampling, noise, state)
            return replace(state, slots=replace(state.slots, params=None))

        policy = case.policy()
        free = lambda sharding: Format(Layout.AUTO, sharding)
        arguments = (policy, case.vector(), case.replicated(noise), jax.tree.map(abstract_at, state, places))
        inputs = jax.tree.map(lambda x: free(x.sharding), arguments)
        bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        return jax.jit(run, donate_argnums=3, in_shardings=inputs, out_shardings=inputs[3]).lower(*bare)

    flops = 2 * matrix_params(case.model) * case.slots / case.mesh.size
    return Program("decode, one step", lower, flops, case.slots)


def updates(case: Case) -> Iterator[Program]:
    """Loss and gradient of one microbatch of a rollout, for every sequence shape."""
    plan, by_prompt = case.plan(), case.specs.optimizer.needs_fisher
    for sequence, microbatch in zip(plan.shapes, empty_microbatches(plan, by_prompt), strict=True):
        yield _update(case, plan, sequence, microbatch)


def _update(case: Case, plan: Plan, sequence: SequenceShape, microbatch: Microbatch) -> Program:
    update = Update(plan, case.specs.optimizer.transform())

    def lower() -> jax.stages.Lowered:
        v = case.vector()
        total = case.replicated(jax.eval_shape(update.zeros, v))
        return update.accumulate.lower(total, v, case.policy(), case.replicated(microbatch))

    tokens = plan.sequences * sequence.tokens
    name = f"update, rows of {sequence.places} ({plan.sequences} x {sequence.tokens} tokens)"
    return Program(name, lower, 4 * matrix_params(case.model) * tokens / case.mesh.size, tokens)


def optimizer(case: Case) -> Program:
    """The optimizer step on v."""

    def lower() -> jax.stages.Lowered:
        transform = case.specs.optimizer.transform()
        v = case.vector()
        state = case.replicated(jax.eval_shape(lambda v: init_state(v, transform), v))
        update = Update(case.plan(), transform)
        return update.apply.lower(state, case.replicated(jax.eval_shape(update.zeros, v)))

    return Program("optimizer", lower, 0.0, 0)


def all_programs(case: Case) -> Sequence[Program]:
    """All programs of a run, longest first, and a separate decoding step."""
    return (*updates(case), rollout(case), step(case), *factorizations(case), optimizer(case))
