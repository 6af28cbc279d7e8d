"""Killed with signal 9 again and again, at any moment of its life, a run ends with the same bits.

    pytest -s -m slow --kills=100 tests/experiments/test_many_kills.py            # a seed of its own; it is printed
    pytest -s -m slow --kills=100 --kill_seed=7 tests/experiments/test_many_kills.py

One test runs the demo's real model, the other two processes. A process that comes to its end before its moment has
finished the run, which is compared with one that nothing disturbed; then the next run begins.
"""

import random
import signal
import socket
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# At the demo's temperature the samples of a prompt are alike after a few tokens, and nothing would be learned.
DEMO = (
    f"--config={ROOT / 'experiments' / 'configs' / 'demo.py'}",
    *("--config.max_steps=4", "--config.batch_size=2", "--config.samples=2", "--config.max_new_tokens=6"),
    *("--config.temperature=4.0", "--config.reward=tiny_rewards:even"),
    *("--config.eval_data.limit=4", "--config.eval_batch_size=4", "--config.grpo.stream_tokens=128"),
)
FIRST = "metrics.jsonl"  # is written anew when training begins or goes on
MESH = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.grpo.remat=on")
pytestmark = pytest.mark.slow


@pytest.fixture
def kills(request):
    """How many kills, and the seed of their moments."""
    seed = request.config.getoption("--kill_seed")
    return request.config.getoption("--kills"), random.randrange(2**32) if seed is None else seed


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def outlive(launch, tmp_path, traces, kills, victims):
    """Kills the processes of `launch(workdir)` at random moments; every run that ends must be the undisturbed one."""
    count, seed = kills
    rng, done, finished = random.Random(seed), 0, 0
    print(f"\n{count} kills, seed {seed}")
    for name in ("compiling", "undisturbed"):  # the second one lives as long as those that are killed would
        started = time.monotonic()
        assert end(launch(tmp_path / name)) == [0] * victims
    whole_life = time.monotonic() - started
    expected = traces(tmp_path / "undisturbed")
    assert traces(tmp_path / "compiling") == expected
    assert len({tuple(row["v"]) for row in expected["rows"]}) > 1, "v must move, or its bits say nothing"
    while done < count:
        workdir = tmp_path / f"run_{finished}"
        processes = launch(workdir)
        if rng.random() < 0.5:  # half of all lives end in training and saving, however long this machine loads now
            wait(processes, 300, until=newer_than(workdir / FIRST, time.time()))
            wait(processes, rng.uniform(0, whole_life / 4))
        else:
            wait(processes, rng.uniform(0, 0.7 * whole_life))
        chosen = [process for process in rng.sample(processes, rng.randint(1, victims)) if process.poll() is None]
        for process in chosen:
            process.kill()
        codes = end(processes)
        hit = codes.count(-signal.SIGKILL)
        done += hit
        print(f"{done} killed, {finished} runs finished", flush=True)
        if not hit:
            assert codes == [0] * victims, codes
            assert traces(workdir) == expected, f"run {finished} of seed {seed}"
            finished += 1
    assert end(launch(workdir)) == [0] * victims
    assert traces(workdir) == expected, f"the last run of seed {seed}"
    print(f"{done} processes killed, {finished + 1} runs finished: 0 bits differ")


def newer_than(path, moment):
    """Whether a file was written after a moment: a function to ask again and again."""
    return lambda: path.exists() and path.stat().st_mtime > moment


def wait(processes, seconds, until=lambda: False):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes) and not until():
        time.sleep(0.01)


def end(processes):
    """The exit codes, and the last that was said by processes that failed by themselves."""
    said = [process.communicate(timeout=300)[1] for process in processes]
    codes = [process.returncode for process in processes]
    for text, code in zip(said, codes, strict=True):
        if code not in (0, -signal.SIGKILL):
            print(text[-1500:])
    return codes


def test_the_demo_s_model(processes, tmp_path, traces, kills):
    launch = lambda workdir: [processes.start("grpo", *DEMO, f"--workdir={workdir}", config=False)]
    outlive(launch, tmp_path, traces, kills, victims=1)


def test_two_processes(processes, tmp_path, traces, kills, monkeypatch):
    monkeypatch.setitem(processes.env, "XLA_FLAGS", "--xla_force_host_platform_device_count=4")

    def launch(workdir):
        # One whose companion was killed before they met ends after a minute, not after the default's five.
        where = (f"--coordinator=127.0.0.1:{free_port()}", "--multihost", "--num_processes=2", "--connect_timeout=60")
        flags = (f"--workdir={workdir}", *MESH, *where)
        return [processes.start("grpo", *flags, f"--process_id={index}") for index in range(2)]

    outlive(launch, tmp_path, traces, kills, victims=2)
