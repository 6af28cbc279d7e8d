"""The GSM8K recipe of `gsm8k_qwen2_5_7b` on Llama-3.1-8B-Instruct: 224 maps, n_tie = 18, 13 numbers.

    python -m experiments.grpo --config=experiments/configs/gsm8k_llama3_1_8b.py --workdir=…

Not yet measured here.
"""

from ml_collections import ConfigDict

from experiments.configs import gsm8k_qwen2_5_7b


def get_config() -> ConfigDict:
    config = gsm8k_qwen2_5_7b.get_config()
    config.model = "meta-llama/Llama-3.1-8B-Instruct"
    config.adapter.n_tie = 18
    return config
