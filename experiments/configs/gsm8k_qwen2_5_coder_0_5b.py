"""GSM8K on Qwen2.5-Coder-0.5B-Instruct, 13 parameters, short answers: a run of minutes on one GPU.

python -m experiments.grpo --config=gsm8k_qwen2_5_coder_0_5b --workdir=…
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    config.adapter.n_tie = 13  # 168 maps: 13 numbers
    config.template, config.reward = "boxed", "boxed"
    config.max_prompt_tokens, config.on_too_long = 320, "drop"
    config.epochs, config.max_steps = 1, 100
    config.max_new_tokens = 512
    config.optimizer.learning_rate = 2e-3
    config.eval_data.limit = 500
    config.eval_batch_size, config.eval_samples = 250, 1
    return config
