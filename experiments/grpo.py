"""Trains an adapter with GRPO.

    python -m experiments.grpo --config=demo --workdir=/tmp/tinylora-demo
    python -m experiments.grpo --config=demo --workdir=/tmp/short --config.max_steps=2 --config.eval_data.limit=16
    python -m experiments.grpo --config=gsm8k_qwen2_5_7b --workdir=/data/gsm8k --dry_run

Any field of the config can be overridden. The run is saved after every step: after Ctrl-C, SIGTERM or a crash, the same
command continues it with bit-identical results. The result is in `workdir/summary.json`. Where the output is no
terminal, it is also printed as one JSON object on the last line.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from experiments.common import opening

    opening.define_run()
    opening.begin(__doc__)

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from grain import DatasetIterator
from ml_collections import ConfigDict

from experiments.common import evolving, runs
from experiments.common.answering import (
    answer,
    answer_until_signal,
    lower_answer,
    lower_answer_until_signal,
    readable_page,
)
from experiments.common.distilling import distillation_learner
from experiments.common.opening import parse_flags
from experiments.common.preemption import StopRequests
from experiments.common.runs import Stepped, plan_of
from experiments.common.specs import Specs
from experiments.common.task import Task
from tinylora_jax import rl
from tinylora_jax.data import Prompt
from tinylora_jax.training import TrainState

FLAGS = flags.FLAGS


class Trainer(runs.Trainer):
    """Trains with rewards or a teacher: rollout, grading and update; see `runs.Trainer`."""

    def __init__(
        self, config: ConfigDict, specs: Specs, task: Task, prompts: Sequence[Prompt], steps: int, stop: StopRequests
    ):
        super().__init__(config, specs, prompts, steps, stop)
        plan = plan_of(config, specs, task.model, self.width)
        self.learner = rl.Learner(plan, self.optimizer)
        if config.teacher:
            self.learner = distillation_learner(config, specs, task, plan, self.optimizer, self.width)
        counts = config.batch_size, config.refill, len(prompts), config.samples
        self.sizes = rl.refill_sizes(*counts, self.width, task.slots) if config.refill else None

    def lower(self, task: Task, state: TrainState) -> Iterator[jax.stages.Lowered]:
        """Lowers the programs of a step, to compile them in advance."""
        if self.sizes is not None:
            yield from lower_answer_until_signal(task, state.v, self.sizes)
        else:
            yield lower_answer(task, state.v, self.config.batch_size, self.width, task.sampling, self.config.samples)
        yield from self.learner.lower(state, task.policy)

    def step(self, task: Task, state: TrainState, index: int, data: DatasetIterator) -> Stepped:
        """Runs one rollout of a batch of prompts, and the updates on it.

        The data is a `PromptQueue` if the config refills batches or remembers pass rates.

        Raises:
          DivergenceError: the loss, the gradient or v is not finite.
        """
        key = rl.step_key(self.config.seed, "train", index)
        if self.sizes is not None:
            found = answer_until_signal(task, state.v, data.ahead(), key, self.sizes, self.config.batch_size)
            graded, consumed, told, tokens = found.batch, found.consumed, found.metrics(), found.num_tokens
            data.take(len(consumed.prompts))
        else:
            graded = answer(task, state.v, next(data), key, task.sampling, self.config.samples, self.width)
            consumed, told, tokens = graded, {}, graded.num_tokens
        if self.config.min_draw < 1:
            data.observe([prompt.id for prompt in consumed.prompts], consumed.num_right(), self.config.samples)
        self.stop.check()
        state, metrics = self.learner.update(state, task.policy, graded)
        page = readable_page(graded.prompts, graded, self.config.samples_kept)
        return Stepped(state, metrics | told, page, tokens)


def make_trainer(config: ConfigDict, *arguments: Any) -> runs.Trainer:
    """Creates the trainer that `config.search` names, see `runs.Trainer`."""
    return (evolving.Trainer if config.search == "es" else Trainer)(config, *arguments)


def run(config: ConfigDict, workdir: Path, stop: StopRequests, dry_run: bool = False) -> dict[str, Any]:
    """`runs.run` by GRPO, or with `config.search=es` by an evolution strategy."""
    return runs.run(config, workdir, stop, make_trainer, "grpo", dry_run)


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    del argv
    runs.command_line(FLAGS, run)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
