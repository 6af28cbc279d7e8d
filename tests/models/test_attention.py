"""The attention of each situation against a softmax written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.models.attention import cached_attention, causal_attention, decode_kernel, write


def normals(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def attention(q, keys, values):
    """One query `[heads, d]` against `[n, kv_heads, d]`, in float64."""
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    groups = q.shape[0] // keys.shape[1]
    out = np.zeros(q.shape)
    for head in range(q.shape[0]):
        scores = keys[:, head // groups] @ q[head] / np.sqrt(q.shape[1])
        p = np.exp(scores - scores.max())
        out[head] = (p / p.sum()) @ values[:, head // groups]
    return out


def test_causal_attention_sees_itself_and_what_came_before():
    q, k, v = normals(0, 2, 5, 4, 8), normals(1, 2, 5, 2, 8), normals(2, 2, 5, 2, 8)
    got = causal_attention(q, k, v, jnp.asarray([5, 3], jnp.int32))
    for row, length in enumerate((5, 3)):
        for at in range(length):
            expected = attention(q[row, at], k[row, : at + 1], v[row, : at + 1])
            np.testing.assert_allclose(got[row, at], expected, atol=1e-5)


# Query heads, kv heads, head size: Qwen2.5's seven queries a kv head, none shared, more than a tile holds.
SIZES = [(14, 2, 64), (4, 4, 64), (32, 1, 128), (8, 2, 64)]


@pytest.mark.parametrize(("heads", "kv_heads", "size"), SIZES)
def test_decoding_by_the_kernel_and_by_the_plain_path(heads, kv_heads, size):
    rows, capacity = 7, 192
    start = np.array([0, 1, 63, 64, 65, 150, 191], np.int32)  # around the blocks of 64, first and last place
    q, k, v = normals(0, rows, 1, heads, size), normals(1, rows, 1, kv_heads, size), normals(2, rows, 1, kv_heads, size)
    keys, values = normals(3, rows, capacity, kv_heads, size), normals(4, rows, capacity, kv_heads, size)
    # What lies beyond a row's position may be anything finite.
    beyond = (np.arange(capacity) >= start[:, None])[:, :, None, None]
    keys, values = jnp.where(beyond, 1e4, keys), jnp.where(beyond, 1e4, values)
    plain = cached_attention(q, k, v, keys, values, jnp.asarray(start))
    kernel = decode_kernel(q, k, v, keys, values, jnp.asarray(start), interpret=True)
    for row, at in enumerate(start.tolist()):
        seen = [jnp.concatenate([old[row, :at], new[row]]) for old, new in ((keys, k), (values, v))]
        expected = attention(q[row, 0], *seen)
        for mixed, new_keys, new_values in (plain, kernel):
            np.testing.assert_allclose(mixed[row, 0], expected, atol=1e-5)
            np.testing.assert_array_equal(new_keys[row, at], k[row, 0])
            np.testing.assert_array_equal(new_values[row, at], v[row, 0])
            others = np.arange(capacity) != at
            np.testing.assert_array_equal(new_keys[row, others], keys[row, others])
            np.testing.assert_array_equal(new_values[row, others], values[row, others])


def test_write_touches_its_slots_only():
    buffer = jnp.arange(2 * 6 * 2, dtype=jnp.float32).reshape(2, 6, 2)
    update = -jnp.ones((2, 2, 2), jnp.bfloat16)
    got = np.asarray(write(buffer, update, jnp.array([4, 1], jnp.int32)))
    expected = np.asarray(buffer).copy()
    expected[0, 4:6] = expected[1, 1:3] = -1
    np.testing.assert_array_equal(got, expected)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # from jax 0.12 on
def test_the_kernel_lowers_for_an_nvidia_gpu():
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    arguments = like(4, 1, 14, 64), like(4, 1, 2, 64), like(4, 1, 2, 64), like(4, 128, 2, 64), like(4, 128, 2, 64)
    traced = jax.jit(decode_kernel).trace(*arguments, jax.ShapeDtypeStruct((4,), jnp.int32))
    try:
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        pytest.skip(f"this jax lowers for a GPU only where there is one: {error}")
    assert "triton" in text
