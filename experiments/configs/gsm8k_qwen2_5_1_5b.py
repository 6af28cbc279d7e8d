"""The GSM8K recipe of `gsm8k_qwen2_5_7b` on Qwen2.5-1.5B-Instruct: 196 maps, n_tie = 16, 13 numbers.

    python -m experiments.grpo --config=gsm8k_qwen2_5_1_5b --workdir=…

Estimated by XLA's TPU compiler for one TPU v5e chip (no TPU was used), with --config.slots=64
--config.max_new_tokens=1024: 10.2 of 16 GB, and at most 68 s per step, 6.6 hours, if every answer had 1024 tokens.
The rate 1e-4 is not tuned, and the score was not measured; for measured rates see `gsm8k_qwen2_5_coder_1_5b`.
"""

from ml_collections import ConfigDict

from experiments.configs import gsm8k_qwen2_5_7b


def get_config() -> ConfigDict:
    config = gsm8k_qwen2_5_7b.get_config()
    config.model = "Qwen/Qwen2.5-1.5B-Instruct"
    config.adapter.n_tie = 16
    return config
