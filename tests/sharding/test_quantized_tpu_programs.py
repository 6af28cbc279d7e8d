"""Quantized programs, compiled for real TPUs: no matrix of weights exists in more bits than it is stored in.

Nor does a layer's cache.
"""

import math
from dataclasses import replace

import pytest

pytest.importorskip("libtpu", reason="pip install 'jax[tpu]'")

import jax  # noqa: E402

from experiments.aot import estimate  # noqa: E402
from experiments.aot.chips import topology  # noqa: E402
from experiments.aot.programs import Case, compile_program, rollout, step, updates  # noqa: E402
from experiments.common.architectures import architecture  # noqa: E402
from experiments.common.fitting import rollout_bytes  # noqa: E402
from experiments.common.specs import parse  # noqa: E402
from experiments.configs import base  # noqa: E402
from tinylora_jax.adapters import dense, kernel, leaves_by_path  # noqa: E402
from tinylora_jax.models import MeshSpec, attention  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """What a run has: the backward pass of attention in bfloat16 promotes implicitly."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def make_case(name, scheme, layers, prompts, new_tokens, width, slots, cache="none"):
    config = base.get_config()
    config.quantize_cache = cache
    config.quantize, config.batch_size, config.slots = scheme, prompts, slots
    config.max_prompt_tokens, config.max_new_tokens = width, new_tokens
    config.grpo.stream_tokens = width + new_tokens
    model = architecture(name)
    model = replace(model, num_layers=layers or model.num_layers)
    target = topology("v5e:1x1")
    return Case(config, parse(config), model, MeshSpec().make(target.devices), target.chip.hbm_bytes)


def widened(case, program):
    """Matrices of weights that a program writes in 16 bits or more."""
    cost = compile_program(program, case.mesh).cost
    leaves = leaves_by_path(case.policy().params).items()
    sizes = {math.prod(leaf.shape) for path, leaf in leaves if "layers" in path and path.endswith("kernel")}
    shapes = {leaf.shape for path, leaf in leaves if "layers" in path and path.endswith("kernel")}
    whole = sizes | {case.model.num_layers * size for size in sizes}
    rows = {n for shape in shapes for n in shape}
    return [found for found in cost.written if math.prod(found[1]) in whole and set(found[1][-2:]) <= rows]


@pytest.fixture
def retraced():
    """A traced program is kept by its shapes, and so would be the one with another product."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.slow
def test_a_wide_copy_would_be_seen(monkeypatch, retraced):
    copied = lambda x, kernel, num_in: x @ jax.lax.optimization_barrier(dense(kernel, x.dtype))
    monkeypatch.setattr(kernel, "quantized_product", copied)
    case = make_case("qwen2.5-1.5b", "int8", 1, 4, 32, 96, 16)
    assert {shape for _, shape in widened(case, step(case))} >= {(1536, 8960), (8960, 1536)}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", ["decode", pytest.param("update", marks=pytest.mark.slow)])
def test_no_program_writes_a_wide_copy_of_a_matrix(scheme, which):
    case = make_case("qwen2.5-1.5b", scheme, 1, 4, 32, 96, 16)
    program = step(case) if which == "decode" else list(updates(case))[-1]
    assert widened(case, program) == []


@pytest.mark.slow
@pytest.mark.parametrize("which", ["rollout", "decode", "update"])
def test_seven_billion_weights_fit_one_chip_of_16_gb(which):
    case = make_case("qwen2.5-7b", "int8", 0, 16, 1024, 512, 64, cache="int8")
    program = {"rollout": rollout, "decode": step, "update": lambda case: list(updates(case))[-1]}[which](case)
    assert widened(case, program) == []
    compiled = compile_program(program, case.mesh)
    assert compiled.refused is None and compiled.total <= 16e9
    assert estimate._bytes_here(case.policy().params) <= 8.9e9
    if which == "decode":
        chip = topology("v5e:1x1").chip
        assert estimate.seconds(compiled, chip).total <= 2 * estimate.decode_floor(case, chip)
        assert rollout_bytes(case.model, case.config, case.mesh, 64, joined=False) <= 16e9


def of_two_layers():
    return make_case("qwen2.5-7b", "int8", 2, 4, 256, 128, 16, cache="int8")


@pytest.mark.slow
def test_no_step_writes_a_wide_copy_of_the_cache():
    case = of_two_layers()
    assert estimate.wide_copies(compile_program(step(case), case.mesh), case) == []


@pytest.mark.slow
def test_a_wide_copy_of_the_cache_would_be_seen(monkeypatch, retraced):
    def copied(q, keys, values, visible):
        wide = lambda x: jax.lax.optimization_barrier((x.values * x.scale).astype(q.dtype))
        return attention._plain(q, wide(keys), wide(values), mask=visible)

    monkeypatch.setattr(attention, "_scaled", copied)
    case = of_two_layers()
    assert estimate.wide_copies(compile_program(step(case), case.mesh), case)
