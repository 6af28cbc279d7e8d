"""The recipe of `gsm8k_qwen2_5_7b` on one TPU chip of 16 GB, with weights and KV cache in int8.

    python -m experiments.grpo --config=experiments/configs/gsm8k_qwen2_5_7b_one_chip.py --workdir=…

The weights take 8.7 GB. All 64 answers of a step decode at once, and every step has 16 instead of 64 questions, because
each prompt has a cache too. With a 16-bit cache (--config.quantize_cache=none) the rollout takes 15.6 instead of 12.9
GB. experiments/aot/README.md has the estimates of XLA's TPU compiler. Not yet measured here: the run needs a TPU.
"""

from ml_collections import ConfigDict

from experiments.configs import gsm8k_qwen2_5_7b


def get_config() -> ConfigDict:
    config = gsm8k_qwen2_5_7b.get_config()
    config.quantize = config.quantize_cache = "int8"
    config.max_new_tokens = 1024
    config.batch_size = 16
    config.slots = 64
    config.grpo.stream_tokens = 1536  # the longest prompt and answer
    return config
