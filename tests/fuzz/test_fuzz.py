"""Whatever is damaged, and however: one clear error, the same result, or a difference that no checksum could see.

    pytest -m fuzz --minutes=60 tests/fuzz                  # another seed every time; it is printed
    pytest -m fuzz --minutes=60 --fuzz_seed=7 tests/fuzz

The normal tests run a few cases of a fixed seed. What fails is named with its seed and number, from which the same
damage is made again.
"""

from __future__ import annotations

import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from absl import logging
from graders import grade_something
from mutator import copied, damage
from subjects import SUBJECTS

# Orbax leaves coroutines behind when it fails to read; damage moves numbers to where NumPy warns of them.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning"
)

SECONDS = 2.0
FREE_BYTES, EXPANSION = 300 * 2**20, 200  # of memory, beside so many times the size of what is read
SHORT = {"adapter and model": 8, "tokenizer": 20, "template": 25, "checkpoint": 20, "GGUF": 40}  # else:
CASES = 30


class Hang(BaseException):
    """A reader took longer than anything may."""


@contextmanager
def bounded(seconds: float = 30 * SECONDS):  # of a machine that is busy with others
    """Ends what does not end by itself, if it is Python."""

    def ring(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound example of every subject, and what is read of it; made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("sound") / name.replace(" ", "-")
            folder.mkdir()
            SUBJECTS[name].make(folder)
            again = copied(folder, folder.with_name("again"))
            made[name] = folder, SUBJECTS[name].read(again)
        return made[name]

    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    yield get
    logging.set_verbosity(before)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def used() -> float:
    """Seconds of a processor that this process and those it waited for have used."""
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def one_case(name, sound, place: Path, seed: int, number: int) -> tuple[str, str | None]:
    """Damages a subject and reads it: the outcome, and what is wrong with it."""
    subject, (folder, expected), random = SUBJECTS[name], sound, Random(f"{seed}/{name}/{number}")
    copy = copied(folder, place / "case")
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.name != "lock")
    path = random.choice(files)
    how = f"{name}, seed {seed}, case {number}: {damage(random, path)} of {path.relative_to(copy)}"
    size = sum(each.stat().st_size for each in copy.rglob("*") if each.is_file() and not each.is_symlink())
    memory, started = peak(), used()
    try:
        with bounded():
            found = subject.read(copy)
        outcome = "same" if found == expected else "other"
        problem = f"{how}: another result, unseen" if subject.covered and outcome == "other" else None
    except subject.errors as error:
        outcome, problem = "error", None if str(error).strip() else f"{how}: an error without words"
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException:
        outcome, problem = "traceback", f"{how}:\n{traceback.format_exc()[-2500:]}"
    most = 3 * SECONDS if name == "template" else SECONDS  # it is tried for 2 s, and then rendered for 2 s
    if (took := used() - started) > most and problem is None:
        problem = f"{how}: took {took:.1f} s ({outcome})"
    if (grown := peak() - memory) > FREE_BYTES + EXPANSION * size:
        problem = f"{how}: took {grown >> 20} MB for {size} bytes"
    return outcome, problem


def run_cases(name, sound, place, seed, numbers, finds):
    outcomes = Counter()
    for number in numbers:
        outcome, problem = one_case(name, sound, place, seed, number)
        outcomes[outcome] += 1
        if problem is not None:
            finds.append(problem)
    return outcomes


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_few_cases(name, sound, tmp_path):
    finds: list[str] = []
    count = SHORT.get(name, CASES)
    outcomes = run_cases(name, sound(name), tmp_path, 0, range(count), finds)
    print(f"{name}: {count} cases of seed 0: {dict(outcomes)}")
    assert outcomes["error"] and not finds, "\n\n".join(finds[:5])


# Damage that once did worse than an error: (subject, seed, number).
FOUND = [("parquet", 3, 1224)]  # pyarrow ended the process


@pytest.mark.parametrize(("name", "seed", "number"), FOUND)
def test_what_was_found_is_an_error_now(name, seed, number, sound, tmp_path):
    outcome, problem = one_case(name, sound(name), tmp_path, seed, number)
    assert outcome == "error" and problem is None, problem


def test_a_few_gradings():
    finds = [problem for number in range(150) if (problem := grade_something(0, number, SECONDS))]
    assert not finds, "\n".join(finds[:5])


@pytest.mark.fuzz
def test_for_minutes(sound, tmp_path, request, capsys):
    minutes, seed = request.config.getoption("--minutes"), request.config.getoption("--fuzz_seed")
    seed = time.time_ns() % 10**9 if seed is None else seed
    end, finds, outcomes, number = time.monotonic() + 60 * minutes, [], Counter(), 0
    log = request.config.getoption("--fuzz_log")
    while time.monotonic() < end:
        for name in SUBJECTS:
            share = max(1, SHORT.get(name, CASES) // 8)  # slow readers get fewer
            numbers = range(number * share, (number + 1) * share)
            before = len(finds)
            outcomes += run_cases(name, sound(name), tmp_path, seed, numbers, finds)
            if log and finds[before:]:
                with Path(log).open("a", encoding="utf-8") as file:
                    file.write("\n\n".join(finds[before:]) + "\n\n")
        for place in range(number * 20, (number + 1) * 20):
            outcomes["graded"] += 1
            finds += filter(None, [grade_something(seed, place, SECONDS)])
        number += 1
        shutil.rmtree(tmp_path / "case", ignore_errors=True)
    with capsys.disabled():
        print(f"\n{sum(outcomes.values())} cases of seed {seed}: {dict(outcomes)}; {len(finds)} finds")
    assert not finds, "\n\n".join(finds[:20])
