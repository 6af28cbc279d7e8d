"""The GSM8K recipe of `gsm8k_qwen2_5_7b` on Qwen2.5-0.5B-Instruct: 168 maps, n_tie = 13, 13 numbers.

    python -m experiments.grpo --config=experiments/configs/gsm8k_qwen2_5_0_5b.py --workdir=…

Not yet measured here.
"""

from ml_collections import ConfigDict

from experiments.configs import gsm8k_qwen2_5_7b


def get_config() -> ConfigDict:
    config = gsm8k_qwen2_5_7b.get_config()
    config.model = "Qwen/Qwen2.5-0.5B-Instruct"
    config.adapter.n_tie = 13
    return config
