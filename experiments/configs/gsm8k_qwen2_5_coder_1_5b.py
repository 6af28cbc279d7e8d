"""GSM8K on Qwen2.5-Coder-1.5B-Instruct, 13 parameters, answers of at most 512 tokens, on one GPU.

python -m experiments.grpo --config=gsm8k_qwen2_5_coder_1_5b --workdir=…

Measured on one NVIDIA H100 (experiments/results/gsm8k_1_5b_methods_h100.json): 2.6 s per step of 64 × 4 completions,
18 minutes from launch to the summary, 7 minutes for one epoch. The untrained model: 47 % sampled, 61.6 % greedy.

| numbers | epochs | flags | sampled | greedy |
|---|---|---|---|---|
| 13 | 1 or 3 | --config.epochs=1 | 51 % | 62 % |
| 49 | 1 | --config.adapter.n_tie=4 | 54 % | 63 % |
| 196 | 1 | --config.adapter.n_tie=1 | 59 % | 66 % |
| 784 | 1 | --config.method=lora_xs --config.optimizer.learning_rate=3e-3 | 61 % | 66 % |
| 43,008 | 1 | --config.method=steering --config.optimizer.learning_rate=1e-3 | 69 % | 71 % |
| 1,154,048 | 1 | --config.method=lora --config.lora.rank=1 --config.optimizer.learning_rate=1e-4 | 71 % | 73 % |
| 1,154,048 | 3 | the same | 72 % | 72 % |
"""

from ml_collections import ConfigDict

from experiments.configs import gsm8k_qwen2_5_coder_0_5b


def get_config() -> ConfigDict:
    config = gsm8k_qwen2_5_coder_0_5b.get_config()
    config.model = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
    config.adapter.n_tie = 16  # 196 maps: 13 numbers
    config.epochs, config.max_steps = 3, 0
    config.optimizer.learning_rate = 1e-2
    config.eval_data.limit = 0  # all 1,319 test questions
    config.eval_batch_size, config.eval_samples = 256, 4
    return config
