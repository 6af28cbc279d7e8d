"""What a run chooses by the memory of its devices: the smallest split of the weights, the most completions at once."""

import jax.numpy as jnp
import pytest

pytest.importorskip("libtpu", reason="pip install 'jax[tpu]'")

from experiments.aot.chips import topology  # noqa: E402
from experiments.common.architectures import architecture  # noqa: E402
from experiments.common.fitting import ROOM, cache_bytes, fit, head_bytes, rollout_bytes  # noqa: E402
from experiments.configs import base, gsm8k_qwen2_5_7b_one_chip, gsm8k_qwen2_5_coder_1_5b  # noqa: E402
from tinylora_jax.models.sharding import MeshSpec  # noqa: E402

V5E, H100 = 16e9, 0.92 * 85e9
DEVICES = topology("v5e:2x4").devices  # stand for those of any machine


def chosen(model, devices, memory, config=None, spec=None, joined=True):
    config, spec = config or base.get_config(), spec or MeshSpec()
    found = fit(architecture(model), config, spec, DEVICES[:devices], memory, joined)
    return (found.mesh.data, found.mesh.fsdp, found.mesh.tensor), found.slots, found.num_bytes


# The paper's recipe: 64 x 4 completions, prompts of 512 and at most 4,096 new tokens; 68 GB of cache for the 7B.
@pytest.mark.parametrize(
    ("model", "devices", "memory", "mesh", "slots"),
    [
        ("qwen2.5-7b", 8, V5E, (2, 1, 4), 0),
        ("qwen2.5-7b", 4, H100, (4, 1, 1), 0),
        ("qwen2.5-7b", 1, H100, (1, 1, 1), 128),
        ("qwen2.5-0.5b", 8, V5E, (8, 1, 1), 0),
        ("qwen2.5-14b", 4, H100, (1, 1, 4), 0),
        ("qwen2.5-32b", 4, H100, (1, 1, 4), 128),
    ],
)
def test_the_paper_s_recipe_needs_no_flag(model, devices, memory, mesh, slots):
    got = chosen(model, devices, memory, joined=memory == H100)
    assert got[:2] == (mesh, slots)
    assert got[2] <= ROOM * memory


def test_a_smaller_split_or_more_slots_would_not_have_fitted():
    config, model = base.get_config(), architecture("qwen2.5-7b")
    halves = rollout_bytes(model, config, MeshSpec(4, 1, 2).make(DEVICES), 256, joined=False)
    assert halves > ROOM * V5E, "with the weights in two halves the cache does not fit"
    more = rollout_bytes(model, config, MeshSpec(1, 1, 1).make(DEVICES[:1]), 256, joined=True)
    assert more > ROOM * H100


def test_a_cache_in_int8_makes_room_for_more_slots():
    config, model = base.get_config(), architecture("qwen2.5-7b")
    assert [head_bytes(model, jnp.dtype("bfloat16"), scheme) for scheme in ("none", "int8")] == [2 * 128, 128 + 4]
    config.quantize_cache = "int8"
    assert chosen("qwen2.5-7b", 1, H100, config)[1] == 0, "all 256; in 16 bit it is 128"
    mesh = MeshSpec(1, 1, 1).make(DEVICES[:1])
    wide, narrow = ({"model": model, "mesh": mesh, "rows": 64, "positions": 1536, "head": n} for n in (256, 132))
    assert cache_bytes(**wide) == 2 * 28 * 64 * 1536 * 4 * 128 * 2
    assert cache_bytes(**narrow) == cache_bytes(**wide) * 132 / 256


@pytest.mark.parametrize(("model", "compiled"), [("llama-3.1-8b", 16.8e9), ("qwen3-8b", 17.8e9)])
def test_slots_that_are_refilled_on_a_tpu_need_a_second_int8_cache(model, compiled):
    """XLA's TPU compiler gave these bytes for 32 slots of 64 completions (experiments/aot/README.md)."""
    config = gsm8k_qwen2_5_7b_one_chip.get_config()
    config.quantize_cache = "int8"
    mesh = MeshSpec(1, 1, 1).make(DEVICES[:1])
    predicted = rollout_bytes(architecture(model), config, mesh, 32, joined=False, refilled=True)
    assert 0.97 < predicted / compiled < 1.05
    config.slots = 0
    _, slots, num_bytes = chosen(model, 1, V5E, config, joined=False)
    assert 0 < slots < 32 and num_bytes <= ROOM * V5E


def test_what_the_config_says_is_kept():
    config = base.get_config()
    config.slots = 64
    assert chosen("qwen2.5-7b", 8, V5E, config)[1] == 64
    assert chosen("qwen2.5-7b", 8, V5E, spec=MeshSpec(tensor=8))[0] == (1, 1, 8)
    assert chosen("qwen2.5-7b", 8, V5E, spec=MeshSpec(data=4))[0] == (4, 1, 2)
    assert chosen("qwen2.5-7b", 8, V5E, spec=MeshSpec(fsdp=8))[0] == (1, 8, 1)


def test_an_evaluation_and_all_members_of_a_sweep_fit_too():
    config, model = gsm8k_qwen2_5_coder_1_5b.get_config(), architecture("qwen2.5-1.5b")
    memory, mesh = 24e9, MeshSpec(1, 1, 1).make(DEVICES[:1])
    assert rollout_bytes(model, config, mesh, 256, joined=True) < ROOM * memory, "a training step fits whole"
    assert rollout_bytes(model, config, mesh, 1024, joined=True, num_prompts=256) > ROOM * memory
    assert fit(model, config, MeshSpec(), DEVICES[:1], memory, joined=True).slots == 256
    config.eval_batch_size, config.eval_samples = 64, 1
    assert fit(model, config, MeshSpec(), DEVICES[:1], memory, joined=True).slots == 0
    slots = fit(model, config, MeshSpec(), DEVICES[:1], memory, joined=True, members=10).slots
    assert 0 < slots < 2560
    assert rollout_bytes(model, config, mesh, slots, joined=True, num_prompts=640) <= ROOM * memory


def test_a_cpu_does_not_say_what_memory_it_has():
    mesh, slots, num_bytes = chosen("qwen2.5-7b", 8, None)
    assert (mesh, slots, num_bytes) == ((8, 1, 1), 32, None)


def test_what_fits_nowhere_gets_the_largest_split():
    mesh, slots, num_bytes = chosen("qwen2.5-32b", 2, V5E)
    assert mesh == (1, 1, 2) and slots == 1 and num_bytes > V5E


def test_full_fine_tuning_counts_its_optimizer():
    config = gsm8k_qwen2_5_coder_1_5b.get_config()
    small = chosen("qwen2.5-1.5b", 1, H100, config)[2]
    config.method = "full"
    assert chosen("qwen2.5-1.5b", 1, H100, config)[2] - small > 16 * 1.5e9
