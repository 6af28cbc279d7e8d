"""Adapters in PEFT's format: LoRA and TinyLoRA."""

from tinylora_jax.io.peft._export import export_lora as export_lora
from tinylora_jax.io.peft._export import export_tinylora as export_tinylora
from tinylora_jax.io.peft._lora import is_lora as is_lora
from tinylora_jax.io.peft._lora import read_lora as read_lora
from tinylora_jax.io.peft._lora import save_lora as save_lora
from tinylora_jax.io.peft._tinylora import MODULES as MODULES
from tinylora_jax.io.peft._tinylora import PeftError as PeftError
from tinylora_jax.io.peft._tinylora import import_tinylora as import_tinylora
from tinylora_jax.io.peft._tinylora import read_tinylora as read_tinylora
