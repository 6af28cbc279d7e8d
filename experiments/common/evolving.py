"""Trains by an evolution strategy: a population of points answers, and nothing is differentiated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
from grain import DatasetIterator
from ml_collections import ConfigDict

from experiments.common import runs
from experiments.common.answering import answer, lower_answer, readable_page
from experiments.common.preemption import StopRequests
from experiments.common.runs import Stepped
from experiments.common.specs import Specs
from experiments.common.task import Task
from tinylora_jax import rl
from tinylora_jax.data import Prompt
from tinylora_jax.training import TrainState


class Trainer(runs.Trainer):
    """Trains with rewards: rollout of a population of points, grading and step; see `runs.Trainer`."""

    def __init__(
        self, config: ConfigDict, specs: Specs, task: Task, prompts: Sequence[Prompt], steps: int, stop: StopRequests
    ):
        # A step is one update: for more, the learning-rate schedule would be longer than the run.
        once = dataclasses.replace(specs, grpo=dataclasses.replace(specs.grpo, updates_per_rollout=1))
        super().__init__(config, once, prompts, steps, stop)
        self.learner = rl.EvolutionLearner(specs.evolution, self.optimizer, config.seed)

    def lower(self, task: Task, state: TrainState) -> Iterator[jax.stages.Lowered]:
        """Lowers the programs of a step, to compile them in advance."""
        rows, size = self.learner.abstract_rows(state, self.config.batch_size), 2 * self.config.batch_size
        yield lower_answer(task, rows, size, self.width, task.sampling, self.config.samples)
        yield from self.learner.lower(state)

    def step(self, task: Task, state: TrainState, index: int, data: DatasetIterator) -> Stepped:
        """Runs one rollout in which each pair of points answers its share of the prompts, and a step of v.

        Raises:
          DivergenceError: the gradient or v is not finite.
        """
        prompts = next(data)
        key, rows = rl.step_key(self.config.seed, "train", index), self.learner.rows(state, len(prompts))
        twice = (*prompts, *prompts)
        graded = answer(task, rows, twice, key, task.sampling, self.config.samples, self.width)
        self.stop.check()
        state, metrics = self.learner.update(state, graded)
        return Stepped(state, metrics, readable_page(twice, graded, self.config.samples_kept), graded.num_tokens)
