"""The GSM8K recipe of `gsm8k_qwen2_5_7b` on Qwen2.5-0.5B-Instruct: 168 maps, n_tie = 13, 13 numbers.

    python -m experiments.grpo --config=gsm8k_qwen2_5_0_5b --workdir=…

Estimated by XLA's TPU compiler for one TPU v5e chip (no TPU was used), with --config.slots=64: 5.5 of 16 GB, and at
most 250 s per step, 24 hours, if every answer had 4096 tokens. The rate 1e-4 is not tuned, and the score was not
measured. On a model of this size, 13 numbers did not improve GSM8K (`experiments/results/README.md`).
"""

from ml_collections import ConfigDict

from experiments.configs import gsm8k_qwen2_5_7b


def get_config() -> ConfigDict:
    config = gsm8k_qwen2_5_7b.get_config()
    config.model = "Qwen/Qwen2.5-0.5B-Instruct"
    config.adapter.n_tie = 13
    return config
