"""Adapter files: saving and loading are inverses, and nothing malformed gets through."""

import dataclasses
import json
import os
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tinylora_jax.adapters import Target, TinyLoRA, delta, factorize, init
from tinylora_jax.adapters.projections import standard_normals
from tinylora_jax.io.adapter import _file as adapter_file
from tinylora_jax.io.adapter._file import (
    AdapterError,
    AdapterReader,
    check_factors,
    load_adapter,
    probes,
    read_adapter,
    save_adapter,
)
from tinylora_jax.io.adapter._fingerprint import base_fingerprint

SPECS = {
    "default": TinyLoRA(),
    "tied": TinyLoRA(rank=3, u=2, n_tie=5, tying="structured", seed=11),
    "some": TinyLoRA(rank=1, u=4, targets=(Target(r".*/(q|k)_proj/kernel"), Target(r"lay.*/0/mlp/up_proj/kernel"))),
}


def vector(factors, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(init(factors).shape), jnp.float32)


@pytest.fixture(scope="module")
def factors(qwen2):
    return factorize(qwen2.params, SPECS["tied"])


@pytest.fixture
def saved(factors, tmp_path):
    save_adapter(tmp_path / "a", factors, vector(factors), "tiny/base", "float32", steps=3, note="ü")
    return tmp_path / "a"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_load_inverts_save(qwen2, tmp_path, spec):
    factors = factorize(qwen2.params, spec)
    v = vector(factors)
    save_adapter(tmp_path / "f", factors, v, "base", "float32")
    found, same, description = read_adapter(tmp_path / "f")
    assert dataclasses.replace(found, targets=spec.targets) == spec and same.dtype == jnp.float32
    np.testing.assert_array_equal(same, v)
    check_factors(description, factors)
    again = factorize(qwen2.params, found)
    assert {p: x.groups for p, x in again.leaves.items()} == {p: x.groups for p, x in factors.leaves.items()}
    for path, update in delta(factors, v).items():
        np.testing.assert_array_equal(update, delta(again, same)[path])
    save_adapter(tmp_path / "b", factors, v, "base")
    rounded = read_adapter(tmp_path / "b")[1]
    np.testing.assert_array_equal(rounded, np.asarray(v).astype(ml_dtypes.bfloat16).astype(np.float32))
    assert (tmp_path / "b" / "vector.bin").stat().st_size == 2 * factors.num_params
    save_adapter(tmp_path / "c", factors, rounded, "base")
    assert (tmp_path / "c" / "vector.bin").read_bytes() == (tmp_path / "b" / "vector.bin").read_bytes()


def test_the_vector_is_plain_little_endian_rows(saved, factors):
    stored = np.frombuffer((saved / "vector.bin").read_bytes(), "<f4").reshape(init(factors).shape)
    np.testing.assert_array_equal(stored, vector(factors))


def test_the_description_is_readable(saved):
    description = json.loads((saved / "adapter.json").read_text())
    assert description["base"] == "tiny/base" and description["about"] == {"steps": 3, "note": "ü"}
    assert description["spec"]["rank"] == 3 and description["spec"]["tying"] == "structured"
    assert [leaf["groups"] for leaf in description["leaves"][:2]] == [[0], [0]]
    assert description["leaves"][0]["path"] == "layers/0/self_attn/q_proj/kernel"


def test_saving_over_an_adapter_replaces_it(saved, factors):
    other = vector(factors, seed=1)
    save_adapter(saved, factors, other, "tiny/base", "float32")
    np.testing.assert_array_equal(read_adapter(saved)[1], other)


def test_probes_are_what_they_say(qwen2):
    # From the definition, with ΔW at v = 1 made dense.
    factors = factorize(qwen2.params, SPECS["tied"])
    dense = delta(factors, jnp.ones(init(factors).shape))

    def directions(side, size):
        drawn = standard_normals(f"probe:{side}", 6 * size).reshape(6, size)
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    for path, found in probes(factors).items():
        for update, (*values, size) in zip(np.asarray(dense[path], np.float64), found, strict=True):
            out, num_in = update.shape
            pairs = zip(directions("out", out), directions("in", num_in), strict=True)
            expected = [left @ update @ right * np.sqrt(out * num_in) for left, right in pairs]
            np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(size, np.linalg.norm(update), rtol=1e-4)


def flip(x, column):
    return x.at[:, :, column].multiply(-1)


CHANGES = {
    **{f"sign of u{i}": lambda leaf, i=i: {"U": flip(leaf.U, i)} for i in range(3)},
    "sign of v0": lambda leaf: {"V": flip(leaf.V, 0)},
    # Σ P mixes the columns: a pair that leaves the SVD what it is gives another update all the same.
    "sign of a pair": lambda leaf: {"U": flip(leaf.U, 1), "V": flip(leaf.V, 1)},
    "order": lambda leaf: {"U": leaf.U[:, :, ::-1], "V": leaf.V[:, :, ::-1], "S": leaf.S[:, ::-1]},
    "size": lambda leaf: {"S": leaf.S * 1.5},
    "projections": lambda leaf: {"P": leaf.P + 1},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_any_one_module_is_refused(saved, factors, change):
    description = read_adapter(saved)[2]
    check_factors(description, factors)
    for path, leaf in factors.leaves.items():
        leaves = factors.leaves | {path: dataclasses.replace(leaf, **change(leaf))}
        with pytest.raises(AdapterError, match=f"trained on 'tiny/base'.*1 of 14 weights .{path}"):
            check_factors(description, dataclasses.replace(factors, leaves=leaves))


def test_other_modules_are_refused(saved, qwen2):
    with pytest.raises(AdapterError, match="has other modules than this model"):
        check_factors(read_adapter(saved)[2], factorize(qwen2.params, SPECS["some"]))


def test_rounding_of_the_factors_is_accepted(saved, factors):
    near = jax.tree.map(lambda x: x * (1 + 1e-3), factors)
    check_factors(read_adapter(saved)[2], near)


def edit(folder, **changes):
    path = folder / "adapter.json"
    description = json.loads(path.read_text())
    for name, value in changes.items():
        if value is KeyError:
            del description[name]
        else:
            description[name] = value
    path.write_text(json.dumps(description))  # NaN and Infinity included


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"13",
        b'"tinylora"',
        b"\xff\xfe\x00",
        b"\x00" * 100,
        b"{}",
        b'{"format": "other", "format_version": 2}',
        b"[" * 1_000_000,
        b'{"a":' * 500_000,
        b'{"format": "tinylora", "format_version": 2}',
        b'{"format": "tinylora", "format": "tinylora", "format_version": 2}',
        b'{"format": "tinylora", "format_version": 2, "about": {"a": 1, "a": 2}}',
        b'{"format": "tinylora", "format_version": 2, "about": NaN}',
        b"{" + b",".join(b'"k%d":0' % i for i in range(300_000)) + b"}",
        b"[" + b"[]," * 1_300_000 + b"[]]",
        b'{"format": "tinylora", "format_version": 2, "spec": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_description_that_is_none(saved, text):
    (saved / "adapter.json").write_bytes(text)
    with pytest.raises(AdapterError, match="adapter.json"):
        read_adapter(saved)


@pytest.mark.parametrize("version", [0, 1, 4, 2.0, True, "2", None, [], 10**300, KeyError])
def test_wrong_format_version(saved, version):
    edit(saved, format_version=version)
    with pytest.raises(AdapterError, match="has format version .* this library reads 2 and 3"):
        read_adapter(saved)


SPEC = {name: getattr(SPECS["tied"], name) for name in ("rank", "u", "n_tie", "tying", "seed")}
ROW = {"path": "a", "layout": "in out", "groups": [0], "probes": [[0.0] * 7]}
MALFORMED = {
    **{
        f"no-{name}": {name: KeyError}
        for name in ("base", "dtype", "shape", "sha256", "spec", "factors", "leaves", "base_fingerprint")
    },
    "dtype-unknown": {"dtype": "float64"},
    "dtype-list": {"dtype": ["float32"]},
    "shape-negative": {"shape": [-3, -2]},
    "shape-minus-one": {"shape": [-1, 2]},
    "shape-zero": {"shape": [0, 2]},
    "shape-huge": {"shape": [2**62, 2]},
    "shape-wraps-to-zero": {"shape": [2**63, 2]},
    "shape-beyond": {"shape": [10**400, 2]},
    "shape-floats": {"shape": [6.0, 2.0]},
    "shape-bools": {"shape": [True, 2]},
    "shape-nan": {"shape": [float("nan"), 2]},
    "shape-text": {"shape": "62"},
    "shape-number": {"shape": 12},
    "shape-flat": {"shape": [12]},
    "shape-empty": {"shape": []},
    "shape-deep": {"shape": [1, 6, 2]},
    "shape-not-u": {"shape": [2, 6]},
    "sha-number": {"sha256": 1},
    "sha-short": {"sha256": "00"},
    "spec-list": {"spec": []},
    "spec-text": {"spec": "rank 2"},
    "spec-null": {"spec": None},
    "spec-missing": {"spec": {"rank": 2}},
    "spec-unknown": {"spec": SPEC | {"alpha": 16}},
    "rank-zero": {"spec": SPEC | {"rank": 0}},
    "rank-text": {"spec": SPEC | {"rank": "3"}},
    "u-huge": {"spec": SPEC | {"u": 10**12}},
    "tying": {"spec": SPEC | {"tying": "knot"}},
    "spec-targets": {"spec": SPEC | {"targets": [{"path": "(a*)*b"}]}},
    "base-number": {"base": 3},
    "base-long": {"base": "x" * 1001},
    **{f"leaves-{x!r}"[:30]: {"leaves": x} for x in (None, {}, [], [3], [[]], [{}], "all", [ROW, ROW], [ROW] * 10_001)},
    **{f"path-{str(x)[:3]}": {"leaves": [ROW | {"path": x}]} for x in (None, "", 3, ["a"], "x" * 1001)},
    **{f"layout-{x}": {"leaves": [ROW | {"layout": x}]} for x in (None, 3, "out", "in out layer layer", [])},
    **{f"groups-{x}": {"leaves": [ROW | {"groups": x}]} for x in (None, [], [-1], ["0"], [0.0], [True], [0, 0], 0)},
    "groups-huge": {"leaves": [ROW | {"groups": [10**300]}]},
    **{f"probes-{x}": {"leaves": [ROW | {"probes": x}]} for x in (None, 3, [], [[1.0]], [["a"] * 7], [[True] * 7], {})},
    "probes-beyond-floats": {"leaves": [ROW | {"probes": [[10**400] * 7]}]},
    **{f"factors-{x}": {"factors": x} for x in (3, [], {}, {"modules": []}, {"modules": ["a"], "sha256": None})},
    "factors-twice": {"factors": {"modules": ["a", "a"], "sha256": ""}},
    "factors-nested": {"factors": {"modules": [["a"]], "sha256": ""}},
    "factors-of-version-3": {"factors": {"modules": [], "projections": ["a"], "sha256": ""}},
    **{
        f"projections-{x}": {"format_version": 3, "factors": {"modules": [], "projections": x, "sha256": ""}}
        for x in (None, [], {}, "a", [3], [["a"]], ["a", "a"])
    },
    "version-3-without": {"format_version": 3},
    "version-3-of-modules": {"format_version": 3, "factors": {"modules": ["a"], "sha256": ""}},
    **{f"fingerprint-{x}": {"base_fingerprint": x} for x in (3, [], {}, {"dtype": "float32", "weights": []})},
    "fingerprint-row": {"base_fingerprint": {"dtype": "float32", "weights": {"a": [1.0]}}},
    "fingerprint-text": {"base_fingerprint": {"dtype": "float32", "weights": {"a": ["1"] * 5}}},
}


@pytest.mark.parametrize("changes", MALFORMED.values(), ids=MALFORMED)
def test_malformed_descriptions(saved, changes):
    edit(saved, **changes)
    with pytest.raises(AdapterError, match=r"adapter.json is (malformed|not JSON)|vector.bin was altered") as caught:
        read_adapter(saved)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("seed", ["0", [1], None, 1.5, True])
def test_a_seed_that_is_no_integer(saved, seed):
    edit(saved, spec=SPEC | {"seed": seed})
    with pytest.raises(AdapterError, match="seed"):
        read_adapter(saved)


def test_probes_that_are_wrong(saved, factors):
    description = read_adapter(saved)[2]
    description["leaves"][3]["probes"][0][2] *= -1.5
    with pytest.raises(AdapterError, match="1 of 14 weights"):
        check_factors(description, factors)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite(factors, tmp_path, bad):
    save_adapter(tmp_path / "a", factors, vector(factors).at[0, 0].set(bad), "base")
    with pytest.raises(AdapterError, match="not finite"):
        read_adapter(tmp_path / "a")


def test_an_enormous_description_is_not_read(saved):
    with (saved / "adapter.json").open("r+b") as file:
        file.truncate(2**22 + 1)
    with pytest.raises(AdapterError, match="larger than"):
        read_adapter(saved)


def test_a_row_that_is_gone_is_missed(saved):
    """The groups are as many without it, and the other rows fit the model: nothing else would tell."""
    leaves = json.loads((saved / "adapter.json").read_text())["leaves"]
    edit(saved, leaves=leaves[:-1])
    with pytest.raises(AdapterError, match="adapter.json was altered: its spec, shape or leaves are not as they were"):
        read_adapter(saved)


def test_a_description_of_before_there_was_a_digest_is_read(saved):
    edit(saved, structure_sha256=KeyError, description_sha256=KeyError)
    assert read_adapter(saved)[0].n_tie >= 1


def test_every_field_is_under_the_checksum(saved):
    description = json.loads((saved / "adapter.json").read_text())
    for changes in (
        {"base": "another/model"},
        {"about": {"config": {"template": "boxed"}}},
        {"base_fingerprint": {"dtype": "float32", "weights": {}}},
        {"unknown": 1},
    ):
        edit(saved, **changes)
        with pytest.raises(AdapterError, match="altered: one of its fields"):
            read_adapter(saved)
        (saved / "adapter.json").write_text(json.dumps(description))
    read_adapter(saved)


@pytest.mark.parametrize("name", ["vector.bin", "adapter.json"])
def test_what_is_no_file_is_refused_at_once(saved, name):
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(AdapterError, match=f"{name} is a named pipe, expected a file"):
        read_adapter(saved)
    (saved / name).unlink()
    (saved / name).symlink_to("/dev/zero")
    with pytest.raises(AdapterError, match=f"{name} is a device, expected a file"):
        read_adapter(saved)


@pytest.mark.parametrize("name", ["vector.bin", "adapter.json", "vector.bin.tmp"])
def test_a_link_is_replaced_and_not_followed(saved, factors, tmp_path, name):
    (tmp_path / "victim").write_text("mine")
    (saved / name).unlink(missing_ok=True)
    (saved / name).symlink_to(tmp_path / "victim")
    save_adapter(saved, factors, vector(factors), "base")
    assert (tmp_path / "victim").read_text() == "mine" and not (saved / name).is_symlink()
    read_adapter(saved)


def test_no_pattern_of_a_file_is_matched(saved, qwen2):
    # As a regular expression, this would backtrack for longer than anybody waits.
    path = "(l|a|y|e|r|s|.|..)*(l|a|y|e|r|s|.|..)*(/|.)*(/|.)*!"
    leaves = json.loads((saved / "adapter.json").read_text())["leaves"]
    older = {"structure_sha256": KeyError, "description_sha256": KeyError}
    edit(saved, leaves=[leaves[0] | {"path": path}, *leaves[1:]], **older)
    started = time.monotonic()
    with pytest.raises(ValueError, match="matches no leaf"):
        load_adapter(saved, qwen2.params)
    assert time.monotonic() - started < 10


def test_a_description_too_long_to_be_read_is_not_written(factors, tmp_path):
    with pytest.raises(AdapterError, match="shorten `about`"):
        save_adapter(tmp_path / "a", factors, vector(factors), "base", note="x" * 2**22)
    assert not (tmp_path / "a").exists()


def test_other_tie_groups_are_refused(saved, factors):
    description = read_adapter(saved)[2]
    description["leaves"][5]["groups"] = [3]
    with pytest.raises(AdapterError, match="and its own table tie modules differently"):
        check_factors(description, factors)


def test_missing_files(saved, tmp_path):
    with pytest.raises(AdapterError, match="adapter.json is missing"):
        read_adapter(tmp_path / "nowhere")
    (saved / "vector.bin").unlink()
    with pytest.raises(AdapterError, match="vector.bin is missing"):
        read_adapter(saved)


def test_vector_of_another_size_or_content(saved):
    path = saved / "vector.bin"
    data = path.read_bytes()
    for wrong in (data[:-1], data + b"\0", b""):
        path.write_bytes(wrong)
        with pytest.raises(AdapterError, match=f"vector.bin has {len(wrong)} bytes, expected {len(data)}"):
            read_adapter(saved)
    path.write_bytes(data[::-1])
    with pytest.raises(AdapterError, match="SHA-256"):
        read_adapter(saved)


def test_a_reader_gives_each_adapter_its_vector(qwen2, factors, tmp_path):
    reader, vectors = AdapterReader(qwen2.params, factors), [vector(factors, seed) for seed in range(3)]
    base = base_fingerprint(qwen2.params)
    for place, v in enumerate(vectors):
        note = '\n "leaves": '
        save_adapter(tmp_path / str(place), factors, v, f"base {place}", "float32", base, note=note, seed=place)
    compared = []
    original = adapter_file.check_fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_file, "check_fit", lambda *args: compared.append(1) or original(*args))
        for place in (0, 1, 2, 0):
            np.testing.assert_array_equal(reader.read(tmp_path / str(place)), vectors[place])
        assert len(compared) == 1, "the same tables are compared once"
        for place in (3, 4):  # the same weights, as another machine would have rounded their numbers
            other = json.loads(json.dumps(base), parse_float=lambda x, by=place: float(x) * (1 + by * 1e-7))
            save_adapter(tmp_path / str(place), factors, vectors[0], f"base {place}", "float32", other)
        for place in (3, 0, 4, 3, 4, 1):
            reader.read(tmp_path / str(place))
    assert len(compared) == 3, "and of several tables each once, in whatever order they come"


def test_a_reader_refuses_what_does_not_belong(qwen2, factors, saved, tmp_path):
    reader = AdapterReader(qwen2.params, factors)
    reader.read(saved)
    save_adapter(tmp_path / "some", factorize(qwen2.params, SPECS["some"]), jnp.ones((5, 4)), "base")
    with pytest.raises(AdapterError, match="some was trained with TinyLoRA.rank=1"):
        reader.read(tmp_path / "some")
    flipped = {path: dataclasses.replace(leaf, U=-leaf.U) for path, leaf in factors.leaves.items()}
    save_adapter(tmp_path / "other", dataclasses.replace(factors, leaves=flipped), vector(factors), "base")
    with pytest.raises(AdapterError, match="other: the adapter was trained on 'base', whose factors differ"):
        reader.read(tmp_path / "other")
    text = (saved / "adapter.json").read_bytes()
    head, key, tail = text.partition(b'\n "leaves":')
    for broken in (key + tail, b"{" + key + tail, head.replace(b'"about": {', b'"about": {"x": {') + key + tail):
        (saved / "adapter.json").write_bytes(broken)  # with tables that are known, but in another place
        with pytest.raises(AdapterError, match="adapter.json"):
            reader.read(saved)
    (saved / "adapter.json").write_bytes(text)
    (saved / "vector.bin").write_bytes(b"\0" * (saved / "vector.bin").stat().st_size)
    with pytest.raises(AdapterError, match="SHA-256"):
        reader.read(saved)
