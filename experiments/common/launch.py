"""The start of a run: programs compile, and prompts are made, while the weights are read.

    with launch(config, specs) as start:
        prompts = make_prompts(config, questions, start.abstract)
        task = start.finish(programs lowered for start.abstract)

All that programs depend on stands in a file's header and the config. What runs on the devices, the factorization, waits
until everything is compiled: see `compile_together`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import jax
from jax.stages import Lowered
from ml_collections import ConfigDict

from experiments.common.abstract import abstract_policy
from experiments.common.cli import tell
from experiments.common.compilation import compile_together
from experiments.common.fitting import open_model
from experiments.common.meshes import slots_of
from experiments.common.setup import Specs, Task, make_policy, make_task
from tinylora_jax.adapters import Spec, lower_adapt
from tinylora_jax.io.hf import Reading
from tinylora_jax.models import active_mesh, param_shardings


@dataclass(frozen=True)
class Launch:
    """A task whose weights are being read.

    Attributes:
      config: run configuration.
      specs: parsed run configuration.
      adapter: adapter settings.
      abstract: the task, with a `jax.ShapeDtypeStruct` for every weight and factor.
      reading: the weights.
      seconds: wall time of the parts of `finish`, by name, when it is done.
    """

    config: ConfigDict
    specs: Specs
    adapter: Spec
    abstract: Task
    reading: Reading
    seconds: dict[str, float] = field(default_factory=dict)

    def finish(self, programs: Iterable[Lowered] = ()) -> Task:
        """The task, loaded and factorized, when these programs (of its abstract task) are compiled.

        Raises:
          ValueError: a weight cannot be read or adapted.
        """
        tell("compiling")
        with self._timed("lowering and compiling"):
            adapting = lower_adapt(self.abstract.policy.params, self.adapter, self.config.svd)
            compile_together(chain(programs, adapting), self.reading.check)
        with self._timed("waiting for the weights"):
            model = replace(self.abstract.pretrained, params=self.reading.result())
        with self._timed("factorizing"):
            policy = jax.block_until_ready(make_policy(model.params, self.adapter, self.config.svd))
        return make_task(self.config, self.specs, model, policy, self.abstract.slots)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - started


@contextmanager
def launch(config: ConfigDict, specs: Specs, adapter: Spec | None = None) -> Iterator[Launch]:
    """Reads a model's weights inside the `with` block; `adapter` stands in for the config's.

    Raises:
      FileNotFoundError, ValueError: as `load_pretrained`, or the adapter does not fit the model.
    """
    tell(f"loading {config.model}")
    adapter, mesh = adapter or specs.adapter, active_mesh()
    opened = open_model(config.model, config.dtype)
    open_model.cache_clear()  # another run of this process may find other files there
    slots = slots_of(config, opened.abstract.config)
    with opened.reading(mesh and partial(param_shardings, mesh)) as reading:
        policy = abstract_policy(opened.abstract.params, adapter, mesh)
        yield Launch(config, specs, adapter, make_task(config, specs, opened.abstract, policy, slots), reading)
