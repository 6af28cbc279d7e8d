"""The recipe of `gsm8k_qwen2_5_7b` on one TPU chip of 16 GB: weights in int8, answers of at most 1024 tokens.

    python -m experiments.grpo --config=experiments/configs/gsm8k_qwen2_5_7b_one_chip.py --workdir=…

The weights take 8.7 GB. 48 answers at once leave room for the prompts' caches. What XLA's TPU compiler says of its
programs is in experiments/aot/README.md. Not yet measured here: the run needs a TPU.
"""

from ml_collections import ConfigDict

from experiments.configs import gsm8k_qwen2_5_7b


def get_config() -> ConfigDict:
    config = gsm8k_qwen2_5_7b.get_config()
    config.quantize = "int8"
    config.max_new_tokens = 1024
    config.slots = 48
    config.grpo.stream_tokens = 1536  # the longest prompt and answer
    return config
