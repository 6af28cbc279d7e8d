"""Quantizing while reading: the integers of the oracle, and one clear error for each bad input."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.adapters import leaves_by_path
from tinylora_jax.io import load_pretrained
from tinylora_jax.io.hf import param_shapes, quantize_maps
from tinylora_jax.io.hf._weights import LazyTensor, build_tree, name_tensors
from tinylora_jax.models import ModelConfig

SCHEMES = ("int8", "int4")


@pytest.fixture
def tensors(tiny):
    return name_tensors(*tiny("qwen3"))


def oracle(W):
    """int8 of a torch weight `[out, in]`, in float64."""
    scale = np.abs(W).max(axis=1, keepdims=True).astype(np.float64) / 127
    return np.rint(W / scale), scale


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_only_the_linear_maps_are_quantized(tiny, tensors, scheme, dtype):
    config, params = tiny("qwen3")
    tree = build_tree(config, tensors, dtype, None, scheme)
    plain = build_tree(config, tensors, dtype)
    jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, tree, param_shapes(config, dtype, scheme))
    for path, leaf in leaves_by_path(tree).items():
        if "layers" in path and path.endswith("kernel"):
            assert leaf.scheme == scheme and leaf.dtype == dtype
        else:
            np.testing.assert_array_equal(leaf, leaves_by_path(plain)[path])
    if scheme == "int8":
        kernel = tree["layers"][1]["mlp"]["down_proj"]["kernel"]
        W = np.asarray(plain["layers"][1]["mlp"]["down_proj"]["kernel"], np.float32).T
        values, scale = oracle(W)
        np.testing.assert_allclose(kernel.scale, scale.T, rtol=1e-6)
        assert np.mean(np.asarray(kernel.values) != values.T) < 1e-3  # of ties, float32 may round another way
    jax.tree.map(np.testing.assert_array_equal, quantize_maps(plain, scheme), tree)


def replaced(tensors, name, change):
    values = np.array(tensors[name].read())
    change(values)
    return tensors | {name: LazyTensor(values.shape, lambda: values)}


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(tiny, tensors, scheme, bad):
    def spoil(W):
        W[3, 5] = bad

    with pytest.raises(ValueError, match=rf"{NAME} holds numbers that are not finite, such as in row 3; download"):
        build_tree(tiny("qwen3").config, replaced(tensors, NAME, spoil), jnp.bfloat16, None, scheme)


@pytest.mark.parametrize(
    ("scheme", "dtype", "value"),
    [("int8", jnp.float16, 1e6), ("int8", jnp.bfloat16, 3.4e38), ("int4", jnp.float32, 1e20)],
)
@pytest.mark.filterwarnings("error")
def test_finite_numbers_that_overflow_are_refused_by_name(tiny, tensors, scheme, dtype, value):
    def spoil(W):
        W[3, 5] = value

    message = re.escape(f"{NAME} holds numbers as large as {value:.2g}, which overflow in {scheme} of")
    with pytest.raises(ValueError, match=message):
        build_tree(tiny("qwen3").config, replaced(tensors, NAME, spoil), dtype, None, scheme)


def test_zeros_stay_zeros_and_outliers_are_reported(tiny, tensors, caplog):
    def change(W):
        W[0] = 0
        W[7, 2] = 1e3

    tree = build_tree(tiny("qwen3").config, replaced(tensors, NAME, change), jnp.float32, None, "int8")
    kernel = tree["layers"][1]["mlp"]["up_proj"]["kernel"]
    assert not np.asarray(kernel.values)[:, 0].any() and kernel.scale[0, 0] == 1
    assert "1 output channels have an outlier so large that quantization rounds most" in caplog.text
    assert f"to zero: {NAME} (1). Compare" in caplog.text


def test_unfit_sizes_and_unknown_schemes_are_refused_before_anything_is_read(tiny, tensors, tmp_path):
    odd = ModelConfig(97, 32, 47, 1, 4, 2, 8)
    with pytest.raises(ValueError, match="int4 needs an even number of inputs.*got 47; use int8"):
        param_shapes(odd, jnp.bfloat16, "int4")
    param_shapes(odd, jnp.bfloat16, "int8")
    with pytest.raises(ValueError, match="unknown quantization 'fp8': expected none or int8 or int4"):
        load_pretrained(str(tmp_path / "absent"), quantize="fp8")
