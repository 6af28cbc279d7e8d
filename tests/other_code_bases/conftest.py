"""The laws every example must keep, against the paper's equation written in NumPy."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax import init, merge
from tinylora_jax.adapters import select
from tinylora_jax.adapters.projections import projection
from tinylora_jax.adapters.targets import leaves_by_path


class Matrix(NamedTuple):
    """How an example's author reads one adapted matrix out of a leaf.

    `index` picks a layer of a stack; then come `num_in` input axes and the outputs, or the outputs and the inputs
    if it is laid out as in torch.
    """

    path: str
    index: tuple = ()
    num_in: int = 1
    torch: bool = False

    @property
    def name(self):
        return f"{self.path}[{self.index[-1]}]" if self.index else self.path


def papers_update(W, P):
    """U Σ P Vᵀ for W `[out, in]`, in float64, with the documented signs."""
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    signs = np.sign(U[np.abs(U).argmax(axis=0), np.arange(U.shape[1])])
    U, Vt, rank = U * signs, Vt * signs[:, None], len(P)
    return (U[:, :rank] * S[:rank]) @ P @ Vt[:rank]


def papers_updates(leaves, matrices, spec):
    """What each number of v adds to the leaves: `{path: [groups, u, *leaf]}`.

    `matrices` stand in the order in which they share vectors (tiled).
    """
    groups = -(-len(matrices) // spec.n_tie)
    updates = {matrix.path: np.zeros((groups, spec.u, *leaves[matrix.path].shape)) for matrix in matrices}
    for k, matrix in enumerate(matrices):
        part = np.asarray(leaves[matrix.path], np.float64)[matrix.index]
        rows = part.reshape(math.prod(part.shape[: matrix.num_in]), -1)
        for i, P in enumerate(projection(spec.seed, matrix.name, spec.u, spec.rank)):
            update = papers_update(rows, P) if matrix.torch else papers_update(rows.T, P).T
            updates[matrix.path][k // spec.n_tie, i][matrix.index] = update.reshape(part.shape)
    return updates


def replaced(model, leaves):
    """The model with other leaves at some paths."""
    old, structure = jax.tree.flatten(model)
    return structure.unflatten(leaves.get(path, leaf) for path, leaf in zip(leaves_by_path(model), old, strict=True))


@pytest.fixture(autouse=True)
def little_optimization():
    """These programs run a few times on a few numbers: compiling them is what takes the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def random_weights():
    """A model of shapes with numbers in it, as a checkpoint would give them; nothing at a trivial initial value."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        noise = 0.3 * rng.standard_normal(leaf.shape)
        return jnp.asarray(noise + (leaf.ndim == 1), leaf.dtype)  # scales of norms stand around 1

    return lambda model: jax.tree.map(fill, model)


@pytest.fixture
def check_laws():
    """Checks `step(v) -> (loss, gradient)` of an adapted model against the model's own `loss(model)`."""

    def check(model, factors, matrices, loss, *steps):
        spec, leaves = factors.spec, leaves_by_path(model)
        assert [module.name for module in select(model, spec.targets)] == [matrix.name for matrix in matrices]

        own = {matrix.path: leaves[matrix.path] for matrix in matrices}
        own_loss = jax.jit(jax.value_and_grad(lambda kernels: loss(replaced(model, kernels))))

        zero = init(factors)
        for path, leaf in leaves_by_path(merge(model, factors, zero)).items():
            assert leaf is leaves[path] or np.array_equal(leaf, leaves[path]), path
        for step in steps:
            np.testing.assert_allclose(step(zero)[0], own_loss(own)[0], rtol=1e-6)

        v = jnp.asarray(0.3 * np.random.default_rng(0).standard_normal(zero.shape), jnp.float32)
        directions = papers_updates(leaves, matrices, spec)
        along = lambda path: np.tensordot(np.asarray(v, np.float64), directions[path], axes=2)
        dense = {path: jnp.asarray(np.asarray(own[path]) + along(path), own[path].dtype) for path in own}
        for path, leaf in leaves_by_path(merge(model, factors, v)).items():
            if path in dense:
                np.testing.assert_allclose(leaf, dense[path], atol=2e-4)  # float32 triplets of close singular values
            else:
                assert leaf is leaves[path], path

        value, slopes = own_loss(dense)
        change = abs(value - own_loss(own)[0])
        assert change > 1e-4 * abs(value), "this vector changes nothing"
        # W is linear in v, so dL/dvᵢ = ⟨dL/dW, dW/dvᵢ⟩.
        gradient = sum(np.tensordot(directions[path], np.asarray(slopes[path]), slopes[path].ndim) for path in own)
        for step in steps:
            got = step(v)
            np.testing.assert_allclose(got[0], value, rtol=0, atol=0.01 * change)
            np.testing.assert_allclose(got[1], gradient, rtol=0, atol=1e-3 * np.abs(gradient).max())

    return check


@pytest.fixture
def matrix():
    """`Matrix`, for tests to name theirs."""
    return Matrix
