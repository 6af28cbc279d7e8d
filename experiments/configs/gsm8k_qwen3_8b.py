"""The GSM8K recipe of `gsm8k_qwen2_5_7b` on Qwen3-8B: 252 maps, n_tie = 20, 13 numbers.

    python -m experiments.grpo --config=experiments/configs/gsm8k_qwen3_8b.py --workdir=…

Not yet measured here.
"""

from ml_collections import ConfigDict

from experiments.configs import gsm8k_qwen2_5_7b


def get_config() -> ConfigDict:
    config = gsm8k_qwen2_5_7b.get_config()
    config.model = "Qwen/Qwen3-8B"
    config.adapter.n_tie = 20
    return config
