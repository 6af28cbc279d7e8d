"""Starts a run: compiles programs and encodes prompts while the weights are being read.

    with launch(config, specs) as start:
        prompts = make_prompts(config, questions, start.abstract)
        task = start.finish(programs lowered for start.abstract)

Programs depend only on the file's header and the config. The factorization, which runs on the devices, waits until
everything is compiled; see `compile_together`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

from jax.stages import Lowered
from ml_collections import ConfigDict

from experiments.common.abstract import abstract_policy
from experiments.common.compilation import compile_together
from experiments.common.fitting import open_model
from experiments.common.meshes import slots_of
from experiments.common.progress import phase, tell
from experiments.common.specs import Specs
from experiments.common.task import Task, make_policy, make_task
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
      abstract: task with a `jax.ShapeDtypeStruct` for every weight and factor.
      reading: weights that are being read.
      seconds: wall time of each part of `finish`, by name, once it is done.
    """

    config: ConfigDict
    specs: Specs
    adapter: Spec
    abstract: Task
    reading: Reading
    seconds: dict[str, float] = field(default_factory=dict)

    def finish(self, programs: Iterable[Lowered] = ()) -> Task:
        """Compiles programs of the abstract task, then returns the loaded and factorized task.

        Raises:
          ValueError: a weight cannot be read or adapted.
        """
        with self._timed("compiling"), phase("compiling", leaves_line=False) as work:
            adapting = lower_adapt(self.abstract.policy.params, self.adapter, self.config.svd)
            compile_together(chain(programs, adapting), self.reading.check, work.count)
        with self._timed("reading weights"), phase("waiting for the weights", leaves_line=False):
            model = replace(self.abstract.pretrained, params=self.reading.result())
        with self._timed("factorizing"):
            policy = make_policy(model.params, self.adapter, self.config.svd)
        tell("ready: " + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds.items()))
        return make_task(self.config, self.specs, model, policy, self.abstract.slots)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - started


@contextmanager
def launch(config: ConfigDict, specs: Specs, adapter: Spec | None = None, members: int = 1) -> Iterator[Launch]:
    """Reads a model's weights inside the `with` block.

    Args:
      config: run configuration.
      specs: parsed run configuration.
      adapter: adapter settings; None for those of the config.
      members: number of members of a sweep, whose batches are decoded together.

    Raises:
      FileNotFoundError, ValueError: as in `load_pretrained`, or the adapter does not fit the model.
    """
    tell(f"loading {config.model}")
    adapter, mesh = adapter or specs.adapter, active_mesh()
    opened = open_model(config.model, config.dtype, config.quantize)
    open_model.cache_clear()  # the files may have changed since an earlier run in this process
    slots = slots_of(config, opened.abstract.config, opened.quantize, members)
    with opened.reading(mesh and partial(param_shardings, mesh)) as reading:
        policy = abstract_policy(opened.abstract.params, adapter, mesh)
        yield Launch(config, specs, adapter, make_task(config, specs, opened.abstract, policy, slots), reading)
