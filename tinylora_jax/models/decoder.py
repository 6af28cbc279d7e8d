"""One decoder for Qwen2/2.5, Qwen3, Llama 3.x and SmolLM2; they differ by fields of `ModelConfig`.

Kernels are stored as `[in, out]`, and every product goes through `matmul`, so the same code runs base, adapted and
merged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tinylora_jax.adapters import FusedKernel, can_fuse, fuse, fused_matmul, is_adapted, matmul, rescale, scheme_of
from tinylora_jax.models.attention import cached_attention, causal_attention
from tinylora_jax.models.cache import Entries, KeyBias, KVCache, QuantizedEntries, stored_as
from tinylora_jax.models.config import ModelConfig
from tinylora_jax.models.packing import Packing, to_rows, to_sequences
from tinylora_jax.models.rope import Angles, cos_sin, rotate
from tinylora_jax.models.sharding import (
    current_mesh,
    look_up,
    replicated,
    split_features,
    split_heads,
    split_rows,
    streams,
)
from tinylora_jax.models.tpu import ATTENTION, on_tpu

Hidden = Float[Array, "rows seq hidden"]
Layer = tuple[Entries, Entries]  # the cache of one layer
Attend = Callable[[jax.Array, jax.Array, jax.Array, Layer | None, KeyBias | None], tuple[jax.Array, Layer | None]]


class RMSNorm(nnx.Module):
    """Root-mean-square normalization, computed in float32, with a learned scale."""

    def __init__(self, width: int, eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, ...]) -> Float[Array, ...]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return rescale(wide, self.scale.get_value(), x.dtype)


class Linear(nnx.Module):
    """y = x·W + b through `matmul`."""

    def __init__(self, num_in: int, num_out: int, use_bias: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (num_in, num_out), dtype) * num_in**-0.5)
        self.bias = nnx.Param(jnp.zeros((num_out,), dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "rows seq in"]) -> Float[Array, "rows seq out"]:
        return project(x, self)[0]


def project(x: Float[Array, "rows seq in"], *linears: Linear) -> list[Float[Array, "rows seq out"]]:
    """Applies several maps to one input, as a single product if they were joined by `fused`."""
    kernels = [replicated(linear.kernel.get_value()) for linear in linears]
    if isinstance(kernels[0], FusedKernel):
        outputs = fused_matmul(x, kernels[0])
    else:
        outputs = tuple(matmul(x, kernel) for kernel in kernels)
    biases = [linear.bias for linear in linears]
    return [y if bias is None else y + bias.get_value() for y, bias in zip(outputs, biases, strict=True)]


class Attention(nnx.Module):
    """Grouped-query attention with rotary embeddings."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        c = config
        make = partial(Linear, dtype=dtype, rngs=rngs)
        self.q_proj = make(c.hidden_size, c.num_heads * c.head_dim, c.qkv_bias)
        self.k_proj = make(c.hidden_size, c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.v_proj = make(c.hidden_size, c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.o_proj = make(c.num_heads * c.head_dim, c.hidden_size, c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype) if c.qk_norm else None
        self.head_dim, self.num_kv_heads = c.head_dim, c.num_kv_heads

    def __call__(self, x: Hidden, angles: Angles, attend: Attend, layer: Layer | None) -> tuple[Hidden, Layer | None]:
        q, k, v = (
            split_heads(split_features(y), self.num_kv_heads).reshape(*y.shape[:2], -1, self.head_dim)
            for y in project(x, self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        at = angles.cos, angles.sin
        mixed, layer = attend(rotate(q, *at), rotate(k, *at), v, layer, self._key_bias(angles))
        mixed = split_heads(mixed.reshape(*x.shape[:2], -1), self.num_kv_heads)
        return self.o_proj(split_features(mixed)), layer

    def _key_bias(self, angles: Angles) -> KeyBias | None:
        """The bias that a quantized cache leaves out of the keys; None if it stores whole keys."""
        if angles.table is None:
            return None
        bias = self.k_proj.bias.get_value().reshape(self.num_kv_heads, self.head_dim)
        wide = jnp.broadcast_to(bias.astype(jnp.float32), (*angles.cos.shape[:2], *bias.shape))
        return KeyBias(bias, rotate(wide, angles.cos, angles.sin), angles.table)


class MLP(nnx.Module):
    """Gated MLP: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        make = partial(Linear, use_bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate_proj = make(config.hidden_size, config.intermediate_size)
        self.up_proj = make(config.hidden_size, config.intermediate_size)
        self.down_proj = make(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Hidden) -> Hidden:
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(self, x: Hidden, angles: Angles, attend: Attend, layer: Layer | None) -> tuple[Hidden, Layer | None]:
        mixed, layer = self.self_attn(self.input_layernorm(x), angles, attend, layer)
        x = split_rows(x + mixed)
        return split_rows(x + self.mlp(self.post_attention_layernorm(x))), layer


class Embedding(nnx.Module):
    """Embedding table, looked up by token id."""

    def __init__(self, rows: int, width: int, tied: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.tied = tied
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (rows, width), dtype) * 0.02)

    def __call__(self, tokens: Int[Array, "rows seq"]) -> Hidden:
        return look_up(self.embedding.get_value(), tokens, self.tied)


class Decoder(nnx.Module):
    """Embedding, blocks and final norm; the output head is applied by `logits`, where it is needed."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.tie_embeddings, dtype, rngs)
        self.layers = nnx.List([Block(config, dtype, rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, False, dtype, rngs)
        self.config = config

    def __call__(
        self,
        layers: Sequence[Any],
        tokens: Int[Array, "rows seq"],
        positions: Int[Array, "rows seq"],
        start: Int[Array, " rows"] | None,
        cache: KVCache | None,
        packing: Packing | None,
        remat: bool,
    ) -> tuple[Hidden, KVCache | None]:
        angles = self._angles(positions, cache)
        x = split_rows(self.embed_tokens(tokens))
        graph = nnx.split(self.layers[0])[0]
        run = lambda x, weights, layer: _block(graph, weights, x, angles, start, packing, layer)
        if remat:
            run = jax.checkpoint(run, policy=jax.checkpoint_policies.save_only_these_names(ATTENTION))
        caches = [None] * len(layers) if cache is None else list(zip(cache.keys, cache.values, strict=True))
        if tokens.shape[1] > 1 and (remat or cache is not None) and _in_one_loop(layers):
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(layers, caches, strict=True))
            x, stacked = jax.lax.scan(lambda x, layer: run(x, *layer), x, stacked)
            caches = (
                caches if cache is None else [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(len(layers))]
            )
        else:
            for i, layer in enumerate(zip(layers, caches, strict=True)):
                x, caches[i] = run(x, *layer)
        return self.norm(x), None if cache is None else KVCache(*zip(*caches, strict=True))

    def _angles(self, positions: jax.Array, cache: KVCache | None) -> Angles:
        c = self.config
        found = cos_sin(c.rope, c.head_dim, positions)
        if cache is None or not isinstance(cache.keys[0], QuantizedEntries) or not c.qkv_bias or c.qk_norm:
            return Angles(*found)
        everywhere = cos_sin(c.rope, c.head_dim, jnp.arange(cache.capacity)[None])
        return Angles(*found, jnp.concatenate(everywhere, axis=-1)[0])


def _in_one_loop(layers: Sequence[Any]) -> bool:
    """Whether many tokens go through one loop over stacked weights, so that XLA compiles a single block.

    For a TPU that already takes a minute. But stacking copies all weights, and the copies of quantized weights, which
    were to fit on one device, would fill it. Without a loop, the 28 blocks of Qwen2.5-7B compile in 2.6 minutes. Layers
    of which only some are adapted cannot be stacked.
    """
    if len({jax.tree.structure(layer) for layer in layers}) > 1:
        return False
    mesh = current_mesh()
    return mesh is not None or (on_tpu() and scheme_of(layers) == "none")


@partial(jax.jit, static_argnames="graph")
def _block(
    graph: Any,
    weights: Any,
    x: Hidden,
    angles: Angles,
    start: Int[Array, " rows"] | None,
    packing: Packing | None,
    layer: Layer | None,
) -> tuple[Hidden, Layer | None]:
    """Runs one block; jitted so that it is traced, differentiated and lowered once for all layers. XLA inlines it.

    `graph` and `weights` are the results of `nnx.split`.
    """
    with nullcontext() if packing is None else streams():
        return nnx.merge(graph, weights)(x, angles, _attend(start, packing), layer)


@lru_cache
def _graph(config: ModelConfig) -> nnx.GraphDef:
    """The graph of a decoder with a single block, because all are alike and NNX needs 0.1 s for each."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(replace(config, num_layers=1), jnp.float32, nnx.Rngs(0))))[0]


def init_params(config: ModelConfig, seed: int = 0, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Creates random weights as nested dicts, the format that every function of this library takes.

    Args:
      config: architecture of the model.
      seed: seed of the random weights.
      dtype: dtype of every leaf.

    Returns:
      The tree described by `tinylora_jax.io.hf._weights.parameter_names`, with kernels `[in, out]`.
    """
    make = jax.jit(lambda: nnx.to_pure_dict(nnx.split(Decoder(config, dtype, nnx.Rngs(seed)))[1]))
    return make()


def fused(params: Any) -> Any:
    """Joins the maps that share an input: q, k and v; gate and up.

    This speeds up decoding, which is limited by kernel launches and memory traffic. It copies the blocks' weights, so
    call it inside the program that decodes, before its loop.
    """
    elsewhere = FusedKernel(None, (), ())

    def block(layer: Any) -> Any:
        layer = {name: dict(group) for name, group in layer.items()}
        for group, names in (("self_attn", "qkv"), ("self_attn", "o"), ("mlp", ("gate", "up")), ("mlp", ("down",))):
            first, *rest = (f"{name}_proj" for name in names)
            kernels = [layer[group][name]["kernel"] for name in (first, *rest)]
            if not can_fuse(kernels):
                continue
            kernel = fuse(kernels)
            layer[group][first] = {**layer[group][first], "kernel": kernel}
            for name in rest:
                layer[group][name] = {**layer[group][name], "kernel": elsewhere}
        return layer

    return {**params, "layers": {i: block(layer) for i, layer in params["layers"].items()}}


def _attend(start: jax.Array | None, packing: Packing | None) -> Attend:
    """Chooses the form of attention: in packed rows, in a cache from `start` on, or from the beginning of each row."""

    def in_packed_rows(q, k, v, layer, bias):
        rows = (to_rows(x, packing) for x in (q, k, v))
        return to_sequences(causal_attention(*rows, packing.lengths.reshape(-1)), packing), layer

    def after_the_cached(q, k, v, layer, bias):
        mixed, *layer = cached_attention(q, k, v, *layer, start, bias)
        return mixed, jax.tree.map(lambda x: split_heads(x, k.shape[2]), tuple(layer))

    def from_the_beginning(q, k, v, layer, bias):
        if layer is not None:
            place = lambda buffer, x: jax.lax.dynamic_update_slice_in_dim(buffer, x, 0, axis=1)
            keys = stored_as(layer[0], k, None if bias is None else bias.rotated)
            layer = jax.tree.map(place, layer, (keys, stored_as(layer[1], v)))
        return causal_attention(q, k, v), layer

    if packing is not None:
        return in_packed_rows
    return from_the_beginning if start is None else after_the_cached


def forward(
    config: ModelConfig,
    params: Any,
    tokens: Int[Array, "rows seq"],
    start: Int[Array, " rows"] | None = None,
    cache: KVCache | None = None,
    packing: Packing | None = None,
    remat: bool = False,
) -> tuple[Hidden, KVCache | None]:
    """Computes final hidden states of right-padded rows of tokens, or of packed streams.

    Without `start` the tokens have positions 0, 1, … and attend causally; a cache, if given, is filled from its
    beginning. These tokens attend to keys and values as computed, even if the cache stores them in int8. With `start`
    they have positions `start`, `start + 1`, …, are written to the cache, and attend to all earlier positions in it.
    With `packing` each row of `tokens` is a stream.

    Args:
      config: architecture of the model.
      params: nested dicts of weights, adapted or not, fused or not.
      tokens: token ids, int32 `[rows, seq]`.
      start: first position of each row, int32 `[rows]`; needs a cache.
      cache: KV cache with capacity for `start + seq` positions.
      packing: layout of streams in rows; cannot be combined with `start` and `cache`.
      remat: whether to recompute each block in the backward pass instead of storing its activations.

    Returns:
      Hidden states in the weights' dtype (feed them to `logits`), and the updated cache.
    """
    if packing is not None:
        positions = packing.positions
    else:
        first = jnp.zeros((tokens.shape[0],), jnp.int32) if start is None else start
        positions = first[:, None] + jnp.arange(tokens.shape[1])
    layers = [params["layers"][i] for i in range(config.num_layers)]
    model = nnx.merge(_graph(config), nnx.State({**params, "layers": {0: layers[0]}}))
    with nullcontext() if packing is None else streams():
        return model([nnx.State(layer) for layer in layers], tokens, positions, start, cache, packing, remat)


def head_kernel(config: ModelConfig, params: Any) -> Float[Array, "hidden vocab"]:
    """Returns the output head; the transposed embedding if the two are tied.

    Raises:
      ValueError: the head or the embedding has an adapter, which this decoder does not support.
    """
    embedding = params["embed_tokens"]["embedding"]
    kernel = embedding if config.tie_embeddings else params["lm_head"]["kernel"]
    if is_adapted(kernel) or is_adapted(embedding):
        raise ValueError("adapters on embed_tokens or lm_head are not supported; remove them from the targets")
    return kernel.T if config.tie_embeddings else kernel


def logits(config: ModelConfig, params: Any, hidden: Float[Array, "... hidden"]) -> Float[Array, "... vocab"]:
    """Computes next-token logits.

    Args:
      config: architecture of the model.
      params: weights, as passed to `forward`.
      hidden: hidden states from `forward`, `[..., hidden]`. Pass only the positions needed, because the result for all
        positions is float32 `[rows, seq, vocab]`.

    Returns:
      Logits, float32 `[..., vocab]`.
    """
    return jnp.matmul(hidden, head_kernel(config, params), preferred_element_type=jnp.float32)
