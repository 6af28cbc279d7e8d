"""The paper's GSM8K recipe: Qwen2.5-7B-Instruct, 13 parameters (arXiv 2602.04118, §5.1 and Fig 1).

    python -m experiments.grpo --config=gsm8k_qwen2_5_7b --workdir=…

u = 1, n_tie = 16, r = 2, tiled over 28 × 7 = 196 maps: 13 numbers, 26 bytes. 3 epochs, 4 samples a problem,
batches of 64, at most 4096 tokens, no KL. The paper does not give its GSM8K learning rate (it sweeps 1e-7 to
2e-4), prompt or grader; here: 1e-4, Adam, "####" and a strict match. It reports 75.6 % before and 90.7 % after
(figure 1). The score was not measured here.

Estimated by XLA's TPU compiler for 8 TPU v5e chips (no TPU was used): 13.6 of 16 GB per chip, and at most 158 s per
step, 15 hours or 122 chip-hours, if every answer had 4096 tokens. A GPU run needs 80 GB, or several GPUs.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.grpo.stream_tokens = 4608  # the longest prompt and answer: fits chips of 16 GB
    return config
