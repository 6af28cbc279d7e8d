"""The format's page is enough to read an adapter by."""

import ast
import doctest
from pathlib import Path

import adapter_reader
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.adapters import Target, TinyLoRA, delta, factorize, init
from tinylora_jax.adapters.rebase import places_of, with_projections
from tinylora_jax.adapters.targets import leaves_by_path
from tinylora_jax.io.adapter import _file as adapter_file
from tinylora_jax.io.adapter._description import FORMAT_VERSION
from tinylora_jax.io.adapter._file import save_adapter

HERE = Path(__file__).parent
STACKED = TinyLoRA(
    u=3, n_tie=2, tying="structured", targets=(Target("x/[12]/q", "layer in out out"), Target("x/10/o", "out in"))
)


def stacked_tree():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    k = draw(6, 10)
    U, _, Vt = jnp.linalg.svd(k, full_matrices=False)
    flat = U @ jnp.diag(jnp.array([3.0, 3.0, 2.0, 1.0, 1.0, 1.0])) @ Vt  # not determined: it travels with the file
    return {"x": {10: {"o": flat}, 2: {"q": draw(3, 7, 2, 3)}, 1: {"q": draw(2, 7, 2, 3)}}}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("drawn", ["by the seed", "otherwise"])
@pytest.mark.parametrize("name", ["tiled", "structured", "stacked"])
def test_a_reader_written_from_the_page_gets_the_same_update(name, drawn, dtype, qwen2, tmp_path):
    params, spec = {
        "tiled": (qwen2.params, TinyLoRA(n_tie=5)),
        "structured": (qwen2.params, TinyLoRA(rank=3, u=2, n_tie=2, tying="structured", seed=7)),
        "stacked": (stacked_tree(), STACKED),
    }[name]
    factors = factorize(params, spec)
    rng = np.random.default_rng(1)
    if drawn == "otherwise":
        some, shape = list(places_of(factors))[::2], (spec.u, spec.rank, spec.rank)
        factors = with_projections(factors, {name: rng.standard_normal(shape).astype(np.float32) for name in some})
    v = jnp.asarray(rng.standard_normal(init(factors).shape), jnp.float32)
    v = v.astype(dtype).astype(jnp.float32)
    save_adapter(tmp_path, factors, v, "base", dtype)
    kept = bool(factors.ill_conditioned) or drawn == "otherwise"
    assert (tmp_path / "factors.safetensors").exists() == kept
    found = adapter_reader.updates(tmp_path, {p: np.asarray(x) for p, x in leaves_by_path(params).items()})
    count = 0
    for path, update in delta(factors, v).items():
        for layer, expected in enumerate(np.asarray(update, np.float64)):
            ours = found[path] if path in found else found[f"{path}[{layer}]"]
            assert np.linalg.norm(ours - expected) <= 1e-3 * np.linalg.norm(expected), (path, layer)
            count += 1
    assert count == len(found)


def test_the_reader_knows_the_page_alone():
    source = ast.parse((HERE / "adapter_reader.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(source) if isinstance(node, ast.Import) for alias in node.names}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(source))
    assert imported == {"hashlib", "json", "math", "struct", "numpy"}


def test_the_page_s_example_and_limits_are_true():
    page = Path(adapter_file.__file__).with_name("ADAPTER_FORMAT.md")
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted == 2 and result.failed == 0
    assert f"version {FORMAT_VERSION}\n" in page.read_text(encoding="utf-8")
