"""The TPU's kernels, run in Python, against what they replace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.models.attention import causal_attention, write
from tinylora_jax.models.tpu import ATTENTION, causal, on_tpu, write_entry


def normals(seed, *shape, dtype):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_entry_is_written_where_the_scatter_writes_it(head_dim, dtype):
    start = jnp.asarray([0, 255, 17, 128, 127], jnp.int32)
    keys, values = (normals(i, 5, 256, 2, head_dim, dtype=dtype) for i in (0, 1))
    k, v = (normals(i, 5, 1, 2, head_dim, dtype=dtype) for i in (2, 3))
    got = write_entry(keys, values, k, v, start, interpret=True)
    np.testing.assert_array_equal(got[0], write(keys, k, start))
    np.testing.assert_array_equal(got[1], write(values, v, start))


def test_long_rows_attend_as_short_ones_do():
    q, k, v = (normals(i, 2, 200, heads, 128, dtype=jnp.float32) for i, heads in enumerate((4, 2, 2)))
    weight = normals(4, 2, 200, 4, 128, dtype=jnp.float32)
    loss = lambda attend: lambda *x: jnp.sum(attend(*x) * weight)
    with jax.numpy_dtype_promotion("standard"):
        flash = jax.value_and_grad(loss(lambda *x: causal(*x, interpret=True)), (0, 1, 2))(q, k, v)
    plain = jax.value_and_grad(loss(causal_attention), (0, 1, 2))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), flash, plain)


def test_a_backward_pass_keeps_what_attention_leaves_under_its_name(capsys):
    q, k, v = (normals(i, 2, 128, heads, 128, dtype=jnp.float32) for i, heads in enumerate((4, 2, 2)))

    def kept(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        attend = jax.checkpoint(lambda *x: jnp.sum(jnp.sin(causal(*x, interpret=True))), policy=policy)
        with jax.numpy_dtype_promotion("standard"):
            jax.ad_checkpoint.print_saved_residuals(attend, q, k, v)
        return [line.split()[0] for line in capsys.readouterr().out.splitlines() if "splash_attention" in line]

    assert kept(ATTENTION) == ["f32[2,4,128,128]", "f32[2,4,128]"], "the mixed heads, and their sums' logarithms"
    assert kept() == []


def test_this_machine_is_no_tpu():
    assert not on_tpu()
