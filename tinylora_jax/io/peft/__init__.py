"""Adapters in PEFT's format: LoRA, TinyLoRA, and offsets as LoRA with a bias or LN tuning."""

from tinylora_jax.io.peft._export import export_lora as export_lora
from tinylora_jax.io.peft._export import export_tinylora as export_tinylora
from tinylora_jax.io.peft._lora import is_lora as is_lora
from tinylora_jax.io.peft._lora import read_lora as read_lora
from tinylora_jax.io.peft._lora import save_lora as save_lora
from tinylora_jax.io.peft._offsets import export_ln_tuning as export_ln_tuning
from tinylora_jax.io.peft._offsets import export_output_offsets as export_output_offsets
from tinylora_jax.io.peft._tinylora import MODULES as MODULES
from tinylora_jax.io.peft._tinylora import PeftError as PeftError
from tinylora_jax.io.peft._tinylora import import_tinylora as import_tinylora
from tinylora_jax.io.peft._tinylora import read_tinylora as read_tinylora
