"""Log-probabilities of completions, without storing an array [rows, tokens, vocabulary]."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinylora_jax.models import ModelConfig, Packing, forward, head_kernel
from tinylora_jax.models.packing import before
from tinylora_jax.models.sharding import current_mesh, replicated, streams

_CHUNKS = 128, 1024  # bounds on tokens whose logits exist at once: 0.6 GB at most for a vocabulary of 151,936


def _chunked(function, chunk: int | None, wanted: jax.Array, *arrays: jax.Array):
    """Maps a function of `[chunk, …]` arrays over longer arrays; chunks without wanted tokens give zeros."""
    count = wanted.shape[0]
    least, most = _CHUNKS
    size = min(chunk or min(max(count // 8, least), most), count)
    pad = lambda x: jnp.pad(x, ((0, -count % size), *((0, 0),) * (x.ndim - 1)))
    split = [pad(x).reshape(-1, size, *x.shape[1:]) for x in (wanted, *arrays)]

    def one(args):
        wanted, *arrays = args
        nothing = lambda *arrays: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arrays))
        return jax.lax.cond(jnp.any(wanted), function, nothing, *arrays)

    out = jax.lax.map(one, tuple(split))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], out)


def _scores(hidden, head, tokens, temperature, with_gradient):
    """Logprob and entropy of each row, and ∂logprob/∂hidden if requested."""
    scaled = jnp.matmul(hidden, head, preferred_element_type=jnp.float32) / temperature
    top = jnp.max(scaled, axis=-1, keepdims=True)
    e = jnp.exp(scaled - top)  # one pass gives both sums and the 16-bit copy for the product
    total, weighted = jnp.sum(e, axis=-1), jnp.sum(e * scaled, axis=-1)
    log_normalizer = top[:, 0] + jnp.log(total)
    logprob = jnp.take_along_axis(scaled, tokens[:, None], axis=1)[:, 0] - log_normalizer
    entropy = log_normalizer - weighted / total
    if not with_gradient:
        return logprob, entropy
    expected = jnp.matmul(e.astype(head.dtype), head.T, preferred_element_type=jnp.float32) / total[:, None]
    chosen = jnp.take(head, tokens, axis=1).T.astype(jnp.float32)
    return logprob, entropy, ((chosen - expected) / temperature).astype(hidden.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def token_logprobs(
    hidden: Float[Array, "n hidden"],
    head: Float[Array, "hidden vocab"],
    tokens: Int[Array, " n"],
    wanted: Bool[Array, " n"],
    temperature: float,
    chunk: int | None = None,
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Computes log softmax(hidden · head / temperature)[token] and the entropy of that distribution.

    The forward pass stores ∂logprob/∂hidden = (headᵧ − Σ p·head) / temperature, one vector per token. So the backward
    pass is a product with a scalar, and logits are computed only once. Gradients flow to `hidden` only, through the
    log-probability: the head is frozen, and the entropy is a metric.

    Args:
      hidden: final hidden states, `[tokens, hidden]`.
      head: output head, `[hidden, vocab]`.
      tokens: token ids to score, int32 `[tokens]`.
      wanted: tokens whose results are needed, bool `[tokens]`; chunks without any are skipped.
      temperature: sampling temperature of the policy, > 0.
      chunk: number of tokens scored at once; None takes an eighth of them, from 128 to 1024.

    Returns:
      Log-probabilities and entropies in nats, float32 `[tokens]`; undefined for tokens that are not wanted.
    """
    return _chunked(lambda h, t: _scores(h, head, t, temperature, False), chunk, wanted, hidden, tokens)


def _forward_rule(hidden, head, tokens, wanted, temperature, chunk):
    scores = lambda h, t: _scores(h, head, t, temperature, True)
    logprob, entropy, slope = _chunked(scores, chunk, wanted, hidden, tokens)
    return (logprob, entropy), slope


def _backward_rule(temperature, chunk, slope, cotangents):
    return (cotangents[0][:, None] * slope.astype(jnp.float32)).astype(slope.dtype), None, None, None


token_logprobs.defvjp(_forward_rule, _backward_rule)


def _with_head(
    hidden: Float[Array, "n hidden"],
    head: Float[Array, "hidden vocab"],
    tokens: Int[Array, " n"],
    wanted: Bool[Array, " n"],
    temperature: float,
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """`token_logprobs` with a gradient for the head too, for which each chunk's logits are recomputed."""
    scores = jax.checkpoint(lambda h, t: _scores(h, head, t, temperature, False))
    return _chunked(scores, None, wanted, hidden, tokens)


def packed_logprobs(
    config: ModelConfig,
    params: Any,
    tokens: Int[Array, "sequences tokens"],
    packing: Packing,
    wanted: Bool[Array, "sequences tokens"],
    temperature: float,
    remat: bool = False,
    trains_head: bool = False,
) -> tuple[Float[Array, "sequences tokens"], Float[Array, "sequences tokens"]]:
    """Scores every token of packed rows given the tokens before it; a shared prompt runs once per group.

    Args:
      config: architecture of the model.
      params: weights, adapted or not.
      tokens: packed token ids, int32 `[sequences, tokens]`.
      packing: maps between tokens and rows.
      wanted: tokens to score, bool `[sequences, tokens]`.
      temperature: sampling temperature of the policy.
      remat: whether to recompute each block in the backward pass.
      trains_head: whether the output head gets a gradient; otherwise it is frozen.

    Returns:
      Log-probabilities and entropies in nats, float32 `[sequences, tokens]`; undefined for tokens that are not wanted.
    """
    hidden, _ = forward(config, params, tokens, packing=packing, remat=remat)
    hidden = before(hidden, packing)
    head = head_kernel(config, params)
    scored = _with_head if trains_head else token_logprobs
    if current_mesh() is not None:  # score each sequence in chunks on its own device, with a copy of the head
        with streams():
            head = replicated(head)
        own = lambda *arrays: scored(arrays[0], head, *arrays[1:], temperature)
        return jax.vmap(own)(hidden, tokens, wanted)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    scores = scored(hidden, head, tokens.reshape(-1), wanted.reshape(-1), temperature)
    return tuple(x.reshape(tokens.shape) for x in scores)
