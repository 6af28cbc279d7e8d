"""Reads models from GGUF files."""

from tinylora_jax.io.gguf._model import load_gguf as load_gguf
