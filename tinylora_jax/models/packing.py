"""How packed sequences look to attention: index maps between tokens and rows (`training.batch.pack`).

A group of completions shares its prompt: the prompt stands in the sequence once, and in the row of every completion.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packing:
    """Where the tokens of B sequences stand in their rows; T tokens, R rows of W places, places counted row by row.

    Attributes:
      positions: int32 `[B, T]`, each token's position in its rows.
      tokens_at: int32 `[B, R, W]`, the token at each place of each row; T where there is none.
      places_of: int32 `[B, T, G]`, the places of each token, R·W where it has fewer than G.
      lengths: int32 `[B, R]`.
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

    The gradient is gathered too, through the inverse map, instead of scattered: a scatter-add is slow, and on a GPU
    its result depends on the order of its additions.

    Args:
      x: what to take from.
      index: what to take; n or more for nothing.
      inverse: for each entry of `x` the places that it was taken to; m or more for none.
    """
    return _pick(x, index)


def _gather_backward(inverse, g):
    taken = (_pick(g, inverse[..., i]).astype(jnp.float32) for i in range(inverse.shape[-1]))
    return sum(taken).astype(g.dtype), None, None


gather.defvjp(lambda x, index, inverse: (_pick(x, index), inverse), _gather_backward)


def to_rows(x: Float[Array, "sequences tokens ..."], packing: Packing) -> Float[Array, "rows places ..."]:
    """The rows of a sequence of tokens, zeros where a row has none; all sequences' rows one after the other."""
    sequences, rows, places = packing.tokens_at.shape
    flat = gather(x, packing.tokens_at.reshape(sequences, -1), packing.places_of)
    return flat.reshape(sequences * rows, places, *x.shape[2:])


def _homes(packing: Packing) -> tuple[jax.Array, jax.Array]:
    """Each token's first place, and for each place its token if it is that token's first."""
    sequences, rows, places = packing.tokens_at.shape
    first = packing.places_of[..., 0]
    tokens_at = packing.tokens_at.reshape(sequences, -1)
    tokens = first.shape[1]
    padded = jnp.concatenate([first, jnp.full((sequences, 1), rows * places, first.dtype)], axis=1)
    home = jnp.take_along_axis(padded, tokens_at, axis=1)
    return first, jnp.where(home == jnp.arange(rows * places), tokens_at, tokens)


def to_sequences(x: Float[Array, "rows places ..."], packing: Packing) -> Float[Array, "sequences tokens ..."]:
    """The inverse of `to_rows`; a token that stands in several rows is taken from the first."""
    sequences, rows, places = packing.tokens_at.shape
    first, owner = _homes(packing)
    return gather(x.reshape(sequences, rows * places, *x.shape[2:]), first, owner[..., None])


def before(x: Float[Array, "sequences tokens ..."], packing: Packing) -> Float[Array, "sequences tokens ..."]:
    """For each token the entry of the token before it in its (first) row; zeros for the first token of a row."""
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
    # A token comes before the tokens at the places after its own, as far as these are their tokens' first places.
    last = packing.places_of % places == places - 1
    following = jax.vmap(lambda o, p: jnp.take(o, p, axis=0, mode="fill", fill_value=tokens))(
        owner, packing.places_of + 1
    )
    return gather(x, previous, jnp.where(last, tokens, following))
