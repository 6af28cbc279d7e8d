"""The fixed matrices P: the right distribution, and the same numbers for ever."""

import hashlib
import math
import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from tinylora_jax.adapters.projections import projection, standard_normals


def reference_normals(label, count):
    """The docstring's recipe, one number at a time, without NumPy."""
    out, k = [], 0
    while len(out) < count:
        words = struct.unpack(">4Q", hashlib.sha256(f"{label}:{k}".encode()).digest())
        for a, b in (words[:2], words[2:]):
            u1, u2 = (a // 2**11 + 1) / 2**53, (b // 2**11) / 2**53
            radius = math.sqrt(-2 * math.log(u1))
            out += [radius * math.cos(2 * math.pi * u2), radius * math.sin(2 * math.pi * u2)]
        k += 1
    return out[:count]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 33])
def test_the_generator_is_the_documented_one(count):
    np.testing.assert_allclose(standard_normals("7:ü/ß", count), reference_normals("7:ü/ß", count), rtol=1e-12)


def test_the_numbers_never_change():
    # Every adapter file in the world depends on these. Never update them: add a new generator instead.
    P = projection(42, "layers/0/self_attn/q_proj/kernel", u=2, rank=2)
    golden = [
        [[-1.566281199, 0.125920266], [0.400035739, 0.293045849]],
        [[-0.436253309, 0.345862746], [-0.261738986, -1.535883665]],
    ]
    np.testing.assert_allclose(P, np.asarray(golden, np.float32), rtol=0, atol=1e-7)


def test_the_entries_are_independent_normals_of_variance_one_over_rank():
    for rank in (1, 2, 5):
        count = 40_000 // rank**2
        P = projection(1, "m", count, rank).astype(np.float64)
        x = np.sort(P.reshape(-1)) * math.sqrt(rank)
        n = x.size
        assert abs(x.mean()) < 4 / math.sqrt(n)
        assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
        assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
        assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
        cdf = np.array([0.5 * (1 + math.erf(t / math.sqrt(2))) for t in x])
        assert np.abs(cdf - (np.arange(n) + 0.5) / n).max() < 1.95 / math.sqrt(n), "Kolmogorov–Smirnov at 0.1 %"
        # Box–Muller gives pairs: neither they nor neighbours may correlate, squares neither.
        flat = P.reshape(-1) * math.sqrt(rank)
        for lag in (1, 2, 3, 4):
            assert abs(np.mean(flat[:-lag] * flat[lag:])) < 4 / math.sqrt(n)
            assert abs(np.mean((flat[:-lag] ** 2 - 1) * (flat[lag:] ** 2 - 1))) < 4 * 2 / math.sqrt(n)


def test_modules_and_seeds_have_unrelated_matrices():
    names = [f"layers/{i}/mlp/up_proj/kernel" for i in range(300)] + [
        f"layers/mlp/up_proj/kernel[{i}]" for i in range(300)
    ]
    all_P = np.stack([projection(seed, name, 1, 2).reshape(-1) for seed in (0, 1, 11) for name in names])
    assert len(np.unique(all_P, axis=0)) == len(all_P)
    correlation = np.corrcoef(all_P.T)
    assert np.abs(correlation - np.eye(4)).max() < 4 / math.sqrt(len(all_P))
    across = np.corrcoef(all_P[:600].reshape(-1), all_P[600:1200].reshape(-1))[0, 1]
    assert abs(across) < 4 / math.sqrt(2400), "seeds 0 and 1 must not correlate"


def test_more_matrices_extend_the_first_ones():
    np.testing.assert_array_equal(projection(0, "m", 5, 2)[:3], projection(0, "m", 3, 2))


def test_the_process_does_not_matter():
    script = (
        "from tinylora_jax.adapters.projections import projection; import numpy as np; np.random.seed(7);"
        "print(projection(3, 'layers/1/mlp/up_proj/kernel', 3, 2).tobytes().hex())"
    )
    start = lambda seed: subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    processes = [start("1"), start("2")]
    here = projection(3, "layers/1/mlp/up_proj/kernel", 3, 2).tobytes().hex()
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert out.strip() == here
