r"""MATH on Qwen2.5-7B-Instruct, 13 parameters, answers in \boxed{} graded by algebra.

    python -m experiments.grpo --config=math_qwen2_5_7b --workdir=…
    python -m experiments.evaluate --config=math_qwen2_5_7b --suite=math500,aime24@16 --adapter=…

Trains on levels 3 to 5 of the 12,000 problems of MATH that are not in MATH500, and evaluates on MATH500; 47 of its 500
problems share at least half of their 8-grams with one of the 12,000. Without the hub, use
`--config.train_data.source=<file> --config.train_data.question_column=question`, and the same for `eval_data`. The
prompt is SimpleRL's, as in the paper; all other settings are as in `gsm8k_qwen2_5_7b`. Not yet measured, and the hub's
copies were not tried.
"""

from ml_collections import ConfigDict

from experiments.configs import gsm8k_qwen2_5_7b


def get_config() -> ConfigDict:
    config = gsm8k_qwen2_5_7b.get_config()
    config.template, config.reward = "boxed", "math"
    config.train_data.source, config.train_data.question_column = "nlile/hendrycks-MATH-benchmark", "problem"
    config.train_data.keep = "level=3,4,5"
    config.eval_data.source, config.eval_data.question_column = "HuggingFaceH4/MATH-500", "problem"
    config.max_prompt_tokens, config.on_too_long = 1024, "drop"  # a few problems contain long Asymptote drawings
    config.max_new_tokens = 3072
    return config
