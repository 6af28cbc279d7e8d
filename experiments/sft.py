"""Trains an adapter with SFT: next-token loss on worked solutions, a baseline for GRPO.

    python -m experiments.sft --config=demo --workdir=/tmp/sft --config.max_steps=100
    python -m experiments.sft --config=demo --workdir=/tmp/sft-lora --config.method=lora
    python -m experiments.sft --config=gsm8k_qwen2_5_0_5b --workdir=/data/sft --dry_run

The config is the same as for GRPO, so that both train, save, resume and evaluate in the same way; samples and rewards
only affect evaluation. Solutions come from an answer column whose text ends in `#### 72`, or from the column
`config.train_data.solution_column`. Calculator annotations are removed, and the last line has the format that
`config.reward` requires.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from experiments.common import opening

    opening.define_run()
    opening.begin(__doc__)

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from grain import DatasetIterator
from ml_collections import ConfigDict

from experiments.common import runs
from experiments.common.opening import parse_flags
from experiments.common.preemption import StopRequests
from experiments.common.runs import Stepped, plan_of
from experiments.common.specs import ConfigError, Specs, check_plain_draws
from experiments.common.task import Task
from tinylora_jax.data import Prompt, encode_solutions, pad_prompts
from tinylora_jax.training import SFT_OBJECTIVE, TrainState, Update, finite_metrics, solutions_batch

FLAGS = flags.FLAGS

_MULTIPLE = 16  # solutions are padded to a multiple of this many tokens


class Trainer(runs.Trainer):
    """Trains on worked solutions; see `runs.Trainer`.

    Raises:
      ConfigError: `config.search` is not `gradient`.
      DataError: a question has no solution, or its solution is too long.
    """

    def __init__(
        self, config: ConfigDict, specs: Specs, task: Task, prompts: Sequence[Prompt], steps: int, stop: StopRequests
    ):
        check_plain_draws(config, "experiments.sft")
        if config.search != "gradient":
            raise ConfigError(f"config.search={config.search!r}: SFT has no rewards; set it to 'gradient'")
        if config.teacher:
            raise ConfigError(f"config.teacher={config.teacher!r}: SFT learns from solutions; leave it out")
        grpo = dataclasses.replace(
            specs.grpo, loss_type="dapo", kl_coef=0.0, updates_per_rollout=1, skip_without_signal=False
        )
        specs = dataclasses.replace(specs, grpo=grpo)
        super().__init__(config, specs, prompts, steps, stop)
        stop_tokens = task.sampling.stop_tokens
        ends = task.tokenizer.eos_token_id
        ends = ends if ends in stop_tokens else stop_tokens[0]
        solutions = encode_solutions(prompts, task.tokenizer, config.reward, ends, config.max_new_tokens)
        self.solutions = {prompt.id: tokens for prompt, tokens in zip(prompts, solutions, strict=True)}
        self.longest = -(-max(map(len, solutions)) // _MULTIPLE) * _MULTIPLE
        plan = dataclasses.replace(plan_of(config, specs, task.model, self.width, 1, self.longest), temperature=1.0)
        self.update = Update(plan, self.optimizer, SFT_OBJECTIVE)

    def lower(self, task: Task, state: TrainState) -> Iterator[jax.stages.Lowered]:
        """Lowers the programs of a step, to compile them in advance."""
        yield from self.update.lower(state, task.policy)

    def step(self, task: Task, state: TrainState, index: int, data: DatasetIterator) -> Stepped:
        """Runs one update on the solutions of the next batch of prompts.

        Raises:
          DivergenceError: the loss, the gradient or v is not finite.
        """
        started, prompts = time.perf_counter(), next(data)
        arrays, solutions = pad_prompts(prompts, self.width), [self.solutions[prompt.id] for prompt in prompts]
        batch = solutions_batch(arrays.tokens, arrays.lengths, solutions, self.longest)
        state, device_metrics = self.update(state, task.policy, batch)
        metrics = finite_metrics(device_metrics)
        metrics |= {"length": sum(map(len, solutions)) / len(solutions), "update_s": time.perf_counter() - started}
        page = "\n".join(
            f"=== question {prompt.id}: {prompt.question}\n--- learned\n{task.tokenizer.decode(tokens)}\n"
            for prompt, tokens in list(zip(prompts, solutions, strict=True))[: self.config.samples_kept]
        )
        return Stepped(dataclasses.replace(state, step=state.step + 1), metrics, page)


def run(config: ConfigDict, workdir: Path, stop: StopRequests, dry_run: bool = False) -> dict[str, Any]:
    """`runs.run` by SFT."""
    return runs.run(config, workdir, stop, Trainer, "sft", dry_run)


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    del argv
    runs.command_line(FLAGS, run)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
