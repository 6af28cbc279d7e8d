"""Whatever is damaged, and however: one clear error, the same result, or a difference that no checksum could see.

    pytest -m fuzz --minutes=60 tests/fuzz                  # another seed every time; it is printed
    pytest -m fuzz --minutes=60 --fuzz_seed=7 tests/fuzz

The normal tests run a few cases of a fixed seed. What fails is named with its seed and number, from which the same
damage is made again.
"""

from __future__ import annotations

import resource
import signal
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random

import pytest
from absl import logging
from graders import BY_ALGEBRA, BY_TEXT, grade_something
from mutator import copied, damage
from right_and_wrong import judged
from subjects import SUBJECTS

# Orbax leaves coroutines behind when it fails to read; damage moves numbers to where NumPy warns of them.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning"
)

SECONDS = 2.0
FREE_BYTES, EXPANSION = 300 * 2**20, 200  # of memory, beside so many times the size of what is read
SHORT = {"adapter and model": 4, "tokenizer": 10, "template": 12, "parquet": 5, "checkpoint": 10, "GGUF": 20}  # else:
CASES = 15
TURN_S = 0.5  # of a subject in a round, times its weight
WEIGHTS = {
    "template": 4,
    "parquet": 3,
    "GGUF": 2,
    "checkpoint": 2,
    "graders by algebra": 3,
    "right and wrong answers": 6,
}


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
FOUND = [
    ("parquet", 3, 1224),  # pyarrow ended the process
    ("PEFT", 10, 2675),  # weight_tying 0, an integer
]


@pytest.mark.parametrize(("name", "seed", "number"), FOUND)
def test_what_was_found_is_no_problem_now(name, seed, number, sound, tmp_path):
    outcome, problem = one_case(name, sound(name), tmp_path, seed, number)
    assert outcome != "traceback" and problem is None, problem


# Completions: a seed and a number to what is wrong with their grades.
GRADERS = {
    "graders by text": partial(grade_something, seconds=SECONDS, names=BY_TEXT),
    "graders by algebra": partial(grade_something, seconds=SECONDS, names=BY_ALGEBRA),
    "right and wrong answers": judged,
}


@pytest.mark.parametrize("name", GRADERS)
def test_a_few_gradings(name):
    finds = [problem for number in range(40) if (problem := GRADERS[name](0, number))]
    assert not finds, "\n".join(finds[:5])


def gradings(grade, seed, number, finds):
    try:
        with bounded():
            problem = grade(seed, number)
    except Hang:
        problem = f"grading, seed {seed}, case {number}: no end"
    finds += [] if problem is None else [problem]
    return Counter(["graded" if problem is None else "wrong"])


@pytest.mark.fuzz
def test_for_minutes(sound, tmp_path, request, capsys):
    """Every subject gets the same time, round by round, so that quick readers see many cases; slow ones get more."""
    minutes, seed = request.config.getoption("--minutes"), request.config.getoption("--fuzz_seed")
    seed = time.time_ns() % 10**9 if seed is None else seed
    outcomes = {name: Counter() for name in (*SUBJECTS, *GRADERS)}
    end, finds, log = time.monotonic() + 60 * minutes, [], request.config.getoption("--fuzz_log")
    while time.monotonic() < end:
        for name, counts in outcomes.items():
            place, before = tmp_path / name.replace(" ", "-"), len(finds)
            place.mkdir(exist_ok=True)
            until = time.monotonic() + TURN_S * WEIGHTS.get(name, 1)
            while time.monotonic() < until:
                number = counts.total()
                if name in GRADERS:
                    counts += gradings(GRADERS[name], seed, number, finds)
                else:
                    counts += run_cases(name, sound(name), place, seed, [number], finds)
            if log and finds[before:]:
                with Path(log).open("a", encoding="utf-8") as file:
                    file.write("\n\n".join(finds[before:]) + "\n\n")
    lines = [f"{name}: {counts.total()} cases: {dict(counts)}" for name, counts in outcomes.items()]
    total = sum(counts.total() for counts in outcomes.values())
    with capsys.disabled():
        print("", *lines, f"{total} cases of seed {seed} in {minutes:g} minutes; {len(finds)} finds", sep="\n")
    assert not finds, "\n\n".join(finds[:20])
