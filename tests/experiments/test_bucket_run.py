"""A run whose workdir is in a store: the same bits as in a folder, whatever machine continues it."""

import json
import random
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
from emulated_stores import emulated_s3
from fake_store import FakeFilesystem

from experiments import evaluate, grpo, plot, sweep
from experiments.common import progress, runs
from tinylora_jax import stores

URL = "s3://bucket/run"
STEPS = 120
LONGER = (f"--config.max_steps={STEPS}", "--config.epochs=30", "--config.samples=8", "--config.max_new_tokens=48")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Takes another machine, whose disk is empty."""
    count = iter(range(100))

    def take():
        home = tmp_path / f"machine_{next(count)}"
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        return home

    monkeypatch.setattr(progress, "_names", {})
    take()
    return take


@pytest.fixture
def fake(monkeypatch, machine):
    filesystem = FakeFilesystem()
    monkeypatch.setattr(stores, "_filesystem", lambda scheme: filesystem)
    monkeypatch.setattr("tinylora_jax.io._mirror._POLL_S", 0.01)
    return filesystem


def downloaded(url, folder):
    """Everything below a URL, in a folder."""
    store = stores.Store(url)
    store.get_all(store.objects(), folder)
    return folder


def interrupt(monkeypatch, command_line, config, checks, command=grpo):
    with monkeypatch.context() as patched:
        make = runs.StopRequests
        patched.setattr(runs, "StopRequests", lambda: make(checks))
        return command_line(config, URL, command)


def test_a_run_continues_on_another_machine_to_the_same_bits(
    fake, machine, config, command_line, finished, traces, tmp_path, monkeypatch
):
    stopped = interrupt(monkeypatch, command_line, config, 6)
    assert stopped.code == 0 and f"continues the run in {URL}\n" in stopped.out
    assert "checkpoints/2.zip" in fake.names() and "owner.json" not in fake.names()
    home = machine()
    result = command_line(config, URL)
    assert result.code == 0, result.err
    assert "continuing after step 2 of 5\n" in result.err
    assert traces(downloaded(URL, tmp_path / "copy")) == traces(finished.workdir)
    assert {"run.png", "config.json", "checkpoints/5.zip"} <= fake.names() and "owner.json" not in fake.names()
    assert json.loads(result.out) == json.loads(fake.text("summary.json"))
    assert str(home) not in result.err + result.out and f"{URL}/adapter" in result.err
    changed, machine_3 = len(fake.log), machine()
    again = command_line(config, URL)
    assert again.code == 0 and f"{URL} is complete" in again.err and str(machine_3) not in again.err
    wrote = [name for kind, name in fake.log[changed:] if kind in ("put_file", "pipe_file")]
    assert all("write_test" in name for name in wrote), wrote


@pytest.fixture
def stored(fake, finished):
    """A finished run in the store."""
    for path in finished.workdir.rglob("*"):
        name = path.relative_to(finished.workdir).as_posix()
        if path.is_file() and not name.startswith("checkpoints/") and name != "lock":
            stores.Store(URL).put(path, name)


def test_another_config_is_refused_and_stops_nobody(fake, stored, config, command_line):
    before = fake.names()
    config.seed = 7
    result = command_line(config, URL)
    assert result.code == 1 and result.err.startswith(f"error: workdir {URL} belongs to a run with another config:\n")
    assert fake.names() == before


def test_a_dry_run_writes_nothing(fake, config, command_line, monkeypatch, one_host):
    monkeypatch.setattr(runs, "StopRequests", lambda: SimpleNamespace(check=lambda: None))
    values = SimpleNamespace(config=config, workdir=URL, **{**one_host, "dry_run": True})
    monkeypatch.setattr(grpo, "FLAGS", values)
    grpo.main([])
    assert not fake.names() and not any(kind in ("put_file", "pipe_file") for kind, _ in fake.log)


def test_a_store_that_cannot_be_used_is_said_before_the_model_is_loaded(fake, config, command_line):
    def before(name, path):
        raise PermissionError("AccessDenied")

    fake.before = before
    result = command_line(config, URL)
    assert result.code == 1 and "loading" not in result.err and "Traceback" not in result.err
    assert result.err.startswith(f"error: {URL}: this account may not do that (AccessDenied); ask for the rights")


@pytest.mark.slow
def test_a_store_that_is_lost_does_not_stop_the_run_and_is_said(fake, config, command_line, machine, monkeypatch):
    monkeypatch.setattr("experiments.common.places._PATIENCE_S", 0.05)
    monkeypatch.setattr("tinylora_jax.io._mirror._LONGEST_WAIT_S", 0.02)

    def before(name, path):
        if "checkpoints/1.zip" in fake.names():
            raise OSError("no route to host")

    fake.before = before
    result = command_line(config, URL)
    assert result.code == 1 and result.err.count("cannot upload") == 1
    assert f"error: not everything could be uploaded to {URL}; the rest is in" in result.err
    where = stores.run_folder(URL)
    assert json.loads((where / "summary.json").read_text())["steps"] == 5
    fake.before = lambda name, path: None
    again = command_line(config, URL)  # on the same machine: nothing is computed again
    assert again.code == 0 and "is complete" in again.err and "summary.json" in fake.names()


def test_what_lies_in_a_store_is_read_by_its_url(fake, stored, config, monkeypatch, one_host, capsys):
    values = {"adapter": f"{URL}/adapter", "output": None, "correct": None, "suite": None, "suite_folder": None}
    monkeypatch.setattr(
        evaluate, "FLAGS", SimpleNamespace(config=config, transfer=False, **{**one_host, **values, "json": True})
    )
    evaluate.main([])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    after = json.loads(fake.text("summary.json"))["eval_after"]
    assert result["adapter"] == f"{URL}/adapter" and result["strict"] == after["strict"]
    monkeypatch.setattr(plot, "FLAGS", SimpleNamespace(workdir=[URL], redraw=None, output=None))
    plot.main([])
    assert capsys.readouterr().out.strip().endswith("run.png")
    with pytest.raises(SystemExit):
        evaluate.FLAGS.adapter = f"{URL}/none"
        evaluate.main([])
    assert capsys.readouterr().err.startswith(f"error: --adapter: {URL}/none: there is no such folder")


@pytest.mark.slow
def test_a_sweep_in_a_store(fake, machine, config, make_config, command_line, monkeypatch, one_host, tmp_path):
    monkeypatch.setattr(sweep, "find_devices", lambda: None)

    def run(workdir, checks=10**6):
        make = runs.StopRequests
        with monkeypatch.context() as patched:
            patched.setattr(runs, "StopRequests", lambda: make(checks))
            values = {"vary": ["optimizer.learning_rate=0.01,0.05"], "member": [], "workdir": str(workdir)}
            patched.setattr(sweep, "FLAGS", SimpleNamespace(config=make_config(), **{**one_host, **values}))
            try:
                sweep.main([])
            except SystemExit as end:
                assert end.code == 0

    run(tmp_path / "local")
    run(URL, checks=5)
    assert "checkpoints/5.zip" not in fake.names() and "summary.json" not in fake.names()
    machine()
    run(URL)
    copy = downloaded(URL, tmp_path / "copy")
    members = sorted(path.name for path in (tmp_path / "local" / "members").iterdir())
    assert len(members) == 2
    for name in members:
        there = [folder / "members" / name / "adapter" / "vector.bin" for folder in (tmp_path / "local", copy)]
        assert there[0].read_bytes() == there[1].read_bytes()


@pytest.fixture
def s3(processes, monkeypatch, tmp_path):
    """An emulated S3 for this process and for those that it starts: the URL of an empty bucket."""
    with emulated_s3() as (environment, url):
        environment["XDG_CACHE_HOME"] = str(tmp_path / "disk")
        environment["MPLCONFIGDIR"] = str(tmp_path / "matplotlib")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
            monkeypatch.setitem(processes.env, name, value)
        paths = [processes.env["PYTHONPATH"], *filter(None, [stores.os.environ.get("PYTHONPATH")])]
        monkeypatch.setitem(processes.env, "PYTHONPATH", stores.os.pathsep.join(paths))
        yield url


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the emulator and its client
def test_kill_9_with_the_disk_wiped_in_between(s3, processes, tmp_path, traces, request):
    """The machine is lost again and again, in every phase of a run; nothing but the bucket is left of it.

    A fifth of the processes die while they start. The others die soon after a random number of further steps, small
    enough that several of them share one run. Of a run whose last step is stored, one more process may die, while it
    evaluates and writes the results.
    """
    seed = request.config.getoption("--kill_seed")
    seed = random.randrange(2**32) if seed is None else seed
    rng, kills, lives, phases = random.Random(seed), request.config.getoption("--kills"), 0, []
    assert processes.run("grpo", *LONGER, f"--workdir={tmp_path / 'local'}").code == 0
    expected = traces(tmp_path / "local")
    assert len({tuple(row["v"]) for row in expected["rows"]}) > 100, "v must move, or its bits say nothing"
    while len(phases) < kills:
        url, done, lives = f"{s3}/run_{lives}", False, lives + 1
        while not done and len(phases) < kills:
            shutil.rmtree(tmp_path / "disk", ignore_errors=True)
            step = newest(url)
            process = processes.start("grpo", *LONGER, f"--workdir={url}")
            where = kill_somewhere(process, url, step, rng)
            _, err = process.communicate(timeout=120)
            killed = process.returncode == -9
            assert killed or process.returncode == 0, err
            done = not killed or step == STEPS
            phases += [where] if killed else []
            print(f"seed {seed}, kill {len(phases)} of {kills}: {where if killed else 'it had ended'}", flush=True)
        shutil.rmtree(tmp_path / "disk", ignore_errors=True)
        last = processes.run("grpo", *LONGER, f"--workdir={url}")
        assert last.code == 0, last.err
        assert traces(downloaded(url, tmp_path / f"copy_{lives}")) == expected
    print(f"{len(phases)} kills, {lives} runs finished: 0 bits differ")


def kill_somewhere(process, url, step, rng):
    """Kills a process that continues from a step; returns in words where it was."""
    if step == STEPS or rng.random() < 0.2:
        end = time.monotonic() + rng.uniform(0, 15)
        wait(lambda: time.monotonic() > end, process)
    else:
        target = min(step + rng.randint(1, STEPS // 5), STEPS)
        wait(lambda: newest(url) >= target, process)
        time.sleep(rng.uniform(0, 0.5))
    process.kill()
    names, reached = stores.Store(url).objects().keys(), newest(url)
    if reached == STEPS:
        results = [name for name in ("adapter/vector.bin", "summary.json", "run.png") if name in names]
        return f"after the last step, with {', '.join(results) or 'no results'}"
    return f"after step {reached} of {STEPS}" if reached > step else f"while it started, at step {step}"


def newest(url):
    names = stores.Store(f"{url}/checkpoints").objects()
    return max((int(name[:-4]) for name in names), default=0)


def wait(ready, process):
    deadline = time.monotonic() + 240
    while not ready() and process.poll() is None:
        assert time.monotonic() < deadline, "nothing came of it in four minutes"
        time.sleep(0.2)  # the emulator runs in this process


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sigterm_uploads_what_is_there(s3, processes, tmp_path):
    endless = ("--config.max_steps=4000", "--config.epochs=1000")  # 24 steps end before the signal arrives
    process = processes.start("grpo", *endless, f"--workdir={s3}/run")
    wait(lambda: newest(f"{s3}/run") > 1, process)
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and f"continues the run in {s3}/run" in " ".join(out.split()), err
    store = stores.Store(f"{s3}/run")
    done = (store.read("metrics.jsonl") or b"").count(b"\n")
    assert newest(store.url) == done > 1 and store.find("owner.json") is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_share_a_bucket_and_one_continues(s3, processes, monkeypatch, tmp_path, finished, traces):
    """Begun by two processes of four devices each, continued by one with one device: the same prompts follow."""
    from common.test_multihost import MESH, free_port

    from tinylora_jax.io.adapter import read_adapter

    monkeypatch.setitem(processes.env, "XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    where = ("--multihost", f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2")
    url = f"{s3}/run"
    both = []
    for index in range(2):  # each on its own machine
        monkeypatch.setitem(processes.env, "XDG_CACHE_HOME", str(tmp_path / f"disk_{index}"))
        both.append(processes.start("grpo", f"--workdir={url}", *MESH, *where, f"--process_id={index}"))
    wait(lambda: newest(url) >= 2, both[0])
    for process in both:
        process.terminate()
    outputs = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert not (tmp_path / "disk_1").exists(), "the first process alone speaks to the store"
    assert 2 <= newest(url) < 5

    monkeypatch.setitem(processes.env, "XLA_FLAGS", "")
    monkeypatch.setitem(processes.env, "XDG_CACHE_HOME", str(tmp_path / "disk_2"))
    one = processes.run("grpo", f"--workdir={url}", MESH[-1])  # the mesh may change, other fields may not
    assert one.code == 0, one.err
    assert "it was saved on 8 × cpu of 2 processes, mesh" in one.err and "and continues on 1 × cpu" in one.err
    copy = downloaded(url, tmp_path / "copy")
    assert traces(copy)["pages"] == traces(finished.workdir)["pages"]
    vectors = [read_adapter(folder / "adapter")[1] for folder in (finished.workdir, copy)]
    np.testing.assert_allclose(*vectors, atol=1e-5)
