"""Workers: what hangs, eats memory or dies costs its own answer alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinylora_jax.rewards import MathReward, RewardError, load_reward, workers
from tinylora_jax.rewards.workers import WorkerError, Workers

TOWER = "9^{9^{9^9}}"


def pairs(*wanted):
    return [{"pairs": [list(pair)], "relative": 0.0, "absolute": 0.0} for pair in wanted]


def outcomes(replies):
    return [reply.get("failed", reply.get("equal")) for reply in replies]


@pytest.fixture
def pool():
    made = Workers(limit_s=1.0, count=2)
    yield made
    made.close()


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Another program in the place of the worker's."""

    def write(text):
        path = tmp_path / "worker.py"
        path.write_text(text)
        monkeypatch.setattr(workers, "_PROGRAM", path)

    return write


def test_what_hangs_costs_its_limit_and_the_others_nothing(pool):
    good = [(rf"\sqrt{{{2 * i * i}}}", rf"{i}\sqrt{{2}}") for i in range(2, 8)]
    assert outcomes(pool.run(pairs(good[0]))) == [[True]]  # workers have started
    asked = [good[0], (TOWER, "2"), *good[1:4], ("2", TOWER), *good[4:], ("x", "y")]
    replies = pool.run(pairs(*asked))
    assert outcomes(replies) == [[True], "time", *[[True]] * 3, "time", *[[True]] * 2, [False]]
    assert [reply["id"] for reply in replies] == list(range(len(asked)))


def test_what_hangs_takes_no_longer_than_its_limit(pool):
    pool.run(pairs(("x", "x+0")))
    started = time.monotonic()
    assert outcomes(pool.run(pairs((TOWER, "2")))) == ["time"]
    assert time.monotonic() - started < 4 * pool.limit_s + 3  # of processor time, which on a busy machine takes longer


def test_memory_is_bounded(program):
    program(
        "import sys\n"
        f"sys.path.append({str(workers._PROGRAM.parent)!r})\n"
        "import math_worker\n"
        "math_worker._equal = lambda gold, found, *_: len(bytearray(int(gold))) > 0\n"
        "math_worker._found_in = lambda *_: True\n"
        "math_worker._WARM_UP = ()\n"
        "math_worker.serve(float(sys.argv[1]), int(sys.argv[2]))\n"
    )
    pool = Workers(limit_s=5.0, memory_bytes=1 << 28, count=1)
    assert outcomes(pool.run(pairs(("1000", ""), (str(1 << 29), ""), ("1000", "")))) == [[True], "memory", [True]]
    pool.close()


def test_a_worker_that_was_killed_is_replaced(pool):
    assert outcomes(pool.run(pairs(("1", "1+0"), ("2", "1+1")))) == [[True], [True]]
    for worker in pool._workers:
        os.kill(worker.process.pid, signal.SIGKILL)
    found = outcomes(pool.run(pairs(*[("2", "1+1")] * 6)))
    assert found.count("worker") <= 2 and found.count([True]) >= 4
    assert outcomes(pool.run(pairs(*[("2", "1+1")] * 3))) == [[True]] * 3


def test_a_worker_that_falls_silent_is_replaced(pool, monkeypatch):
    pool.run(pairs(("1", "1+0"), ("1", "1+0")))
    monkeypatch.setattr(workers, "_GRACE_S", -3.5)  # of the 4 seconds of its own limit
    for worker in pool._workers:
        os.kill(worker.process.pid, signal.SIGSTOP)
    # The second may have waited, and gone to a worker that replaced one.
    first, second = outcomes(pool.run(pairs(("1", "1+0"), ("1", "1+0"))))
    assert first == "worker" and second in ("worker", [True])
    monkeypatch.undo()
    assert outcomes(pool.run(pairs(("1", "1+0")))) == [[True]]


def test_an_interrupted_run_leaves_no_answer_for_the_next(pool, monkeypatch):
    pool.run(pairs(("1", "1+0")))

    def interrupt(replies):
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "_listen", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.run(pairs(("x", "y")))
    monkeypatch.undo()
    assert not pool._workers
    assert outcomes(pool.run(pairs(("1", "1+0")))) == [[True]]


def test_workers_end_with_the_process_that_started_them():
    code = (
        "import os\nfrom tinylora_jax.rewards.workers import Workers\npool = Workers(limit_s=60, count=1)\n"
        "ask = lambda gold, found: {'pairs': [[gold, found]], 'relative': 0, 'absolute': 0}\n"
        "pool.run([ask('1', '1+0')])\nprint(pool._workers[0].process.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(found.stdout)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            break
        if state == "Z":  # it ended, and whose child it now is has not asked yet
            break
        time.sleep(0.05)
    assert time.monotonic() < deadline


def test_a_worker_loads_neither_jax_nor_this_package():
    code = (
        f"import runpy, sys\nmodule = runpy.run_path({str(workers._PROGRAM)!r})\n"
        "assert module['_equal']('x+x', '2x', 0.0, 0.0) and module['_found_in']('The answer is 7.') == '7'\n"
        "print(sorted({'jax', 'numpy', 'transformers', 'tinylora_jax'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert result.stdout.split("\n")[0] == "[]", result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise SystemExit(3)", "exited or gave no output"),
        ('print(\'{"error": "No module named x"}\')', "No module named x"),
    ],
)
def test_workers_that_cannot_start_are_one_error(program, text, said):
    program(text)
    with pytest.raises(WorkerError, match=said):
        Workers(limit_s=1.0, count=1).run(pairs(("1", "1+0")))
    with pytest.raises(RewardError, match=f"reward math cannot start its workers: .*{said}"):
        MathReward(limit_s=1.25, workers=1)(r"\boxed{x+x}", "2x")


def test_a_missing_package_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(workers.sys.modules["importlib.util"], "find_spec", lambda name: None)
    with pytest.raises(RewardError, match="reward 'math': math-verify is not installed; run: pip install"):
        load_reward("math")


def test_limits_are_checked():
    for wrong in ({"limit_s": 0.0}, {"limit_s": float("nan")}, {"memory_bytes": 1 << 20}, {"count": -1}):
        with pytest.raises(ValueError, match="workers need"):
            Workers(**wrong)


def test_cheap_comparisons_start_no_worker(monkeypatch):
    def refuse(*_):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(workers.subprocess, "Popen", refuse)
    reward = MathReward(limit_s=1.5)
    completions = [r"\boxed{72}", r"\boxed{71}", r"\boxed{\frac{1}{2}}", "#### 72", r"\boxed{2,1}", r"\boxed{52_8}", ""]
    golds = ["72", "72", "0.5", "72", "1,2", "52_8", "72"]
    assert [grade.strict for grade in reward.grade_all(completions, golds)] == [1, 0, 1, 0, 1, 1, 0]


def test_what_was_given_up_is_logged(caplog):
    grade = MathReward(limit_s=1.0, workers=1)(rf"\boxed{{{TOWER}}}", "2")
    assert (grade.strict, grade.lenient, grade.answer) == (0.0, 0.0, TOWER)
    assert "1 of 1 comparisons were aborted and count as wrong: 1 for time" in caplog.text
