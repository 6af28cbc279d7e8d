"""Compiling what a run needs before it begins, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait

from jax.stages import Lowered

_POLL_S = 0.2


def compile_together(programs: Iterable[Lowered], check: Callable[[], None] = lambda: None) -> None:
    """Compiles programs in threads; their functions, called with such arguments, find them compiled.

    Nothing should run on the devices meanwhile: a GPU records what runs as graphs, and the compiler's own trials
    of tilings break a recording. (Copies to the devices are not recorded.)

    Args:
      programs: to compile; each begins as soon as it is lowered.
      check: called now and then; what it raises ends the wait.
    """
    pool = ThreadPoolExecutor()
    try:
        waiting = set()
        for program in programs:
            check()
            waiting.add(pool.submit(program.compile))
        while waiting:
            done, waiting = wait(waiting, _POLL_S, "FIRST_COMPLETED")
            for compiled in done:
                compiled.result()
            check()
    finally:  # one that compiles cannot be stopped, and an error should not wait for it
        pool.shutdown(wait=False, cancel_futures=True)
