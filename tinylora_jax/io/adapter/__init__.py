"""This project's adapter files: a vector of 26 bytes (ADAPTER_FORMAT.md), and sets of offsets."""

from tinylora_jax.io.adapter._description import FORMAT_VERSION as FORMAT_VERSION
from tinylora_jax.io.adapter._description import AdapterError as AdapterError
from tinylora_jax.io.adapter._file import AdapterReader as AdapterReader
from tinylora_jax.io.adapter._file import check_fit as check_fit
from tinylora_jax.io.adapter._file import load_adapter as load_adapter
from tinylora_jax.io.adapter._file import read_adapter as read_adapter
from tinylora_jax.io.adapter._file import save_adapter as save_adapter
from tinylora_jax.io.adapter._fingerprint import base_fingerprint as base_fingerprint
from tinylora_jax.io.adapter._offsets import SavedOffsets as SavedOffsets
from tinylora_jax.io.adapter._offsets import save_offsets as save_offsets
