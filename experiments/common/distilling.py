"""The teacher of on-policy distillation, which is loaded when it is first needed."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import optax
from ml_collections import ConfigDict

from experiments.common.abstract import base_policy
from experiments.common.fitting import open_model
from experiments.common.runs import plan_of
from experiments.common.specs import ConfigError, Specs
from experiments.common.task import Task, load_task
from tinylora_jax import rl
from tinylora_jax.adapters import TinyLoRA
from tinylora_jax.io import open_trained
from tinylora_jax.training import Plan


def distillation_learner(
    config: ConfigDict, specs: Specs, student: Task, plan: Plan, optimizer: optax.GradientTransformation, width: int
) -> rl.DistillationLearner:
    """Creates the learner of a run with `config.teacher`; the teacher's weights are read in the first step.

    Args:
      config: run configuration.
      specs: parsed run configuration.
      student: task of the run, loaded or abstract.
      plan: plan of the student's update.
      optimizer: optax transformation of v.
      width: padded prompt length, in tokens.

    Raises:
      ConfigError: the teacher has another tokenizer.
      FileNotFoundError, ValueError: the teacher or its adapter cannot be opened.
    """
    opened = open_model(config.teacher, config.dtype, config.quantize)
    found, wanted = opened.abstract.tokenizer, student.tokenizer
    if found.get_vocab() != wanted.get_vocab():
        raise ConfigError(
            f"config.teacher={config.teacher!r} has another tokenizer than {student.name}; its log-probabilities would"
            " be those of other texts. Choose a teacher of the same family"
        )

    # Opened now, so that a wrong name does not end the run only after its first rollout.
    trained = open_trained(config.teacher_adapter) if config.teacher_adapter else None

    @cache
    def teacher() -> rl.Teacher:
        given = config.copy_and_resolve_references()
        given.model, given.teacher = config.teacher, None
        blank = partial(base_policy, spec=TinyLoRA())  # its factors are zeros, and need no decomposition
        task = load_task(given, specs, trained.policy if trained else blank)
        own = dataclasses.replace(specs, grpo=dataclasses.replace(specs.grpo, remat="off"))  # it has no backward pass
        v = trained.v if trained else task.policy.init()
        return rl.Teacher(plan_of(config, own, task.model, width), task.policy, v)

    return rl.DistillationLearner(plan, optimizer, teacher)
