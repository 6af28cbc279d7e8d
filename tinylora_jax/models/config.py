"""The architecture of a decoder: one frozen description for every model family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base frequency and long-context scaling.

    Attributes:
      theta: base of the geometric series of frequencies.
      kind: type of scaling: `default`, `linear`, `llama3` or `yarn`.
      factor: context extension factor (all kinds except `default`).
      original_max_positions: context length in pretraining, in tokens (`llama3`, `yarn`).
      low_freq_factor: rotations over the original context below which a frequency is fully scaled (`llama3`).
      high_freq_factor: rotations over the original context above which a frequency is unscaled (`llama3`).
      beta_fast: rotations over the original context above which a dimension is unscaled (`yarn`).
      beta_slow: rotations over the original context below which a dimension is fully scaled (`yarn`).
      attention_factor: factor on cosines and sines (`yarn`); None means 0.1·ln(factor) + 1.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self):
        kinds = ("default", "linear", "llama3", "yarn")
        if self.kind not in kinds:
            raise ValueError(f"RoPE type {self.kind!r} is not supported; expected one of {', '.join(kinds)}")
        if self.kind in ("llama3", "yarn") and self.original_max_positions < 1:
            raise ValueError(f"RoPE type {self.kind!r} needs original_max_position_embeddings >= 1")


@dataclass(frozen=True)
class ModelConfig:
    """All settings that distinguish Qwen2/2.5, Qwen3, Llama 3.x and SmolLM2 from each other.

    Attributes:
      vocab_size: number of rows of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width of the gated MLP.
      num_layers: number of transformer blocks.
      num_heads: number of query heads.
      num_kv_heads: number of key and value heads; divides `num_heads`.
      head_dim: width of one attention head.
      rms_norm_eps: epsilon of every RMSNorm.
      rope: settings of the rotary position embedding.
      tie_embeddings: whether the output head is the transposed embedding.
      qkv_bias: whether the q, k and v projections have biases (Qwen2).
      o_bias: whether the output projection has a bias.
      mlp_bias: whether the three maps of the MLP have biases.
      qk_norm: whether RMSNorm is applied to each head of q and k (Qwen3).
      max_positions: longest supported sequence, in tokens.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 32_768

    def __post_init__(self):
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        )
        wrong = [f"{name}={getattr(self, name)!r}" for name in sizes if not getattr(self, name) >= 1]
        if wrong:
            raise ValueError(f"model config needs positive sizes, got {', '.join(wrong)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings")
