"""One Flax (NNX) decoder for the Qwen and Llama families."""

from tinylora_jax.models.cache import CACHE_SCHEMES as CACHE_SCHEMES
from tinylora_jax.models.cache import KVCache as KVCache
from tinylora_jax.models.cache import QuantizedEntries as QuantizedEntries
from tinylora_jax.models.config import ModelConfig as ModelConfig
from tinylora_jax.models.config import Rope as Rope
from tinylora_jax.models.decoder import forward as forward
from tinylora_jax.models.decoder import fused as fused
from tinylora_jax.models.decoder import head_kernel as head_kernel
from tinylora_jax.models.decoder import init_params as init_params
from tinylora_jax.models.decoder import logits as logits
from tinylora_jax.models.packing import Packing as Packing
from tinylora_jax.models.sharding import AXES as AXES
from tinylora_jax.models.sharding import DATA as DATA
from tinylora_jax.models.sharding import FSDP as FSDP
from tinylora_jax.models.sharding import MeshSpec as MeshSpec
from tinylora_jax.models.sharding import abstract_at as abstract_at
from tinylora_jax.models.sharding import abstract_everywhere as abstract_everywhere
from tinylora_jax.models.sharding import active_mesh as active_mesh
from tinylora_jax.models.sharding import device_bytes as device_bytes
from tinylora_jax.models.sharding import heads_axes as heads_axes
from tinylora_jax.models.sharding import param_shardings as param_shardings
from tinylora_jax.models.sharding import policy_shardings as policy_shardings
