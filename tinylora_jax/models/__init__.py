"""One Flax (NNX) decoder for the Qwen and Llama families."""

from tinylora_jax.models.cache import KVCache as KVCache
from tinylora_jax.models.config import ModelConfig as ModelConfig
from tinylora_jax.models.config import Rope as Rope
from tinylora_jax.models.decoder import forward as forward
from tinylora_jax.models.decoder import fused as fused
from tinylora_jax.models.decoder import head_kernel as head_kernel
from tinylora_jax.models.decoder import init_params as init_params
from tinylora_jax.models.decoder import logits as logits
from tinylora_jax.models.packing import Packing as Packing
