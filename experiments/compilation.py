"""Compiling what a run needs before it begins, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from jax.stages import Lowered


def compile_together(programs: Iterable[Lowered]) -> None:
    """Compiles programs in threads; their functions, called with such arguments, find them compiled.

    Nothing should run on the devices meanwhile: a GPU records what runs as graphs, and the compiler's own trials
    of tilings break a recording.
    """
    with ThreadPoolExecutor() as pool:
        for compiled in [pool.submit(program.compile) for program in programs]:
            compiled.result()
