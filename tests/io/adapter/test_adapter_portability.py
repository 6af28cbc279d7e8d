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
from tinylora_jax.adapters.rebase import with_projections
from tinylora_jax.adapters.svd import SVD
from tinylora_jax.io._trained import open_adapter, read_together
from tinylora_jax.io.adapter._description import readable, tables_sha256, whole_sha256
from tinylora_jax.io.adapter._file import (
    AdapterError,
    AdapterReader,
    check_fit,
    load_adapter,
    read_adapter,
    save_adapter,
)
from tinylora_jax.io.adapter._fingerprint import base_fingerprint

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
    assert here.ill_conditioned == ("b/kernel",)
    assert "1 of 2 weights do not determine their factors" in caplog.text and "b/kernel" in caplog.text
    there = turned(here, params, DEGENERATE[name])
    v = ones(here)
    moved = far(delta(there, v), delta(here, v))
    assert moved["b/kernel"] > 0.05 and moved["a/kernel"] == 0, "the case must be one where it matters"
    save_adapter(tmp_path / "x", there, v, "base", "float32", base_fingerprint(params))
    for method in ("exact", "subspace"):
        loaded, same = load_adapter(tmp_path / "x", params, method)
        assert max(far(delta(there, v), delta(loaded, same)).values()) < 1e-4
        assert loaded.ill_conditioned == ("b/kernel",)
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
    assert factorize(params, TinyLoRA(rank=1, targets=("a/kernel",))).ill_conditioned == ("a/kernel",)


@pytest.mark.parametrize("spectrum", [SURE, np.zeros(COLUMNS)], ids=["separate", "zero"])
def test_what_is_determined_brings_no_file(spectrum, tmp_path):
    params = tree(spectrum)
    exact, fast = (factorize(params, SPEC, method) for method in ("exact", "subspace"))
    assert exact.ill_conditioned == fast.ill_conditioned == ()
    save_adapter(tmp_path, exact, ones(exact), "base", "float32", base_fingerprint(params))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter.json", "vector.bin"}
    loaded, v = load_adapter(tmp_path, params, "subspace")
    assert far(delta(exact, v), delta(loaded, v))["a/kernel"] < 1e-3
    assert float(jnp.abs(delta(exact, v)["b/kernel"] - delta(loaded, v)["b/kernel"]).max()) < 1e-3


def test_one_layer_of_a_stack():
    layers = jnp.stack([tree(s)["b"]["kernel"] for s in (SURE, DEGENERATE["pair"], SURE)])
    factors = factorize({"w": layers}, TinyLoRA(targets=(Target("w", "layer in out"),)))
    assert factors.ill_conditioned == ("w[1]",)
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


def sign(folder):
    """Gives a description that was changed the checksum of the change."""
    description = json.loads((folder / "adapter.json").read_text())
    description["description_sha256"] = whole_sha256(description, tables_sha256(description))
    (folder / "adapter.json").write_text(readable(description))


def put_factors(folder, change):
    """Rewrites the factors with a digest that agrees: a forger would do so too."""
    path = folder / "factors.safetensors"
    save_file(change(load_file(path)), path)
    description = json.loads((folder / "adapter.json").read_text())
    description["factors"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "adapter.json").write_text(json.dumps(description))
    sign(folder)


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
    sign(folder)
    with pytest.raises(AdapterError, match="which is not adapted"):
        load_adapter(folder, params)


@pytest.fixture
def with_P(tmp_path):
    """An adapter whose P no seed gives, of a weight that determines its factors and of one that does not."""
    params = tree(DEGENERATE["pair"])
    factors = factorize(params, SPEC)
    rng = np.random.default_rng(5)
    drawn = {f"{x}/kernel": rng.standard_normal((2, 2, 2)).astype(np.float32) for x in "ab"}
    factors = with_projections(factors, drawn)
    save_adapter(tmp_path / "p", factors, ones(factors), "tiny/base", "float32", base_fingerprint(params))
    return tmp_path / "p", params, factors


def test_projections_travel_with_the_adapter(with_P, saved):
    folder, params, factors = with_P
    description = json.loads((folder / "adapter.json").read_text())
    assert description["format_version"] == 3
    assert description["factors"]["modules"] == ["b/kernel"]
    assert description["factors"]["projections"] == ["a/kernel", "b/kernel"]
    loaded, v = load_adapter(folder, params)
    assert max(far(delta(factors, v), delta(loaded, v)).values()) == 0
    assert far(delta(factorize(params, SPEC), v), delta(loaded, v))["a/kernel"] > 0.5
    assert json.loads((saved[0] / "adapter.json").read_text())["format_version"] == 2, "older readers take it"


P = "a/kernel.P"
FORGED_P = {
    "other dtype": (
        lambda t: t | {P: t[P].astype(np.float16)},
        r"P is \(2, 2, 2\) float16, expected .* float32",
    ),
    "integers": (lambda t: t | {P: t[P].astype(np.int32)}, "int32, expected"),
    "other shape": (lambda t: t | {P: t[P][:1]}, r"\(1, 2, 2\) float32, expected \(2, 2, 2\)"),
    "flat": (lambda t: t | {P: t[P].reshape(-1)}, r"is \(8,\) float32, expected \(2, 2, 2\)"),
    "empty": (lambda t: t | {P: np.zeros((0, 2, 2), np.float32)}, r"is \(0, 2, 2\)"),
    "oversize": (lambda t: t | {P: np.zeros((2, 100, 100), np.float32)}, "larger than the 5 tensors"),
    "missing": (lambda t: {k: x for k, x in t.items() if k != P}, "a/kernel.P is none, expected"),
    "another name": (lambda t: {k.replace(P, "../../P"): x for k, x in t.items()}, "a/kernel.P is none"),
    "one more": (lambda t: t | {"c/kernel.P": t[P]}, "holds 'c/kernel.P', which adapter.json does not name"),
    "U that is not named": (lambda t: t | {"a/kernel.U": t["b/kernel.U"]}, "holds 'a/kernel.U', which"),
    "not a number": (lambda t: t | {P: t[P] * np.float32(np.nan)}, "a/kernel.P holds numbers that are not finite"),
    "infinite": (lambda t: t | {P: t[P] * np.float32(np.inf)}, "not finite"),
    "other numbers": (lambda t: t | {P: t[P][:, ::-1].copy()}, "whose factors differ from this model's in 1 of 2"),
    "one sign": (lambda t: t | {P: -t[P]}, "whose factors differ"),
}


@pytest.mark.parametrize("case", FORGED_P)
def test_forged_projections_are_refused(with_P, case):
    folder, params, _ = with_P
    change, reason = FORGED_P[case]
    put_factors(folder, change)
    with pytest.raises(AdapterError, match=reason):
        load_adapter(folder, params)


def lie(shape, offsets):
    """A header that says other things of P than the file holds."""

    def damage(raw):
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        header[P] |= {"shape": shape or header[P]["shape"], "data_offsets": offsets or header[P]["data_offsets"]}
        new = json.dumps(header).encode()
        return len(new).to_bytes(8, "little") + new + raw[end:]

    return damage


DAMAGED = {
    "cut": lambda raw: raw[:-5],
    "empty": lambda raw: b"",
    "a header beyond the file": lambda raw: (2**62).to_bytes(8, "little") + raw[8:],
    "a shape beyond all memory": lie([2**31, 2**31, 2], None),
    "a shape that wraps": lie([2**63, 2, 2], None),
    "offsets beyond the file": lie(None, [0, 2**40]),
    "tensors that overlap": lie(None, [32, 64]),
    "not a header": lambda raw: raw[:8] + b"[" * (len(raw) - 8),
}


@pytest.mark.parametrize("agrees", [False, True])
@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_projections_are_refused(with_P, damage, agrees):
    folder, params, _ = with_P
    path = folder / "factors.safetensors"
    digest = lambda: hashlib.sha256(path.read_bytes()).hexdigest()
    before = digest()
    path.write_bytes(damage(path.read_bytes()))
    if agrees:
        (folder / "adapter.json").write_text((folder / "adapter.json").read_text().replace(before, digest()))
        sign(folder)
    with pytest.raises(AdapterError, match=f"factors.safetensors {'is damaged' if agrees else 'was altered'}"):
        load_adapter(folder, params)


def test_an_enormous_file_of_projections_is_not_read(with_P):
    folder, params, _ = with_P
    with (folder / "factors.safetensors").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(AdapterError, match="factors.safetensors is larger than the 5 tensors"):
        load_adapter(folder, params)
    (folder / "factors.safetensors").unlink()
    with pytest.raises(AdapterError, match="factors.safetensors is missing"):
        load_adapter(folder, params)


@pytest.mark.parametrize("name", ["c/kernel", "../../etc/passwd"])
def test_projections_of_a_module_that_is_not_adapted(with_P, name):
    folder, params, _ = with_P
    text = (folder / "adapter.json").read_text()
    (folder / "adapter.json").write_text(text.replace('["a/kernel", "b/kernel"]', json.dumps(["a/kernel", name])))
    sign(folder)
    with pytest.raises(AdapterError, match=f"adapter.json: factors of '{name}', which is not adapted"):
        load_adapter(folder, params)


def test_a_batch_does_not_mix_projections(with_P, tmp_path):
    folder, params, factors = with_P
    plain = factorize(params, SPEC)
    save_adapter(tmp_path / "plain", plain, ones(plain), "tiny/base", "float32", base_fingerprint(params))
    for first, second in ((folder, tmp_path / "plain"), (tmp_path / "plain", folder)):
        reader = AdapterReader(params, plain)
        reader.read(first)
        used = reader.factors
        with pytest.raises(AdapterError, match=f"{second} and {first} have different stored factors"):
            reader.read(second)
        reader.read(first)
        assert reader.factors is used
    together, vectors = read_together(params, [open_adapter(tmp_path / "plain"), open_adapter(folder)])
    for its, v in zip((plain, factors), vectors, strict=True):
        assert max(far(delta(its, ones(its)), delta(together, jnp.asarray(v))).values()) < 1e-5


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
        with pytest.raises(
            AdapterError, match=f"trained on 'tiny/base', but this base .* differs in 1 of .* .{path}, "
        ):
            load_adapter(of_qwen2, changed(qwen2.params, path, change))


def test_another_model_is_refused(of_qwen2, tiny):
    with pytest.raises(AdapterError, match="trained on 'tiny/base'"):
        load_adapter(of_qwen2, tiny("llama").params)


def test_another_rounding_is_a_warning(of_qwen2, qwen2, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        load_adapter(of_qwen2, qwen2.params)
        assert "rounded differently" not in caplog.text
        load_adapter(of_qwen2, jax.tree.map(lambda x: x.astype(jnp.bfloat16), qwen2.params))
    assert "trained on float32 weights, these are bfloat16" in caplog.text
