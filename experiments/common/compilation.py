"""Compiles the programs of a run in parallel before it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait

from jax.stages import Lowered

_POLL_S = 0.2


def compile_together(
    programs: Iterable[Lowered],
    check: Callable[[], None] = lambda: None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Compiles programs in threads; later calls of their functions with such arguments do not compile.

    Nothing else should run on the devices meanwhile: a GPU records programs as graphs, and the compiler's autotuning
    breaks a recording. (Copies to the devices are not recorded.)

    Args:
      programs: lowered programs; compilation of each starts as soon as it is lowered.
      check: function called periodically; an exception from it ends the wait.
      report: function called with the number of compiled and of lowered programs, when one of them changes.
    """
    pool = ThreadPoolExecutor()
    try:
        waiting, total = set(), 0
        for program in programs:
            check()
            waiting.add(pool.submit(program.compile))
            total += 1
            report(sum(each.done() for each in waiting), total)
        while waiting:
            done, waiting = wait(waiting, _POLL_S, "FIRST_COMPLETED")
            for compiled in done:
                compiled.result()
            report(total - len(waiting), total)
            check()
    finally:  # a running compilation cannot be stopped, and an error should not wait for it
        pool.shutdown(wait=False, cancel_futures=True)
