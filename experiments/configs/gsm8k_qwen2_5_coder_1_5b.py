"""GSM8K on Qwen2.5-Coder-1.5B-Instruct, 13 parameters, answers of at most 512 tokens, on one GPU.

python -m experiments.grpo --config=experiments/configs/gsm8k_qwen2_5_coder_1_5b.py --workdir=…
"""

from ml_collections import ConfigDict

from experiments.configs import gsm8k_qwen2_5_coder_0_5b


def get_config() -> ConfigDict:
    config = gsm8k_qwen2_5_coder_0_5b.get_config()
    config.model = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
    config.adapter.n_tie = 16  # 196 maps: 13 numbers
    config.epochs, config.max_steps = 3, 0
    config.optimizer.learning_rate = 1e-2
    return config
