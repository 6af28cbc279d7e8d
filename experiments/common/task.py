"""A model with its policy, sampling settings and reward, and the prompts for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from experiments.common.meshes import slots_of
from experiments.common.progress import phase, tell
from experiments.common.specs import ConfigError, Specs, sampling_of
from tinylora_jax.adapters import Adapted, Spec, adapt, scheme_of
from tinylora_jax.data import DataSpec, Prompt, Question, encode_prompts, get_template, load_questions
from tinylora_jax.io import Pretrained, load_pretrained
from tinylora_jax.models import ModelConfig, active_mesh, head_kernel, param_shardings, policy_shardings
from tinylora_jax.multihost import is_first, to_host
from tinylora_jax.rewards import Reward, unpayable
from tinylora_jax.rollout import Sampling

_EXAMPLES = 3  # number of examples in a message


@dataclass(frozen=True)
class Task:
    """A model with its policy, sampling settings and reward.

    Attributes:
      pretrained: model with weights and tokenizer.
      policy: policy to train.
      sampling: sampling settings of completions.
      reward: reward function that grades completions.
      slots: number of completions decoded at once; 0 for all.
      ill_conditioned: names as in `Factors.ill_conditioned`, which depend on the weights. The policy's own field is
        empty, because programs are compiled for its value.
    """

    pretrained: Pretrained
    policy: Adapted
    sampling: Sampling
    reward: Reward
    slots: int = 0
    ill_conditioned: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the base model."""
        return self.pretrained.name

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        return self.pretrained.config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model."""
        return self.pretrained.tokenizer

    def policy_to_save(self) -> Adapted:
        """The policy with the names of ill-conditioned modules, and with its factors on the host."""
        name = lambda factors: replace(to_host(factors), ill_conditioned=self.ill_conditioned)
        return self.policy.map_frozen(lambda params: params, name)


def load_task(config: ConfigDict, specs: Specs, policy_of: Callable[[Any, str], Adapted] | None = None) -> Task:
    """Loads and factorizes a model; `policy_of` replaces the config's adapter. A run uses `launch` instead."""
    tell(f"loading {config.model}")
    mesh = active_mesh()
    place = mesh and partial(param_shardings, mesh)  # a model that must be split may not fit on one device
    model = load_pretrained(config.model, jnp.dtype(config.dtype), place, quantize=config.quantize)
    slots = slots_of(config, model.config, scheme_of(model.params))
    policy = make_policy(model.params, policy_of or specs.adapter, config.svd)
    return make_task(config, specs, model, policy, slots)


def make_policy(params: Any, how: Spec | Callable[[Any, str], Adapted], svd: str) -> Adapted:
    """Builds a policy on the devices of the mesh; `how` is a spec, or a function of the weights and `svd`."""
    if callable(how):
        with phase("preparing the factors", leaves_line=False):
            policy = how(params, svd)
    elif how.needs_svd:
        with phase("factorizing its weights", leaves_line=False) as work:
            policy = adapt(params, how, svd, work.count)
    else:
        policy = adapt(params, how, svd)
    mesh = active_mesh()
    return policy if mesh is None else jax.device_put(policy, policy_shardings(mesh, policy))


def make_task(config: ConfigDict, specs: Specs, model: Pretrained, policy: Adapted, slots: int) -> Task:
    """Builds the task of a model and its policy, or of their shapes, which decodes `slots` completions at once.

    Raises:
      ValueError: the policy adapts the output head.
    """
    jax.eval_shape(lambda policy: head_kernel(model.config, policy(policy.init())), policy)
    unnamed = policy.map_frozen(lambda params: params, lambda factors: replace(factors, ill_conditioned=()))
    return Task(
        pretrained=model,
        policy=unnamed,
        sampling=sampling_of(config, model.stop_tokens),
        reward=specs.reward,
        slots=slots,
        ill_conditioned=policy.ill_conditioned,
    )


def make_prompts(config: ConfigDict, questions: Sequence[Question], task: Task) -> tuple[Prompt, ...]:
    """Renders questions as prompts that leave room for an answer.

    Raises:
      ConfigError: prompts and completions together exceed the model's context length.
    """
    total = config.max_prompt_tokens + config.max_new_tokens
    if total > task.model.max_positions:
        raise ConfigError(
            f"config.max_prompt_tokens + config.max_new_tokens = {total} exceeds the {task.model.max_positions}"
            f" positions of {task.name}; lower one of them"
        )
    template = get_template(config.template)
    return encode_prompts(questions, template, task.tokenizer, config.max_prompt_tokens, config.on_too_long)


def load_graded_questions(data: DataSpec, reward: str) -> tuple[Question, ...]:
    """Loads questions, and checks each gold answer by grading it against itself.

    Args:
      data: description of the questions.
      reward: name of the reward that grades answers.

    Returns:
      The questions; a warning reports how many of them the reward can never accept.

    Raises:
      DataError: the questions cannot be loaded, see `load_questions`.
      ConfigError: the reward can never accept most of them.
    """
    questions = load_questions(data)
    failed = [questions[place] for place in unpayable(reward, [question.answer for question in questions])]
    if not failed:
        return questions
    examples = ", ".join(f"{each.answer!r:.60} (id {each.id})" for each in failed[:_EXAMPLES])
    share = f"{len(failed)} of {len(questions)} ({len(failed) / len(questions):.1%})"
    problem = f"reward {reward!r} can never accept {share} gold answers of {data.source}, such as {examples}"
    if 2 * len(failed) > len(questions):
        advice = "choose another config.reward, such as 'math', or other questions"
        raise ConfigError(f"{problem}; {advice}")
    if is_first():
        logging.warning("%s; these questions give no training signal and count as wrong", problem)
    return questions
