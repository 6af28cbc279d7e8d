"""Against torch itself."""

import numpy as np
import pytest
import torch

from tinylora_jax.io.peft._torch_random import normals

SEEDS = [*range(40), 42, 12345, 2**31, 2**32 - 1, 2**32, 2**40 + 7, -1, -(2**63), 2**64 - 1]
SHAPES = [(1,), (2,), (3, 1), (1, 2, 2), (3, 2, 2), (15,), (16,), (17,), (2, 3, 3), (31,), (32,), (33,), (64, 2, 2)]


@pytest.mark.parametrize("shape", [*SHAPES, (1000,), (5, 64, 64)], ids=str)
def test_the_numbers_are_those_of_torch(shape):
    for seed in SEEDS:
        std = shape[-1] ** -0.5
        expected = torch.normal(0.0, std, shape, generator=torch.Generator().manual_seed(seed)).numpy()
        found = normals(seed, shape, std)
        assert found.dtype == np.float32 and found.shape == shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=f"seed {seed}")


def test_none_is_none():
    assert normals(0, (0, 2, 2)).shape == (0, 2, 2)
