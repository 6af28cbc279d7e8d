"""Index maps between packed sequences and the rows that attention sees (`training.batch.pack`).

The completions of a group share their prompt, which is stored once in the sequence and appears in every row.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packing:
    """Maps T tokens of each of B sequences to R rows of W places; places are numbered row by row.

    Attributes:
      positions: position of each token in its rows, int32 `[B, T]`.
      tokens_at: token index at each place of each row, int32 `[B, R, W]`; T if the place is empty.
      places_of: places of each token, int32 `[B, T, G]`; filled with R·W if it has fewer than G.
      lengths: length of each row, int32 `[B, R]`.
    """

    positions: Int[Array, "sequences tokens"]
    tokens_at: Int[Array, "sequences rows places"]
    places_of: Int[Array, "sequences tokens samples"]
    lengths: Int[Array, "sequences rows"]


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[b, index[b]]`, zero where the index is out of range."""
    return jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="fill", fill_value=0))(x, index)


@jax.custom_vjp
def gather(
    x: Float[Array, "sequences n ..."], index: Int[Array, "sequences m"], inverse: Int[Array, "sequences n times"]
) -> Float[Array, "sequences m ..."]:
    """`x[b, index[b]]`, zero where the index is out of range.

    The gradient is a gather through the inverse map instead of a scatter-add, which is slow and, on a GPU, depends on
    the order of additions.

    Args:
      x: source array, `[sequences, n, ...]`.
      index: entry of `x` for each result, int32 `[sequences, m]`; n or more gives zero.
      inverse: results that take each entry of `x`, int32 `[sequences, n, times]`; m or more means none.
    """
    return _pick(x, index)


def _gather_backward(inverse, g):
    taken = (_pick(g, inverse[..., i]).astype(jnp.float32) for i in range(inverse.shape[-1]))
    return sum(taken).astype(g.dtype), None, None


gather.defvjp(lambda x, index, inverse: (_pick(x, index), inverse), _gather_backward)


def to_rows(x: Float[Array, "sequences tokens ..."], packing: Packing) -> Float[Array, "rows places ..."]:
    """Lays out tokens in rows, with zeros in empty places; the rows of all sequences follow each other."""
    sequences, rows, places = packing.tokens_at.shape
    flat = gather(x, packing.tokens_at.reshape(sequences, -1), packing.places_of)
    return flat.reshape(sequences * rows, places, *x.shape[2:])


def _homes(packing: Packing) -> tuple[jax.Array, jax.Array]:
    """The first place of each token, and the inverse: the token whose first place each place is."""
    sequences, rows, places = packing.tokens_at.shape
    first = packing.places_of[..., 0]
    tokens_at = packing.tokens_at.reshape(sequences, -1)
    tokens = first.shape[1]
    padded = jnp.concatenate([first, jnp.full((sequences, 1), rows * places, first.dtype)], axis=1)
    home = jnp.take_along_axis(padded, tokens_at, axis=1)
    return first, jnp.where(home == jnp.arange(rows * places), tokens_at, tokens)


def to_sequences(x: Float[Array, "rows places ..."], packing: Packing) -> Float[Array, "sequences tokens ..."]:
    """The inverse of `to_rows`; a token that appears in several rows is taken from the first one."""
    sequences, rows, places = packing.tokens_at.shape
    first, owner = _homes(packing)
    return gather(x.reshape(sequences, rows * places, *x.shape[2:]), first, owner[..., None])


def row_sums(x: Float[Array, "sequences tokens"], packing: Packing) -> Float[Array, "sequences tokens"]:
    """The sum over each token's first row: over its completion, if `x` is zero elsewhere.

    A row holds one completion, so no segments are needed. Both directions are gathers, as in `gather`.
    """
    rows = to_rows(x, packing)
    return to_sequences(jnp.broadcast_to(rows.sum(axis=1, keepdims=True), rows.shape), packing)


def before(x: Float[Array, "sequences tokens ..."], packing: Packing) -> Float[Array, "sequences tokens ..."]:
    """The entry of the previous token in each token's first row; zeros for the first token of a row."""
    sequences, _, places = packing.tokens_at.shape
    first, owner = _homes(packing)
    tokens = first.shape[1]
    at = packing.tokens_at.reshape(sequences, -1)
    shifted = jnp.pad(at, ((0, 0), (1, 0)), constant_values=tokens)[:, :-1]
    fill = lambda values, index, none: jax.vmap(lambda v, i: jnp.take(v, i, axis=0, mode="fill", fill_value=none))(
        values, index
    )
    starts = (first % places == 0) | (first >= at.shape[1])
    previous = jnp.where(starts, tokens, fill(shifted, first, tokens))
    # A token precedes the tokens at the places after its own, if those places are the first places of their tokens.
    last = packing.places_of % places == places - 1
    following = jax.vmap(lambda o, p: jnp.take(o, p, axis=0, mode="fill", fill_value=tokens))(
        owner, packing.places_of + 1
    )
    return gather(x, previous, jnp.where(last, tokens, following))
