"""Trains several runs as one program: members share the frozen weights and one batch of rollouts.

A member behaves like a separate run: it has its own prompts in its own order, its own sampling noise and its own
optimizer. Members may differ in anything that leaves the compiled programs unchanged: seeds, the optimizer, the
adapter's tying, u and seed, and the adapted modules, because all adapters of one rank are points of one space, and so
are all offsets (`Space`). The rollout decodes all members' prompts together, each row with its member's adapter. The
members are updated one after the other, with one compiled gradient.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments.common.answering import lower_answer
from experiments.common.cli import TrainingError
from experiments.common.runs import optimizer_of, plan_of
from experiments.common.specs import ConfigError, Specs, parse
from experiments.common.task import Task
from tinylora_jax import rl
from tinylora_jax.adapters import Space, Spec, Trained, joint_spec
from tinylora_jax.data import Prompt
from tinylora_jax.training import DivergenceError, TrainState, init_state

VARIED = ("seed", "method", "targets", "optimizer.", "adapter.")
"""Fields, or groups of fields, in which members may differ."""

Changes = dict[str, Any]
"""Fields of the config, with the values of one member."""


def parse_variation(text: str, config: ConfigDict) -> tuple[str, tuple[Any, ...]]:
    """Parses `optimizer.learning_rate=1e-3,3e-3`: a field and its values for the members.

    Raises:
      ConfigError: the text has another form, the config has no such field, or members cannot differ in it.
    """
    field, _, listed = text.partition("=")
    if not field.strip() or not listed.strip():
        raise ConfigError(f"--vary={text}: expected field=value,value,…, such as optimizer.learning_rate=1e-3,3e-3")
    field, values = field.strip(), tuple(_parsed(field.strip(), value, config) for value in listed.split(","))
    if len(set(values)) < len(values):
        raise ConfigError(f"--vary={text}: a value is repeated")
    return field, values


def parse_member(text: str, config: ConfigDict) -> Changes:
    """Parses `adapter.n_tie=13,optimizer.learning_rate=3e-3`: the changes of one member.

    Raises:
      ConfigError: the text is malformed, or names a field or value that members cannot have.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(field.strip() and value.strip() for field, _, value in pairs):
        raise ConfigError(f"--member={text}: expected field=value,field=value,…")
    fields = [field.strip() for field, _, _ in pairs]
    if len(set(fields)) < len(fields):
        raise ConfigError(f"--member={text}: a field is repeated")
    return {field: _parsed(field, value, config) for field, (_, _, value) in zip(fields, pairs, strict=True)}


def _parsed(field: str, text: str, config: ConfigDict) -> Any:
    """Converts a value to the type of its field."""
    if not field.startswith(VARIED) or field in ("adapter.rank", "adapter.projection", "optimizer.method"):
        raise ConfigError(
            f"{field}: members may differ only in seed, method, targets, optimizer.* (except method) and adapter.*"
            " (except rank and projection); run a separate sweep for each value of this field"
        )
    try:
        now = config
        for part in field.split("."):
            now = now[part]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{field}: the config has no such field; see experiments/configs/base.py") from error
    kind = str if field == "targets" else type(now)  # whose default is None
    if kind not in (int, float, str):
        raise ConfigError(f"{field}: expected a single field with a number or a string")
    try:
        return kind(text.strip())
    except ValueError as error:
        raise ConfigError(f"{field}={text.strip()}: expected a value of type {kind.__name__} ({error})") from error


def combinations(variations: Sequence[tuple[str, tuple[Any, ...]]]) -> list[Changes]:
    """The changes of every member, for all combinations of the values.

    Raises:
      ConfigError: a field is repeated.
    """
    fields = [field for field, _ in variations]
    if len(set(fields)) < len(fields):
        raise ConfigError(f"--vary: a field is repeated in {', '.join(fields)}")
    products = itertools.product(*(values for _, values in variations)) if variations else ()
    return [dict(zip(fields, values, strict=True)) for values in products]


def member_configs(config: ConfigDict, members: Sequence[Changes]) -> dict[str, ConfigDict]:
    """Builds the config of every member, by a name that states its changes.

    Raises:
      ConfigError: there is no member, two are equal, or a config is out of range (the message names the member).
    """
    found: dict[str, ConfigDict] = {}
    last = lambda field: field.split(".")[-1]
    ends = Counter(map(last, {field for changes in members for field in changes}))
    short = lambda field: last(field) if ends[last(field)] == 1 else field
    for changes in members:
        name = ",".join(f"{short(field)}={value}" for field, value in changes.items())
        name = re.sub(r"[^\w.,=+-]+", "_", name)  # also the name of a folder
        own = config.copy_and_resolve_references()
        own.update_from_flattened_dict(changes)
        if twin := next((other for other, known in found.items() if known == own), None):
            raise ConfigError(f"member {name} is repeated" if twin == name else f"members {twin} and {name} are equal")
        if name in found:
            raise ConfigError(f"two members are called {name}; write one of them differently")
        try:
            joint(config, [own])
        except ConfigError as error:
            raise ConfigError(f"member {name}: {error}") from error
        found[name] = own
    if not found:
        raise ConfigError("a sweep needs members: set --vary or --member")
    return found


class Member:
    """One run of a population.

    Args:
      name: name of the member in the sweep.
      config: configuration, as for a separate run.
      whole: policy whose space contains all members, abstract.
      learner: learner whose compiled gradient all members share.
      steps: number of steps of the run.
    """

    def __init__(self, name: str, config: ConfigDict, whole: Space, learner: rl.Learner, steps: int):
        self.name, self.config, specs = name, config, parse(config)
        self.spec, self.policy = specs.adapter, whole.within(specs.adapter)
        self._optimizer = optimizer_of(specs, steps)
        self.learner = learner.with_optimizer(self._optimizer, partial(whole.point, self.policy))

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        return init_state(self.policy.init(), self._optimizer)

    def point(self, v: Trained) -> Trained:
        """The v of the population's policy for the member's."""
        return self.learner.point(v)


class Population:
    """The members of a sweep and their joint step; like a `Trainer`, it holds no weights.

    Args:
      configs: configurations of the members, by name.
      specs: parsed configuration of any member.
      task: task whose policy's space contains all members (`joint`), abstract.
      width: padded prompt length, in tokens.
      steps: number of steps of every member.
    """

    def __init__(self, configs: Mapping[str, ConfigDict], specs: Specs, task: Task, width: int, steps: int):
        self.width, self.config = width, next(iter(configs.values()))
        learner = rl.Learner(plan_of(self.config, specs, task.model, width), optimizer_of(specs, steps))
        self.members = {}
        for name, config in configs.items():
            try:
                self.members[name] = Member(name, config, task.policy, learner, steps)
            except ValueError as error:
                raise ConfigError(f"member {name}: {error}") from error

    def initial_states(self) -> dict[str, TrainState]:
        """Every member's state before the first step."""
        return {name: member.initial_state() for name, member in self.members.items()}

    def lower(self, task: Task, states: Mapping[str, TrainState]) -> Iterator[jax.stages.Lowered]:
        """Lowers the programs of a step."""
        names = list(self.members)
        count = len(names) * self.config.batch_size
        v = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), jax.eval_shape(task.policy.init))
        key = jnp.broadcast_to(jax.random.key(0), (count,))
        yield lower_answer(task, v, count, self.width, task.sampling, self.config.samples, key)
        yield from self.members[names[0]].learner.lower(states[names[0]], task.policy)

    def step(
        self,
        task: Task,
        states: Mapping[str, TrainState],
        index: int,
        prompts: Mapping[str, Sequence[Prompt]],
        live: Collection[str],
    ) -> dict[str, tuple[TrainState, dict[str, float], rl.GradedRollout] | TrainingError]:
        """Runs one rollout of all members, and the updates of each on its own part.

        Args:
          task: loaded task.
          states: states of all members.
          index: index of the step.
          prompts: prompts of each member.
          live: members that still train. The others keep their rows, so that nothing is recompiled.

        Returns:
          The next state, metrics and graded rollout of each training member, or the error if it diverged.
        """
        names, size = list(self.members), self.config.batch_size
        rows = lambda x: jnp.repeat(jnp.stack(x), size, axis=0)
        points = [self.members[name].point(states[name].v) for name in names]
        v = jax.tree.map(lambda *each: rows(each), *points)
        keys = rows([rl.step_key(self.members[name].config.seed, "train", index) for name in names])
        together = [prompt for name in names for prompt in prompts[name]]
        sampling, samples = task.sampling, self.config.samples
        drawn = rl.rollout(task.model, task.policy, v, together, keys, sampling, samples, self.width, task.slots)
        underway, found = {}, {}
        for place, name in enumerate(names):  # the devices update one member while the next one's answers are graded
            if name in live:
                graded = rl.grade(drawn.part(place * size, size), task.reward, task.tokenizer)
                underway[name] = self.members[name].learner.begin(states[name], task.policy, graded)
        for name, each in underway.items():
            try:
                found[name] = *self.members[name].learner.finish(each), each.graded
            except DivergenceError as error:
                found[name] = TrainingError.at_step(index, error)
        return found


def joint(config: ConfigDict, members: Collection[ConfigDict]) -> Spec:
    """The spec of the space that contains all members: LoRA-XS of the sweep's rank and targets, or all their offsets.

    Raises:
      ConfigError: the members' methods cannot share one program, or they do not train by gradients of rewards.
    """
    if config.teacher:
        raise ConfigError(f"config.teacher={config.teacher!r}: a sweep trains with rewards; leave it out")
    if config.search != "gradient":
        raise ConfigError(f"config.search={config.search!r}: a sweep trains by gradients; set it to 'gradient'")
    try:
        return joint_spec(parse(config).adapter, [parse(own).adapter for own in members])
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        methods = " and ".join(repr(method) for method in dict.fromkeys(own.method for own in members))
        raise ConfigError(
            f"config.method={methods}: a sweep in one program trains 'tinylora' or 'lora_xs', or else 'steering',"
            " 'bias' or 'norm'; run a separate sweep for the others"
        ) from error
