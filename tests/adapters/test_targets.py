"""Which modules are adapted, in which order, and which of them share a vector."""

import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.adapters import Target, TinyLoRA, select, tie_groups
from tinylora_jax.adapters.targets import LINEAR_MAPS

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
BLOCK_ORDER = ATTENTION + MLP
DEFAULT_TARGETS = TinyLoRA().targets


def block(make_leaf):
    norm = {"scale": jax.ShapeDtypeStruct((4,), jnp.float32)}
    attention = {name: {"kernel": make_leaf(), "bias": norm["scale"]} for name in ATTENTION}
    return {"self_attn": attention, "mlp": {name: {"kernel": make_leaf()} for name in MLP}, "input_layernorm": norm}


def model(layers, key=int):
    leaf = lambda: jax.ShapeDtypeStruct((4, 6), jnp.float32)
    return {"embed_tokens": {"embedding": leaf()}, "layers": {key(i): block(leaf) for i in range(layers)}}


def groups_of(params, n_tie, tying="tiled"):
    return tie_groups(select(params, DEFAULT_TARGETS), n_tie, tying)


@pytest.mark.parametrize(
    ("layers", "n_tie", "tying", "expected"),
    [
        (28, 16, "tiled", 13),  # the title: Qwen2.5-7B
        (28, 4, "tiled", 49),
        (28, 1, "tiled", 196),
        (28, 196, "tiled", 1),
        (28, 10_000, "tiled", 1),
        (24, 13, "tiled", 13),
        *[(36, n, "tiled", count) for n, count in zip((32, 16, 8, 4, 2, 1), (8, 16, 32, 63, 126, 252), strict=True)],
        *[
            (36, n, "structured", count)
            for n, count in zip((32, 16, 8, 4, 2, 1), (14, 21, 35, 63, 126, 252), strict=True)
        ],
    ],
)
def test_number_of_vectors_is_the_papers(layers, n_tie, tying, expected):
    groups = groups_of(model(layers), n_tie, tying)
    assert len(groups) == 7 * layers
    assert sorted(set(groups)) == list(range(expected)), "group numbers must be 0, 1, … without a gap"


@pytest.mark.parametrize("n_tie", [1, 3, 7, 16])
def test_tiled_groups_are_runs_of_neighbours(n_tie):
    groups = groups_of(model(12), n_tie)
    assert list(groups) == sorted(groups)
    sizes = np.bincount(groups)
    assert (sizes[:-1] == n_tie).all() and 1 <= sizes[-1] <= n_tie


@pytest.mark.parametrize("n_tie", [1, 3, 5, 12, 40])
def test_structured_groups_are_runs_of_layers_of_one_type(n_tie):
    modules = select(model(12), DEFAULT_TARGETS)
    members = {}
    for module, group in zip(modules, tie_groups(modules, n_tie, "structured"), strict=True):
        name, layer = module.path.split("/")[-2], int(module.path.split("/")[1])
        members.setdefault(group, []).append((name, layer))
    seen = []
    for group in members.values():
        assert len({name for name, _ in group}) == 1
        layers = [layer for _, layer in group]
        assert layers == list(range(layers[0], layers[0] + len(layers)))
        assert layers[0] % n_tie == 0 and (len(layers) == n_tie or layers[-1] == 11)
        seen += group
    assert len(seen) == len(set(seen)) == 84


def expected_order(layers):
    where = lambda name: "self_attn" if name in ATTENTION else "mlp"
    return [f"layers/{i}/{where(name)}/{name}/kernel" for i in range(layers) for name in BLOCK_ORDER]


def test_order_is_by_depth_then_q_k_v_o_gate_up_down():
    # PEFT numbers its groups in this order, and layer 10 must not stand before layer 2.
    assert [m.path for m in select(model(12), DEFAULT_TARGETS)] == expected_order(12)


def shuffled(tree, rng):
    if not isinstance(tree, dict):
        return tree
    items = list(tree.items())
    rng.shuffle(items)
    return {key: shuffled(value, rng) for key, value in items}


def test_order_does_not_depend_on_the_containers():
    trees = [model(12, str), shuffled(model(12), random.Random(0)), shuffled(model(12, str), random.Random(1))]
    as_list = model(12)
    as_list["layers"] = list(as_list["layers"].values())
    for tree in [*trees, as_list]:
        assert [m.path for m in select(tree, DEFAULT_TARGETS)] == expected_order(12)


@pytest.mark.parametrize(
    ("n_tie", "tying"), [(1, "tiled"), (5, "tiled"), (16, "tiled"), (1, "structured"), (5, "structured")]
)
def test_stacking_the_layers_does_not_change_who_shares(n_tie, tying):
    stacked = {"layers": block(lambda: jax.ShapeDtypeStruct((12, 4, 6), jnp.float32))}
    targets = tuple(Target(path, "layer in out") for path in LINEAR_MAPS)
    modules = select(stacked, targets)
    of_stacked = {
        (m.layer, m.path.split("/")[-2]): g for m, g in zip(modules, tie_groups(modules, n_tie, tying), strict=True)
    }
    modules = select(model(12), DEFAULT_TARGETS)
    of_flat = {
        (int(m.path.split("/")[1]), m.path.split("/")[-2]): g
        for m, g in zip(modules, tie_groups(modules, n_tie, tying), strict=True)
    }
    assert of_stacked == of_flat


def test_names_of_stacked_modules_are_unique_and_sizes_are_flattened():
    tree = {"q": jax.ShapeDtypeStruct((3, 8, 2, 5), jnp.float32), "o": jax.ShapeDtypeStruct((3, 2, 5, 8), jnp.float32)}
    modules = select(tree, (Target("q", "layer in out out"), Target("o", "layer in in out")))
    assert [m.name for m in modules] == ["q[0]", "o[0]", "q[1]", "o[1]", "q[2]", "o[2]"]
    assert {m.path: m.shape for m in modules} == {"q": (8, 10), "o": (10, 8)}


def test_a_leaf_belongs_to_the_first_target_that_matches():
    tree = {"a": jax.ShapeDtypeStruct((4, 6), jnp.float32), "b": jax.ShapeDtypeStruct((4, 6), jnp.float32)}
    modules = select(tree, (Target("a", "out in"), Target("[ab]")))
    assert [(m.path, m.shape) for m in modules] == [("a", (6, 4)), ("b", (4, 6))]


def test_a_path_is_matched_in_full():
    tree = {
        "up": {"kernel": jax.ShapeDtypeStruct((4, 6), jnp.float32)},
        "up2": {"kernel": jax.ShapeDtypeStruct((4,), jnp.float32)},
    }
    assert [m.path for m in select(tree, (Target("up/kernel"),))] == ["up/kernel"]


def test_all_problems_are_reported_together_with_the_leaves():
    with pytest.raises(ValueError) as error:
        select(model(1), (Target(".*/qq_proj/kernel"), Target(".*/q_proj/kernel", "layer in out")))
    message = str(error.value)
    assert "'.*/qq_proj/kernel' matches no leaf" in message
    assert "layers/0/self_attn/q_proj/kernel has shape (4, 6)" in message and "'layer in out'" in message
    assert "layers/0/mlp/down_proj/kernel" in message, "the message must list leaves that do exist"


@pytest.mark.parametrize("layout", ["in", "out", "in in", "in out heads", "layer layer in out", "", "In Out"])
def test_meaningless_layouts_are_refused(layout):
    with pytest.raises(ValueError, match="layout"):
        Target("a", layout)


def test_a_bad_regular_expression_is_refused_at_once():
    with pytest.raises(Exception, match="unterminated|missing|unbalanced"):
        Target("(unclosed")


def test_real_decoder_paths_are_all_found(qwen2):
    modules = select(qwen2.params, DEFAULT_TARGETS)
    assert [m.path for m in modules] == expected_order(qwen2.config.num_layers)
    adapted = sum(math.prod(m.shape) for m in modules)
    kernels = [x for p, x in jax.tree_util.tree_leaves_with_path(qwen2.params) if p[-1].key == "kernel"]
    assert adapted == sum(x.size for x in kernels)
