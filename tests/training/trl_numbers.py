"""Computes losses, gradients and advantages with TRL's own code; run as a program to store them for the tests.

    pip install 'trl>=1.16' accelerate datasets
    python tests/training/trl_numbers.py

TRL's loss is a method of its trainer, and its importance weights and advantages are blocks of another method. So the
trainer is replaced by an object with the settings, and the blocks are taken from TRL's source by their condition.
"""

import ast
import inspect
import json
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np

NUMBERS = Path(__file__).with_name("trl_numbers.json")
N, G, T, MAX_TOKENS = 3, 4, 6, 16
CLIP_LOW, CLIP_HIGH, BETA, CAP = 0.2, 0.28, 0.3, 1.2
LOSSES = ("grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo")
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
WEIGHTS = (1.0, 0.1, -0.5)


def cases():
    """Settings of every case, by name."""
    for loss in LOSSES:
        for level in ("token", "sequence"):
            yield f"{loss}/{level}", {"loss": loss, "level": level, "old": True, "beta": BETA}
            yield f"{loss}/{level}/first", {"loss": loss, "level": level, "old": False, "beta": 0.0}
    for mode in MODES:
        yield f"grpo/token/{mode}", {"loss": "grpo", "level": "token", "old": True, "beta": BETA, "mode": mode}
        yield f"cispo/sequence/{mode}", {"loss": "cispo", "level": "sequence", "old": True, "beta": 0.0, "mode": mode}
    for loss in ("grpo", "dapo", "dr_grpo"):
        yield f"{loss}/truncated", {"loss": loss, "level": "token", "old": True, "beta": BETA, "truncated": True}


def arrays():
    """Inputs, float32 `[N, G, T]`, with completions of every length from 0 to T; some of the others were cut off."""
    rng = np.random.default_rng(24)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    lengths = rng.integers(1, T + 1, (N, G))
    lengths[0, 0], lengths[1, 1], lengths[2, 2] = 0, T, 1
    logprobs = -np.abs(normal(N, G, T)) - 1
    rewards = rng.integers(0, 3, (len(WEIGHTS), N, G)).astype(np.float32)
    rewards[:, 1] = 0.1  # a group without signal
    return {
        "mask": np.arange(T) < lengths[:, :, None],
        "stopped": rng.random((N, G)) < 0.6,
        "logprobs": logprobs,
        "old": logprobs + 0.3 * normal(N, G, T),
        "rollout": logprobs + 0.2 * normal(N, G, T),
        "ref": logprobs + 0.5 * normal(N, G, T),
        "advantages": normal(N, G),
        "rewards": rewards,
    }


def block(condition, holds, names):
    """Runs one `if` statement of TRL's scoring method on the given variables: that with this condition and text."""
    import math

    import torch
    from trl.trainer import grpo_trainer

    source = textwrap.dedent(inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions))
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If)]
    (node,) = (node for node in found if ast.unparse(node.test) == condition and holds in ast.unparse(node))
    names = {"torch": torch, "math": math, "nanstd": grpo_trainer.nanstd, "device": "cpu", **names}
    exec(compile(ast.Module([node], []), "trl", "exec"), names)
    return names


def loss_and_gradient(x, *, loss, level, old, beta, mode=None, truncated=False):
    """TRL's loss and its gradient by the log-probability of every token."""
    import torch
    from trl import GRPOTrainer

    rows = {name: torch.tensor(np.reshape(value, (N * G, -1))) for name, value in x.items() if name != "rewards"}
    mask = rows["mask"].int()
    if truncated:
        ids = [[7] * (T - 1) + [1 if stopped else 7] for stopped in rows["stopped"][:, 0]]
        trainer = SimpleNamespace(
            mask_truncated_completions=True, eos_token_ids=[1], _tokenizer=SimpleNamespace(pad_token_id=0)
        )
        names = {"completion_ids_list": ids, "completion_mask": mask, "tool_mask": None, "self": trainer}
        mask = block("self.mask_truncated_completions", "is_truncated", names)["completion_mask"]
    logprobs = rows["logprobs"].requires_grad_()
    inputs = {name: torch.zeros(N * G, T if "completion" in name else 1, dtype=int) for name in _IDS}
    inputs |= {"completion_mask": mask, "advantages": rows["advantages"].reshape(-1), "num_items_in_batch": mask.sum()}
    inputs |= {"ref_per_token_logps": rows["ref"]} | ({"old_per_token_logps": rows["old"]} if old else {})
    trainer = stand_in(logprobs, loss, level, beta, mode)
    if mode:
        names = {"self": trainer, "completion_mask": mask, "tool_mask": None, "old_per_token_logps": rows["old"]}
        names["sampling_per_token_logps"] = rows["rollout"]
        condition = "self.use_vllm and self.vllm_importance_sampling_correction"
        inputs["importance_sampling_ratio"] = block(condition, "nan_to_num", names)["vllm_importance_sampling_ratio"]
    value = GRPOTrainer._compute_loss(trainer, None, inputs)
    value.backward()
    return value.item(), logprobs.grad.reshape(N, G, T).tolist()


_IDS = ("prompt_ids", "prompt_mask", "completion_ids")


def stand_in(logprobs, loss, level, beta, mode):
    """An object with the settings that TRL's loss reads."""
    from collections import defaultdict

    import torch

    same = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    arguments = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        model=SimpleNamespace(training=True),
        accelerator=same,
        args=arguments,
        loss_type=loss,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=CLIP_LOW,
        epsilon_high=1 + CLIP_HIGH if loss == "cispo" else CLIP_HIGH,  # its bound is not relative to 1
        max_completion_length=MAX_TOKENS,
        use_vllm=mode is not None,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=None,
        vllm_importance_sampling_clip_max=CAP,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )


def advantages(rewards, how, scale):
    """TRL's advantages of several rewards."""
    import torch

    trainer = SimpleNamespace(multi_objective_aggregation=how, scale_rewards=scale, reward_funcs=WEIGHTS)
    trainer.reward_weights = torch.tensor(WEIGHTS)
    per_function = torch.tensor(rewards.reshape(len(WEIGHTS), -1).T.copy())
    names = {"self": trainer, "rewards_per_func": per_function, "num_generations": G}
    names["unscorable_mask"] = torch.zeros(N * G, dtype=bool)
    found = block("self.multi_objective_aggregation == 'sum_then_normalize'", "nanstd", names)
    return found["advantages"].reshape(N, G).tolist()


def compute():
    """All numbers, as stored."""
    import trl

    x = arrays()
    losses = {name: loss_and_gradient(x, **settings) for name, settings in cases()}
    kinds = (("sum_then_normalize", "group"), ("sum_then_normalize", "none"), ("normalize_then_sum", "group"))
    found = {f"{how}/{scale}": advantages(x["rewards"], how, scale) for how, scale in kinds}
    return {"trl": trl.__version__, "losses": losses, "advantages": found}


if __name__ == "__main__":
    numbers = json.loads(json.dumps(compute()), parse_float=lambda text: float(f"{float(text):.7g}"))
    NUMBERS.write_text(json.dumps(numbers) + "\n")
    print(f"wrote {NUMBERS}", file=sys.stderr)
