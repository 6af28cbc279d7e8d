"""A run of two processes is the run of one, and ends when one of them does."""

import json
import socket
import time

import numpy as np
import pytest

from experiments import grpo
from tinylora_jax import multihost as hosts
from tinylora_jax.io.adapter._file import read_adapter

MESH = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.grpo.remat=on")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def two_processes(processes, monkeypatch):
    """Starts both processes of a run over loopback, four devices each; the second one has a workdir of its own."""
    monkeypatch.setitem(processes.env, "XLA_FLAGS", "--xla_force_host_platform_device_count=4")

    def start(name, *flags, second=()):
        where = ("--multihost", f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2")
        each = [(*flags, *where, "--process_id=0"), (*flags, *second, *where, "--process_id=1")]
        return [processes.start(name, *flags) for flags in each]

    return start


def ends(both, timeout_s=300):
    outputs = [process.communicate(timeout=timeout_s) for process in both]
    return [process.returncode for process in both], outputs


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(two_processes, processes, finished, tmp_path, traces, monkeypatch):
    absent = tmp_path / "never_written"
    both = two_processes("grpo", f"--workdir={tmp_path / 'run'}", *MESH, second=(f"--workdir={absent}",))
    codes, outputs = ends(both)
    assert codes == [0, 0], outputs
    assert json.loads(outputs[0][0].splitlines()[-1])["params"] == 8 and "params" not in outputs[1][0]
    assert not absent.exists()

    monkeypatch.setitem(processes.env, "XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    result = processes.run("grpo", f"--workdir={tmp_path / 'eight'}", *MESH)
    assert result.code == 0, result.err

    alone, eight, two = traces(finished.workdir), traces(tmp_path / "eight"), traces(tmp_path / "run")
    assert two["pages"] == eight["pages"] == alone["pages"]  # prompts, sampled completions and their grades
    assert two["summary"] == eight["summary"] == alone["summary"]  # greedy completions, graded
    vectors = [
        read_adapter(folder / "adapter")[1] for folder in (finished.workdir, tmp_path / "eight", tmp_path / "run")
    ]
    for v in vectors[1:]:
        np.testing.assert_allclose(v, vectors[0], atol=1e-5)


@pytest.mark.slow
def test_two_processes_refill_the_batches_of_one(two_processes, config, stop, tmp_path, traces):
    """Each process decides by itself when a batch is full, so all must see the same completions and grades."""
    config.update({"refill": 3, "min_draw": 0.1})
    grpo.run(config, tmp_path / "alone", stop)
    flags = ("--config.refill=3", "--config.min_draw=0.1")
    codes, outputs = ends(two_processes("grpo", f"--workdir={tmp_path / 'run'}", *flags, *MESH))
    assert codes == [0, 0], outputs
    alone, two = traces(tmp_path / "alone"), traces(tmp_path / "run")
    assert two["pages"] == alone["pages"] and two["summary"] == alone["summary"]
    for found, expected in zip(two["rows"], alone["rows"], strict=True):
        assert (found["questions"], found["reward"]) == (expected["questions"], expected["reward"])


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_other_and_the_run_continues(two_processes, finished, tmp_path, traces, victim):
    workdir = tmp_path / "run"
    flags = (f"--workdir={workdir}", *MESH)
    both = two_processes("grpo", *flags)
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline and all(p.poll() is None for p in both)
        time.sleep(0.005)
    both[victim].kill()
    codes, outputs = ends(both, timeout_s=120)
    assert codes[1 - victim] not in (0, None)
    assert "the connection to the other processes broke" in outputs[1 - victim][1]

    codes, outputs = ends(two_processes("grpo", *flags))
    assert codes == [0, 0], outputs
    assert traces(workdir)["pages"] == traces(finished.workdir)["pages"]


@pytest.mark.slow
def test_an_error_of_the_first_process_is_everyones(two_processes, tmp_path):
    (tmp_path / "file").write_text("")
    codes, outputs = ends(two_processes("grpo", f"--workdir={tmp_path / 'file' / 'run'}"))
    assert codes == [1, 1]
    assert outputs[0][1].strip().startswith("error: cannot write to workdir")
    assert "process 0 failed: WorkdirError: cannot write to workdir" in outputs[1][1]


@pytest.mark.parametrize(
    "flags, expected",
    [
        (("--coordinator=a:1",), "--coordinator without --multihost"),
        (("--multihost", "--coordinator=a:1"), "expected all of --coordinator, --num_processes and --process_id"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (
                    ("--multihost", "--coordinator=a:1", "--num_processes=2", "--process_id=2"),
                    "expected 0 to --num_processes",
                ),
                (("--multihost", "--coordinator=a", "--num_processes=2", "--process_id=1"), "a: expected HOST:PORT"),
                (("--multihost",), "or omit --multihost"),
            )
        ),
    ],
)
def test_flags_that_contradict_each_other(processes, tmp_path, flags, expected):
    result = processes.run("grpo", f"--workdir={tmp_path / 'run'}", *flags)
    assert result.code == 1 and expected in result.err


@pytest.mark.parametrize("count", [0, 1, 7, 256])
def test_shares_are_all_of_it(monkeypatch, count):
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 3)
    shares = []
    for index in range(3):
        monkeypatch.setattr(hosts.jax, "process_index", lambda index=index: index)
        shares.append(hosts.share(count))
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
