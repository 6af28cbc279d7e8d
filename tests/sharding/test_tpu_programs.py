"""Small models of every family, compiled for real TPU topologies: what decoding and the update exchange."""

import pytest

pytest.importorskip("libtpu", reason="pip install 'jax[tpu]'")

import jax  # noqa: E402

from experiments.aot import estimate  # noqa: E402
from experiments.aot.chips import TopologyError, topology  # noqa: E402
from experiments.aot.programs import Case, compile_program, step, updates  # noqa: E402
from experiments.common.specs import parse  # noqa: E402
from experiments.configs import base  # noqa: E402
from tinylora_jax.models import ModelConfig, Rope  # noqa: E402
from tinylora_jax.models.sharding import MeshSpec  # noqa: E402

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_layers": 2,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 64,
}
FAMILIES = {
    "qwen2": ModelConfig(**SIZES, qkv_bias=True, tie_embeddings=True),
    "qwen3": ModelConfig(**{**SIZES, "head_dim": 128, "num_kv_heads": 2}, qk_norm=True),
    "llama": ModelConfig(**SIZES, rope=Rope(theta=5e5, kind="llama3", factor=8.0, original_max_positions=8192)),
    "smollm": ModelConfig(**{**SIZES, "num_kv_heads": 2}, tie_embeddings=True),
}
# On four or eight devices: all of them share the weights, or pairs do. 2 kv heads divide neither 4 nor 8.
MESHES = {"v5e:2x2": [(1, 1, 4), (2, 1, 2)], "v6e:2x4": [(1, 1, 8), (4, 1, 2)]}


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """What a run has: the backward pass of attention in bfloat16 promotes implicitly."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def make_case(family, target, sizes):
    config = base.get_config()
    config.batch_size, config.max_prompt_tokens, config.max_new_tokens = 16, 64, 192
    config.grpo.remat, config.grpo.stream_tokens = "on", 1024
    target = topology(target)
    return Case(config, parse(config), FAMILIES[family], MeshSpec(*sizes).make(target.devices), target.chip.hbm_bytes)


@pytest.fixture(scope="module")
def decode():
    """A decoding step of a family on a topology and a mesh, compiled once."""
    found = {}

    def get(*key):
        if key not in found:
            case = make_case(*key)
            found[key] = case, compile_program(step(case), case.mesh)
        return found[key]

    return get


CASES = [(family, target, MESHES[target][i % 2]) for i, family in enumerate(FAMILIES) for target in MESHES]


@pytest.mark.parametrize(("family", "target", "sizes"), CASES)
def test_decoding_gathers_no_weights(decode, family, target, sizes):
    case, compiled = decode(family, target, sizes)
    assert compiled.refused is None and compiled.cost.open_loops == 0
    assert estimate.weights_gathered(compiled, case) == 0
    weights = estimate.weight_bytes(case)
    received = [c for c in compiled.cost.collectives if c.kind != "all-reduce"]
    assert sum(c.num_bytes for c in received) < weights, "activations are small beside weights"
    assert compiled.cost.cycles > 0 and [k.name for k in compiled.cost.kernels].count("write_entry") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "target"), [("qwen3", "v6e:2x4"), pytest.param("qwen2", "v5e:2x2", marks=pytest.mark.slow)]
)
def test_the_update_reduces_one_vector(family, target):
    case = make_case(family, target, MESHES[target][0])
    (program,) = updates(case)
    compiled = compile_program(program, case.mesh)
    gradient = 4 * case.vector().size
    scalars = compiled.cost.bytes_by_kind()["all-reduce"] - gradient
    assert 0 <= scalars <= 64, compiled.cost.collectives
    assert estimate.weights_gathered(compiled, case) > 0, "the layers' weights are gathered instead"


@pytest.mark.slow
def test_bytes_of_a_device_shrink_with_the_mesh():
    sizes = {}
    for target, mesh in (("v5e:1x1", (1, 1, 1)), ("v5e:2x2", (1, 1, 4)), ("v5e:2x4", (1, 1, 8))):
        case = make_case("llama", target, mesh)
        sizes[case.mesh.size] = compile_program(step(case), case.mesh)
    assert sizes[4].arguments < 0.35 * sizes[1].arguments
    assert sizes[8].arguments < 0.65 * sizes[4].arguments
    assert sizes[8].total < sizes[4].total < sizes[1].total


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:3x3", "the nearest is v5e:2x4"),
        ("v6e:5x5", "the nearest is v6e:4x8"),
        ("v9:2x2", "expected one of v5e"),
        ("2x2", "expected one of v5e"),
        ("v5e", "the nearest is v5e:2x2"),
    ],
)
def test_an_unknown_topology_names_the_nearest(name, message):
    with pytest.raises(TopologyError, match=message):
        topology(name)
