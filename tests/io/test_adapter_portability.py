"""One adapter, one update: whatever computed the factors, and only on the base model it was trained on."""

import dataclasses
import hashlib
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tinylora_jax.adapters import Target, TinyLoRA, delta, exchange, factorize, init
from tinylora_jax.adapters.svd import SVD
from tinylora_jax.io.adapter_file import AdapterError, check_fit, load_adapter, read_adapter, save_adapter
from tinylora_jax.io.fingerprint import base_fingerprint

ROWS, COLUMNS = 24, 16
SURE = np.array([5.0, 4.0, 3.0, *np.linspace(2, 1, COLUMNS - 3)])
# The leading values equal; the second and the one after the cut equal; close, but not equal.
DEGENERATE = {
    "pair": np.array([4.0, 4.0, *SURE[2:]]),
    "cut": np.array([5.0, 3.0, 3.0, *SURE[3:]]),
    "close": np.array([4.0, 4.0 - 1e-6, *SURE[2:]]),
    "all": np.full(COLUMNS, 2.0),
}
SPEC = TinyLoRA(targets=("(a|b)/kernel",), u=2, n_tie=2)


def orthogonal(rows, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, COLUMNS)))[0]


def tree(spectrum):
    kernel = lambda s, seed: jnp.asarray(orthogonal(COLUMNS, seed) * s @ orthogonal(ROWS, seed + 1).T, jnp.float32)
    return {"a": {"kernel": kernel(SURE, 0)}, "b": {"kernel": kernel(spectrum, 4)}}


def turned(factors, params, spectrum):
    """What another back end may return: a basis of the same singular spaces, turned."""
    W = np.asarray(params["b"]["kernel"], np.float64).T
    U, S, Vt = np.linalg.svd(W)
    V = Vt.T
    left, right = U.copy()[:, :COLUMNS], V.copy()
    start = 1 if spectrum[0] - spectrum[1] > 0.1 else 0
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    for x in (left, right):
        x[:, start : start + 2] = x[:, start : start + 2] @ turn
    new = SVD(*(np.asarray(x, np.float32)[None] for x in (left[:, :2], S[:2], right[:, :2])))
    return dataclasses.replace(
        factors, leaves=factors.leaves | {"b/kernel": dataclasses.replace(factors.leaves["b/kernel"], **new._asdict())}
    )


def far(one, other):
    return {p: float(jnp.linalg.norm(one[p] - other[p]) / jnp.linalg.norm(one[p])) for p in one}


def ones(factors):
    return jnp.ones_like(init(factors))


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_factors_travel_with_the_adapter(name, tmp_path, caplog):
    params = tree(DEGENERATE[name])
    with caplog.at_level(logging.WARNING, logger="absl"):
        here = factorize(params, SPEC)
    assert here.undetermined == ("b/kernel",)
    assert "1 of 2 weights do not determine their factors" in caplog.text and "b/kernel" in caplog.text
    there = turned(here, params, DEGENERATE[name])
    v = ones(here)
    moved = far(delta(there, v), delta(here, v))
    assert moved["b/kernel"] > 0.05 and moved["a/kernel"] == 0, "the case must be one where it matters"
    save_adapter(tmp_path / "x", there, v, "base", "float32", base_fingerprint(params))
    for method in ("exact", "subspace"):
        loaded, same = load_adapter(tmp_path / "x", params, method)
        assert max(far(delta(there, v), delta(loaded, same)).values()) < 1e-4
        assert loaded.undetermined == ("b/kernel",)
    save_adapter(tmp_path / "y", loaded, same, "base", "float32", base_fingerprint(params))
    again, _ = load_adapter(tmp_path / "y", params)
    assert far(delta(loaded, v), delta(again, v))["b/kernel"] == 0
    spec, v, description = read_adapter(tmp_path / "x")
    with pytest.raises(AdapterError, match="pass params"):
        check_fit(tmp_path / "x", spec, v, description, here)


def test_a_sign_that_is_not_sure_is_undetermined():
    u = np.zeros(ROWS)
    u[[2, 7]] = 1, -1
    W = np.outer(np.eye(COLUMNS)[3], u) + 0.3 * np.outer(np.eye(COLUMNS)[5], np.eye(ROWS)[9])
    params = {"a": {"kernel": jnp.asarray(W, jnp.float32)}}
    assert factorize(params, TinyLoRA(rank=1, targets=("a/kernel",))).undetermined == ("a/kernel",)


@pytest.mark.parametrize("spectrum", [SURE, np.zeros(COLUMNS)], ids=["separate", "zero"])
def test_what_is_determined_brings_no_file(spectrum, tmp_path):
    params = tree(spectrum)
    exact, fast = (factorize(params, SPEC, method) for method in ("exact", "subspace"))
    assert exact.undetermined == fast.undetermined == ()
    save_adapter(tmp_path, exact, ones(exact), "base", "float32", base_fingerprint(params))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter.json", "vector.bin"}
    loaded, v = load_adapter(tmp_path, params, "subspace")
    assert far(delta(exact, v), delta(loaded, v))["a/kernel"] < 1e-3
    assert float(jnp.abs(delta(exact, v)["b/kernel"] - delta(loaded, v)["b/kernel"]).max()) < 1e-3


def test_one_layer_of_a_stack():
    layers = jnp.stack([tree(s)["b"]["kernel"] for s in (SURE, DEGENERATE["pair"], SURE)])
    factors = factorize({"w": layers}, TinyLoRA(targets=(Target("w", "layer in out"),)))
    assert factors.undetermined == ("w[1]",)
    leaf = factors.leaves["w"]
    flipped = SVD(*(np.asarray(x) for x in (-leaf.U[1], leaf.S[1], -leaf.V[1])))
    new = exchange({"w": layers}, factors, {"w[1]": flipped}).leaves["w"]
    np.testing.assert_array_equal(new.U, leaf.U * jnp.array([1.0, -1.0, 1.0])[:, None, None])
    np.testing.assert_array_equal(new.V, leaf.V * jnp.array([1.0, -1.0, 1.0])[:, None, None])


@pytest.fixture
def saved(tmp_path):
    params = tree(DEGENERATE["pair"])
    factors = factorize(params, SPEC)
    save_adapter(tmp_path / "a", factors, ones(factors), "tiny/base", "float32", base_fingerprint(params))
    return tmp_path / "a", params


def put_factors(folder, change):
    """Rewrites the factors with a digest that agrees: a forger would do so too."""
    path = folder / "factors.safetensors"
    save_file(change(load_file(path)), path)
    description = json.loads((folder / "adapter.json").read_text())
    description["factors"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "adapter.json").write_text(json.dumps(description))


NAMES = {k: f"b/kernel.{k}" for k in "USV"}
FORGED = {
    "another update": lambda t: t | {NAMES["U"]: np.ascontiguousarray(t[NAMES["U"]][::-1])},
    "longer": lambda t: t | {NAMES["U"]: 10 * t[NAMES["U"]]},
    "larger": lambda t: t | {NAMES["S"]: 2 * t[NAMES["S"]]},
    "one sign": lambda t: t | {NAMES["V"]: -t[NAMES["V"]]},
    "not a number": lambda t: t | {NAMES["S"]: t[NAMES["S"]] * np.float32(np.nan)},
    "other dtype": lambda t: t | {NAMES["S"]: t[NAMES["S"]].astype(np.float64)},
    "other shape": lambda t: t | {NAMES["S"]: t[NAMES["S"]][:1]},
    "missing": lambda t: {k: x for k, x in t.items() if k != NAMES["S"]},
    "more": lambda t: t | {"c": np.zeros(1, np.float32)},
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_factors_that_are_not_the_weight_s_are_refused(saved, change):
    folder, params = saved
    put_factors(folder, change)
    with pytest.raises(AdapterError, match="factors.safetensors"):
        load_adapter(folder, params)


def test_damaged_factors_are_refused(saved):
    folder, params = saved
    path = folder / "factors.safetensors"
    data = path.read_bytes()
    for wrong, reason in ((data[:-1], "altered"), (data + b"\0", "altered"), (b"", "altered"), (data * 99, "larger")):
        path.write_bytes(wrong)
        with pytest.raises(AdapterError, match=f"factors.safetensors .*{reason}"):
            load_adapter(folder, params)
    path.unlink()
    with pytest.raises(AdapterError, match="factors.safetensors is missing"):
        load_adapter(folder, params)


@pytest.mark.parametrize("name", ["lm_head/kernel", "../../etc/passwd"])
def test_factors_of_a_module_that_is_not_adapted(saved, name):
    folder, params = saved
    text = (
        (folder / "adapter.json").read_text().replace('"modules": ["b/kernel"]', json.dumps({"modules": [name]})[1:-1])
    )
    (folder / "adapter.json").write_text(text)
    with pytest.raises(AdapterError, match="which is not adapted"):
        load_adapter(folder, params)


@pytest.fixture(scope="module")
def of_qwen2(qwen2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    factors = factorize(qwen2.params, TinyLoRA(n_tie=5))
    save_adapter(folder, factors, ones(factors), "tiny/base", "float32", base_fingerprint(qwen2.params))
    return folder


def changed(params, path, change):
    edit = lambda p, x: change(x) if jax.tree_util.keystr(p, simple=True, separator="/") == path else x
    return jax.tree_util.tree_map_with_path(edit, params)


def test_a_fingerprint_is_what_it_says():
    W = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)

    def side(label, k, size):
        bits = bin(int.from_bytes(hashlib.sha256(f"{label}:{k}:0".encode()).digest(), "big"))[2:].zfill(256)
        return np.array([1.0 if bit == "1" else -1.0 for bit in bits[:size]])

    flat = W.reshape(12, 5).astype(np.float64)
    expected = [np.linalg.norm(flat), *(side("rows", k, 12) @ flat @ side("columns", k, 5) for k in range(4))]
    found = base_fingerprint({"w": jnp.asarray(W)})
    assert found["dtype"] == "float32"
    np.testing.assert_allclose(found["weights"]["w"], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("path", ["embed_tokens/embedding", "norm/scale", "layers/1/self_attn/k_proj/bias"])
def test_a_base_that_differs_outside_the_adapted_weights_is_refused(of_qwen2, qwen2, path):
    load_adapter(of_qwen2, qwen2.params)
    for change in (lambda x: x * 1.05, lambda x: x[::-1], lambda x: x.at[0].multiply(-3)):
        with pytest.raises(AdapterError, match=f"trained on 'tiny/base', from which .* in 1 of .* .{path}, "):
            load_adapter(of_qwen2, changed(qwen2.params, path, change))


def test_another_model_is_refused(of_qwen2, tiny):
    with pytest.raises(AdapterError, match="trained on 'tiny/base'"):
        load_adapter(of_qwen2, tiny("llama").params)


def test_another_rounding_is_a_warning(of_qwen2, qwen2, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        load_adapter(of_qwen2, qwen2.params)
        assert "rounded otherwise" not in caplog.text
        load_adapter(of_qwen2, jax.tree.map(lambda x: x.astype(jnp.bfloat16), qwen2.params))
    assert "trained on weights in float32, these are in bfloat16" in caplog.text
