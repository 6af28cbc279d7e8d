"""The GSM8K recipe of `gsm8k_qwen2_5_7b` on Qwen2.5-3B-Instruct: 252 maps, n_tie = 16, 16 numbers.

    python -m experiments.grpo --config=gsm8k_qwen2_5_3b --workdir=…

Hardware, hours and memory were not estimated yet: `python -m experiments.compile --config=gsm8k_qwen2_5_3b
--topology=v5e:2x4 --suggest` does it without a TPU. The rate 1e-4 is not tuned, and the score was not measured.
"""

from ml_collections import ConfigDict

from experiments.configs import gsm8k_qwen2_5_7b


def get_config() -> ConfigDict:
    config = gsm8k_qwen2_5_7b.get_config()
    config.model = "Qwen/Qwen2.5-3B-Instruct"
    config.adapter.n_tie = 16
    return config
