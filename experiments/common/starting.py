"""The beginning of a run in words: model, devices, what is trained, changed fields and memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.common.fitting import rollout_bytes
from experiments.common.meshes import joins_kernels, mesh_words
from experiments.common.specs import points_per_prompt
from experiments.common.task import Task
from experiments.common.wording import counted, entries, named, size
from experiments.configs import base
from tinylora_jax.adapters import Policy
from tinylora_jax.io import flat
from tinylora_jax.models import MeshSpec, active_mesh


def changed_fields(config: ConfigDict) -> dict[str, Any]:
    """The fields of a config that differ from the defaults, by name."""
    usual = flat(base.get_config().to_dict())
    return {name: value for name, value in flat(config.to_dict()).items() if usual.get(name) != value}


def idle_fields(config: ConfigDict) -> list[str]:
    """The changed fields that a GRPO run with this config never reads, such as the radius of a method not chosen."""
    natural = config.optimizer.method == "natural"
    idle = {
        r"optimizer\.(kl_radius|damping|fisher_decay)": not natural,
        r"optimizer\.b2": natural,
        r"optimizer\.learning_rate": natural and config.optimizer.kl_radius > 0,
        r"evolution\..*": config.search != "es",
        r"grpo\..*": config.search == "es",
        r"grpo\.(normalize_std|multi_objective_aggregation)": bool(config.teacher),
        r"grpo\.tis_mode": not config.grpo.tis_cap,
        r"grpo\.clip_low": config.grpo.loss_type == "cispo",
        r"lora\..*": config.method != "lora",
        r"adapter\..*": config.method not in ("tinylora", "lora_xs"),
        r"adapter\.(?!rank).*": config.method == "lora_xs",
    }
    patterns = [pattern for pattern, holds in idle.items() if holds]
    return [name for name in changed_fields(config) if any(re.fullmatch(pattern, name) for pattern in patterns)]


def trained_words(config: ConfigDict, task: Task) -> str:
    """Says what is trained, and in how many matrices."""
    how = [config.method]
    if isinstance(task.policy, Policy):
        spec, leaves = task.policy.factors.spec, task.policy.factors.leaves.values()
        count = sum(len(leaf.groups) for leaf in leaves)
        fields = {"r": spec.rank, "u": spec.u, "n_tie": spec.n_tie} if config.method == "tinylora" else {"r": spec.rank}
        how += [named(fields), f"in {count} {'matrix' if count == 1 else 'matrices'}"]
    elif config.method == "lora":
        how += [named({"r": config.lora.rank})] + (["A frozen"] if config.lora.freeze_a else [])
    return f"{counted(task.policy.num_params, 'number')}: {', '.join(how)}"


def device_words() -> str:
    """Names the devices, the mesh and the number of processes."""
    devices, mesh = jax.devices(), active_mesh()
    split = "" if mesh is None else f", mesh {mesh_words(mesh)}"
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(devices)} × {devices[0].device_kind}{processes}{split}"


def memory_words(config: ConfigDict, task: Task) -> str:
    """Predicts the memory of a device while decoding."""
    mesh = active_mesh() or MeshSpec(1, 1, 1).make(jax.devices()[:1])
    slots = task.slots or points_per_prompt(config) * config.batch_size * config.samples
    return f"about {size(rollout_bytes(task.model, config, mesh, slots, joins_kernels()))} per device while decoding"


def start_block(
    config: ConfigDict,
    task: Task,
    workdir: Path,
    questions: Mapping[str, int],
    steps: int,
    experiment: str,
    trains: str | None = None,
) -> str:
    """Formats what is about to run.

    Args:
      config: run configuration.
      task: task, loaded or abstract.
      workdir: folder of the run.
      questions: numbers of questions for `training` and `evaluation`.
      steps: number of steps.
      experiment: `grpo`, `sft` or `sweep`.
      trains: description of what is trained; None describes the task's policy.
    """
    weights = jax.tree.leaves(task.policy.params)
    batch = f"{config.batch_size} questions × {config.samples} answers"
    batch = f"{batch} at both points of a pair" if points_per_prompt(config) == 2 else batch
    batch = f"{config.batch_size} worked solutions" if experiment == "sft" else batch
    sources = {"training": config.train_data.source, "evaluation": config.eval_data.source}
    data = ", ".join(f"{questions[name]:,} of {source} for {name}" for name, source in sources.items())
    changed = {name: value for name, value in changed_fields(config).items() if name != "seed"}
    idle = idle_fields(config) if experiment == "grpo" else []
    rows = [
        ("model", f"{task.name}: {sum(leaf.size for leaf in weights) / 1e6:,.1f} M weights, {config.dtype}"),
        ("device", device_words()),
        ("trains", trains or trained_words(config, task)),
        ("steps", f"{counted(steps, 'step')} of {batch}, at most {config.max_new_tokens} tokens each"),
        ("questions", data),
        ("changed", named(changed) if changed else "nothing: every field has its default"),
        *([("unused", ", ".join(idle))] if idle else []),
        ("seed", str(config.seed)),
        ("memory", memory_words(config, task)),
        ("time", "the time left is shown after the first step"),
        ("workdir", str(workdir)),
        ("stop", "Ctrl-C: finished steps are kept, and the same command continues"),
    ]
    return entries(rows)
