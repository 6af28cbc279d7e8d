"""The GSM8K recipe of `gsm8k_qwen2_5_7b` on Llama-3.1-8B-Instruct: 224 maps, n_tie = 18, 13 numbers.

    python -m experiments.grpo --config=gsm8k_llama3_1_8b --workdir=…

Estimated by XLA's TPU compiler for 8 TPU v6e chips (no TPU was used): 22.8 of 32 GB per chip, and at most 114 s per
step, 11 hours or 88 chip-hours, if every answer had 4096 tokens. The rate 1e-4 is not tuned, and the score was not
measured.
"""

from ml_collections import ConfigDict

from experiments.configs import gsm8k_qwen2_5_7b


def get_config() -> ConfigDict:
    config = gsm8k_qwen2_5_7b.get_config()
    config.model = "meta-llama/Llama-3.1-8B-Instruct"
    config.adapter.n_tie = 18
    return config
