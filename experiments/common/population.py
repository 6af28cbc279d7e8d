"""Several runs as one program: members share the frozen weights and one batch of rollouts.

A member is what its config would be alone: its own prompts in its own order, its own sampling noise, its own
optimizer. Members may differ by whatever leaves the compiled programs as they are: seeds, the optimizer, and the
adapter's tying, u and seed, for all adapters of one rank are points of one space (`coordinates`). The rollout decodes
all members' prompts together, each row with its member's adapter; the updates are those of the members alone, one after
the other, by one compiled gradient.
"""

from __future__ import annotations

import itertools
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
from experiments.common.setup import ConfigError, Specs, Task, parse
from tinylora_jax import rl
from tinylora_jax.adapters import Factors, TinyLoRA, Trained, coordinates, init, lora_xs, retie
from tinylora_jax.data import Prompt
from tinylora_jax.training import DivergenceError, TrainState, init_state

VARIED = ("seed", "method", "optimizer.", "adapter.")
"""What members may differ by: fields, or groups of them."""

Changes = dict[str, Any]
"""Fields of the config with the values of one member."""


def parse_variation(text: str, config: ConfigDict) -> tuple[str, tuple[Any, ...]]:
    """Reads `optimizer.learning_rate=1e-3,3e-3`: a field and the values that members take.

    Raises:
      ConfigError: it is not of this form, the config has no such field, or members cannot differ by it.
    """
    field, _, listed = text.partition("=")
    if not field.strip() or not listed.strip():
        raise ConfigError(f"--vary={text}: expected field=value,value,…, such as optimizer.learning_rate=1e-3,3e-3")
    field, values = field.strip(), tuple(_parsed(field.strip(), value, config) for value in listed.split(","))
    if len(set(values)) < len(values):
        raise ConfigError(f"--vary={text}: a value stands there twice")
    return field, values


def parse_member(text: str, config: ConfigDict) -> Changes:
    """Reads `adapter.n_tie=13,optimizer.learning_rate=3e-3`: what one member changes.

    Raises:
      ConfigError: as `parse_variation`.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(field.strip() and value.strip() for field, _, value in pairs):
        raise ConfigError(f"--member={text}: expected field=value,field=value,…")
    fields = [field.strip() for field, _, _ in pairs]
    if len(set(fields)) < len(fields):
        raise ConfigError(f"--member={text}: a field stands there twice")
    return {field: _parsed(field, value, config) for field, (_, _, value) in zip(fields, pairs, strict=True)}


def _parsed(field: str, text: str, config: ConfigDict) -> Any:
    """A value of a field as the type that the field holds."""
    if not field.startswith(VARIED) or field in ("adapter.rank", "adapter.projection"):
        raise ConfigError(
            f"{field}: members of one program may differ by seed, method, optimizer.* and adapter.* but its rank and"
            " projection; run another sweep for each value of this one"
        )
    try:
        now = config
        for part in field.split("."):
            now = now[part]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{field}: the config has no such field; see experiments/configs/base.py") from error
    kind = type(now)
    if kind not in (int, float, str):
        raise ConfigError(f"{field}: expected a single field that holds a number or a text")
    try:
        return kind(text.strip())
    except ValueError as error:
        raise ConfigError(f"{field}={text.strip()}: expected a value of type {kind.__name__} ({error})") from error


def combinations(variations: Sequence[tuple[str, tuple[Any, ...]]]) -> list[Changes]:
    """What every member changes, for all combinations of the values.

    Raises:
      ConfigError: a field varies twice.
    """
    fields = [field for field, _ in variations]
    if len(set(fields)) < len(fields):
        raise ConfigError(f"--vary: a field stands there twice in {', '.join(fields)}")
    products = itertools.product(*(values for _, values in variations)) if variations else ()
    return [dict(zip(fields, values, strict=True)) for values in products]


def member_configs(config: ConfigDict, members: Sequence[Changes]) -> dict[str, ConfigDict]:
    """The config of every member, by a name that says what it changes.

    Raises:
      ConfigError: there is no member, two are alike, or a config is out of range (the member is named).
    """
    found: dict[str, ConfigDict] = {}
    last = lambda field: field.split(".")[-1]
    ends = Counter(map(last, {field for changes in members for field in changes}))
    short = lambda field: last(field) if ends[last(field)] == 1 else field
    for changes in members:
        name = ",".join(f"{short(field)}={value}" for field, value in changes.items())
        own = config.copy_and_resolve_references()
        own.update_from_flattened_dict(changes)
        if twin := next((other for other, known in found.items() if known == own), None):
            raise ConfigError(
                f"member {name} is there twice" if twin == name else f"members {twin} and {name} are alike"
            )
        try:
            free_spec(own, parse(own))
        except ConfigError as error:
            raise ConfigError(f"member {name}: {error}") from error
        found[name] = own
    if not found:
        raise ConfigError("a sweep needs members: give --vary or --member")
    return found


class Member:
    """One run of a population.

    Args:
      name: name in the sweep.
      config: configuration, as if the run were alone.
      factors: factors of the member's own spec.
      free: factors of LoRA-XS, in whose space all members lie.
      learner: learner whose compiled gradient all members share.
      steps: steps of the run.
    """

    def __init__(self, name: str, config: ConfigDict, factors: Factors, free: Factors, learner: rl.Learner, steps: int):
        self.name, self.config, self.factors = name, config, _ties_of(factors)
        self._optimizer = optimizer_of(parse(config), steps)
        self.learner = learner.with_optimizer(self._optimizer, partial(coordinates, _ties_of(free), self.factors))

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        return init_state(init(self.factors), self._optimizer)

    def point(self, v: Trained) -> jax.Array:
        """The coordinates of v."""
        return self.learner.point(v)


def _ties_of(factors: Factors) -> Factors:
    """The factors without singular vectors: all that coordinates need, and small enough for a program to hold."""
    none = jnp.zeros((0,))
    leaves = {
        path: type(leaf)(none, none, none, leaf.P, leaf.groups, leaf.target) for path, leaf in factors.leaves.items()
    }
    return Factors(leaves, factors.spec)


class Population:
    """The members of a sweep, and the step they make together; it holds no weights, as a `Trainer` holds none.

    Args:
      configs: configurations of the members, by name.
      specs: parsed configuration of any member.
      task: task adapted by LoRA-XS of the members' rank (`free_spec`), loaded or abstract.
      width: padded length of the prompts.
      steps: steps of every member's run.
    """

    def __init__(self, configs: Mapping[str, ConfigDict], specs: Specs, task: Task, width: int, steps: int):
        self.width, self.config = width, next(iter(configs.values()))
        learner = rl.Learner(plan_of(self.config, specs, task.model, width), optimizer_of(specs, steps))
        # Of abstract factors nothing but the ties is there; these are made anew.
        tied = partial(retie, task.policy.params, task.policy.factors)
        free = tied(task.policy.factors.spec)
        self.members = {
            name: Member(name, config, tied(parse(config).adapter), free, learner, steps)
            for name, config in configs.items()
        }

    def initial_states(self) -> dict[str, TrainState]:
        """Every member's state before the first step."""
        return {name: member.initial_state() for name, member in self.members.items()}

    def lower(self, task: Task, states: Mapping[str, TrainState]) -> Iterator[jax.stages.Lowered]:
        """The programs of a step."""
        names = list(self.members)
        count = len(names) * self.config.batch_size
        v = jnp.zeros((count, *init(task.policy.factors).shape), jnp.float32)
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
        """One rollout of all members, and the updates of each on its own part.

        Args:
          task: loaded task.
          states: states of all members.
          index: index of the step.
          prompts: prompts of each member.
          live: members that learn. The others keep their rows, so that nothing is compiled anew.

        Returns:
          For each that learns its next state, metrics and graded rollout; or the error of one that diverged.
        """
        names, size = list(self.members), self.config.batch_size
        rows = lambda x: jnp.repeat(jnp.stack(x), size, axis=0)
        v = rows([self.members[name].point(states[name].v) for name in names])
        keys = rows([rl.step_key(self.members[name].config.seed, "train", index) for name in names])
        together = [prompt for name in names for prompt in prompts[name]]
        sampling, samples = task.sampling, self.config.samples
        drawn = rl.rollout(task.model, task.policy, v, together, keys, sampling, samples, self.width, task.slots)
        underway, found = {}, {}
        for place, name in enumerate(names):  # the devices learn from one member's answers while the next are graded
            if name in live:
                graded = rl.grade(drawn.part(place * size, size), task.reward, task.tokenizer)
                underway[name] = self.members[name].learner.begin(states[name], task.policy, graded)
        for name, each in underway.items():
            try:
                found[name] = *self.members[name].learner.finish(each), each.graded
            except DivergenceError as error:
                found[name] = TrainingError.at_step(index, error)
        return found


def free_spec(config: ConfigDict, specs: Specs) -> TinyLoRA:
    """LoRA-XS of a config's rank and targets, in whose space all members lie.

    Raises:
      ConfigError: the config trains something else than TinyLoRA or LoRA-XS.
    """
    if config.method not in ("tinylora", "lora_xs"):
        raise ConfigError(f"config.method={config.method!r}: a sweep in one program trains 'tinylora' or 'lora_xs'")
    return lora_xs(specs.adapter.rank, specs.adapter.targets)
