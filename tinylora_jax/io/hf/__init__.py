"""Hugging Face folders: configs, weights, the hub's cache, and export of models."""

from tinylora_jax.io.hf._compressed import stored_scheme as stored_scheme
from tinylora_jax.io.hf._config import parse_config as parse_config
from tinylora_jax.io.hf._export import export_merged as export_merged
from tinylora_jax.io.hf._export import rounding_loss as rounding_loss
from tinylora_jax.io.hf._export import write_model as write_model
from tinylora_jax.io.hf._hub import NotInCacheError as NotInCacheError
from tinylora_jax.io.hf._hub_adapters import HUB as HUB
from tinylora_jax.io.hf._hub_adapters import OWN_FOLDER as OWN_FOLDER
from tinylora_jax.io.hf._hub_adapters import adapter_folder as adapter_folder
from tinylora_jax.io.hf._hub_adapters import check_push as check_push
from tinylora_jax.io.hf._hub_adapters import push_folder as push_folder
from tinylora_jax.io.hf._offsets import export_offsets as export_offsets
from tinylora_jax.io.hf._quantizing import quantize_maps as quantize_maps
from tinylora_jax.io.hf._weights import LazyTensor as LazyTensor
from tinylora_jax.io.hf._weights import Reading as Reading
from tinylora_jax.io.hf._weights import build_tree as build_tree
from tinylora_jax.io.hf._weights import param_shapes as param_shapes
