"""A run's copy in a store: whatever fails and whenever it ends, the run continues from there, and nothing is mixed."""

import random
import threading
import time
import zipfile

import pytest
from fake_store import CHANGES, URL, FakeFilesystem, Killed, run_of, write

from tinylora_jax import stores
from tinylora_jax.io import Mirror, fetch_run
from tinylora_jax.io._run_objects import newest_step, pack, scan, unpack


class Clock:
    """Time that passes only where someone waits."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def fake(monkeypatch, tmp_path):
    filesystem = FakeFilesystem()
    monkeypatch.setattr(stores, "_filesystem", lambda scheme: filesystem)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return filesystem


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def machine(fake, tmp_path, clock):
    """A process on a new machine: its mirror, which has filled the local folder, and what it said."""
    count = iter(range(1000))

    def start(name=None):
        said = []
        folder = tmp_path / (name or f"machine_{next(count)}") / "run"
        taken = lambda why: said.append(f"taken: {why}")
        mirror = Mirror(stores.Store(URL), folder, said.append, taken, clock, clock.sleep)
        mirror.bring()
        mirror.said = said
        return mirror

    return start


def sound(fake, unfinished=False):
    """Checks that everything in the store has what it refers to; returns the newest step."""
    names = fake.names()
    steps = sorted(int(name[12:-4]) for name in names if name.startswith("checkpoints/"))
    for step in steps:
        assert "config.json" in names
        logged = fake.text("metrics.jsonl").split("\n")[:-1]
        assert logged[:step] == [f'{{"step": {index}}}' for index in range(step)]
        assert {f"samples/{index:06d}.txt" for index in range(step)} <= names
    assert "eval_before.json" not in names or "answers_before.jsonl" in names
    if "summary.json" in names:
        assert {"adapter/vector.bin", "adapter/adapter.json", "answers_after.jsonl"} <= names and max(steps) == 4
    return max(steps, default=0)


def finish(mirror, first=0):
    for _ in run_of(mirror.folder, first=first):
        mirror.sync()
    assert mirror.close(60.0) == ""


def test_a_finished_run_is_all_there_and_only_its_newest_checkpoints(fake, machine):
    mirror = machine()
    finish(mirror)
    assert sound(fake) == 4
    assert fake.names() == {*scan(mirror.folder), "checkpoints/3.zip", "checkpoints/4.zip"}
    assert all(fake.text(name) == (mirror.folder / name).read_text() for name in scan(mirror.folder))
    other = machine()
    assert newest_step(other.folder) == 4
    for path in (mirror.folder / "checkpoints" / "4").rglob("*"):
        there = other.folder / path.relative_to(mirror.folder)
        assert there.is_dir() if path.is_dir() else there.read_text() == path.read_text()


def half_uploaded(mirror):
    """The rest of a run whose first nine events are uploaded."""
    life = run_of(mirror.folder)
    for _ in range(9):
        next(life)
    mirror.sync()
    return life


def test_an_unchanged_folder_costs_no_request(fake, machine):
    mirror = machine()
    half_uploaded(mirror)
    before = len(fake.log)
    mirror.sync()
    assert len(fake.log) == before


def test_killed_between_any_two_uploads_it_continues(fake, machine):
    """The run goes on by any number of events while files are uploaded, and the machine is lost at any moment."""
    count, ends = None, set()
    for seed in range(40):
        rng = random.Random(seed)
        count = rng.randrange(1, 40)
        fake.memory.store.clear()
        mirror, reached = machine(), 0
        life, pace = run_of(mirror.folder), rng.random()

        def before(name, path, life=life, rng=rng, pace=pace):
            nonlocal count
            while rng.random() < pace and next(life, life) is not life:
                pass
            if name in CHANGES:
                count -= 1
                if count < 0:
                    raise Killed

        fake.before = before
        try:
            for _ in life:
                if rng.random() < 0.5:
                    mirror.sync()
                    reached = sound(fake)
            mirror.sync()
        except Killed:
            pass
        fake.before = lambda name, path: None
        step = sound(fake)
        assert step >= reached
        ends.add(step)
        other = machine()
        assert (newest_step(other.folder) or 0) == step
        finish(other, first=step)
        assert sound(fake) == 4
    assert ends == {0, 1, 2, 3, 4}, "the moments must reach all parts of a run"


def test_a_step_that_is_being_removed_is_not_uploaded(fake, machine, monkeypatch):
    mirror = machine()
    life = run_of(mirror.folder)
    while newest_step(mirror.folder) != 1:
        next(life)

    def slow(folder, target):
        while (folder / "record" / "metadata").exists():  # Orbax removes file after file
            next(life)
        pack(folder, target)

    with monkeypatch.context() as patched:
        patched.setattr("tinylora_jax.io._mirror.pack", slow)
        mirror.sync()
    assert (mirror.folder / "checkpoints" / "1").exists() and "checkpoints/1.zip" not in fake.names()
    mirror.sync()
    assert sound(fake) == newest_step(mirror.folder) == 3


def test_the_machine_is_lost_while_it_continues(fake, machine):
    """The log of a run that continues is shorter at first than the one in the store."""
    first = machine()
    life = run_of(first.folder)
    for _ in life:
        first.sync()
        if "checkpoints/2.zip" in fake.names():
            break
    while (first.folder / "metrics.jsonl").read_text().count("\n") < 3:  # this step has no checkpoint
        next(life)
    write(first.folder / "eval_before.json", "{}")
    first.sync()
    assert fake.text("metrics.jsonl").count("\n") == 3
    finish(machine(), first=2)
    assert sound(fake) == 4


def test_the_newest_state_alone_is_uploaded(fake, machine):
    mirror = machine()
    for _ in run_of(mirror.folder):
        pass
    mirror.sync()
    assert [name for kind, name in fake.log if kind == "put_file" and name.startswith("checkpoints/")] == [
        "checkpoints/4.zip"
    ]


def test_a_store_that_is_down_for_a_minute_loses_nothing(fake, machine, clock):
    mirror = machine()
    up_at = 60.0

    def before(name, path):
        if 0 < clock.now < up_at:
            raise OSError("no route to host")

    fake.before = before
    life = run_of(mirror.folder)
    while clock.now < up_at or next(life, life) is not life:
        for _ in range(2):
            next(life, None)
        mirror.attempt()
        clock.sleep(mirror._pause())
    assert mirror.close(600.0) == ""
    assert sound(fake) == 4
    assert len(mirror.said) == 2 and "no route to host" in mirror.said[0] and "up to date again" in mirror.said[1]


def test_what_cannot_be_uploaded_is_said_and_uploaded_by_the_next_command(fake, machine, clock):
    mirror = machine("one")
    life = half_uploaded(mirror)
    for _ in life:
        pass
    fake.before = lambda name, path: (_ for _ in ()).throw(OSError("down"))
    started = clock.now
    left = mirror.close(600.0)
    assert str(mirror.folder) in left and URL in left and 600 <= clock.now - started < 700
    assert "summary.json" not in fake.names()
    fake.before = lambda name, path: None
    again = machine("one")
    assert sound(fake) == 4 and "summary.json" in fake.names()
    assert (again.folder / "summary.json").exists()
    assert any("could not upload everything" in line for line in again.said)


def test_what_was_left_is_dropped_if_another_machine_has_continued(fake, machine):
    mirror = machine("one")
    half_uploaded(mirror)
    write(mirror.folder / "summary.json", "of a process that was replaced")
    fake.before = lambda name, path: (_ for _ in ()).throw(OSError("down"))
    assert mirror.close(60.0)
    fake.before = lambda name, path: None
    finish(machine("two"), first=sound(fake))
    assert machine("one").said == [] and "replaced" not in fake.text("summary.json")


def test_an_old_local_folder_is_not_trusted(fake, machine):
    finish(machine("one"))
    fake.memory.store["/bucket/run/summary.json"] = fake.memory.store["/bucket/run/adapter/vector.bin"]
    write(machine("two").folder / "leftover.json", "{}")
    again = machine("two")
    assert (again.folder / "summary.json").read_text() == "adapter/vector.bin\n"
    assert not (again.folder / "leftover.json").exists()


def test_of_two_processes_the_one_that_began_first_stops(fake, machine):
    first = machine()
    life = half_uploaded(first)
    second = machine()
    (said,) = second.said
    assert "did not record that it ended" in said and said.endswith("If it still runs, one of the two stops")
    again = run_of(second.folder, first=newest_step(second.folder))
    next(again)
    second.sync()
    for _ in life:
        pass
    assert not first.attempt() and len(first.said) == 1 and "taken: another process has begun" in first.said[0]
    assert "another process has begun to write" in first.close(600.0)
    for _ in again:
        second.sync()
    assert second.close(60.0) == "" and sound(fake) == 4


@pytest.mark.parametrize("end", [False, True])
def test_what_another_process_wrote_while_this_one_started_is_not_overwritten(fake, machine, end):
    """The other one finishes a step or the whole run, between the moments at which this one reads and claims it."""
    first = machine()
    life = half_uploaded(first)
    second = machine()
    for _ in life:
        first.sync()
        if not end and sound(fake) > newest_step(second.folder):
            break
    assert not end or first.close(60.0) == ""
    before = fake.names(), sound(fake)
    next(run_of(second.folder, first=newest_step(second.folder)))
    assert not second.attempt() and "taken: another process" in second.said[-1]
    assert "while this one started" in second.close(60.0) and "the same command continues the run" in second.said[-1]
    assert (fake.names(), sound(fake)) == before, "nothing was removed or replaced"
    third = machine()
    assert newest_step(third.folder) == sound(fake)
    finish(third, first=sound(fake))


def test_another_process_that_ends_without_a_word_more_stops_nobody(fake, machine):
    first = machine()
    half_uploaded(first)
    second = machine()
    assert first.close(60.0) == "" and "owner.json" not in fake.names()
    finish(second, first=newest_step(second.folder))
    assert sound(fake) == 4


def test_the_id_on_dashboards_moves_to_another_machine(fake, machine):
    mirror = machine()
    half_uploaded(mirror)
    write(mirror.folder / "dashboards.json", '{"id": "0123456789abcdef", "names": ["wandb"]}')
    mirror.sync()
    assert "0123456789abcdef" in (machine().folder / "dashboards.json").read_text()


def test_a_run_that_was_removed_from_the_store_is_not_completed(fake, machine):
    mirror = machine()
    life = half_uploaded(mirror)
    fake.memory.store.clear()
    next(life)
    next(life)
    assert not mirror.attempt() and "was removed" in mirror.said[0] and not fake.names()


def test_steps_of_a_replaced_process_are_removed(fake, machine):
    """Such a step would be newer than the logs of the process that continues."""
    first = machine()
    for _ in run_of(first.folder, steps=9):
        first.sync()
        if "checkpoints/2.zip" in fake.names():
            break
    second = machine()
    stale = fake.memory.store["/bucket/run/checkpoints/2.zip"]
    for index, _ in enumerate(run_of(second.folder, first=2)):
        second.sync()
        if index == 0:  # the upload of the other one was on its way when the run was claimed
            fake.memory.store["/bucket/run/checkpoints/7.zip"] = stale
    assert second.close(60.0) == ""
    assert {name for name in fake.names() if name.startswith("checkpoints/")} == {
        "checkpoints/3.zip",
        "checkpoints/4.zip",
    }


def test_nothing_is_written_before_the_run_claims_its_folder(fake, machine):
    mirror = machine()
    write(mirror.folder / "error.log", "the config was refused")
    write(mirror.folder / "run.png", "")
    assert mirror.close(60.0) == "" and not fake.names()


def test_a_damaged_checkpoint_is_named(fake, machine):
    finish(machine())
    stored = fake.memory.store["/bucket/run/checkpoints/4.zip"]
    data = bytearray(stored.getvalue())
    data[data.index(b"of step 4")] ^= 1
    stored.seek(0)
    stored.write(bytes(data))
    with pytest.raises(stores.StoreError, match=r"run/checkpoints/4.zip is damaged .*delete that object"):
        machine()
    del fake.memory.store["/bucket/run/checkpoints/4.zip"]
    assert newest_step(machine().folder) == 3


@pytest.mark.parametrize("kind", ["compressed", "outside", "cut"])
def test_archives_of_others_are_refused(tmp_path, kind):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED) as archive:
        archive.writestr("../x" if kind == "outside" else "x", "0" * 1000)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="no checkpoint has|BadZipFile"):
        unpack(path, tmp_path / "to")
    assert not (tmp_path / "x").exists()


def test_unpack_inverts_pack(tmp_path):
    folder = tmp_path / "from"
    (folder / "empty").mkdir(parents=True)
    write(folder / "a" / "b", "text")
    pack(folder, tmp_path / "a.zip")
    unpack(tmp_path / "a.zip", tmp_path / "to")
    assert (tmp_path / "to" / "empty").is_dir() and (tmp_path / "to" / "a" / "b").read_text() == "text"


def test_a_transfer_that_hangs_does_not_hold_up_the_end(fake, machine):
    """Neither `close` nor the interpreter, which waits for every thread that is no daemon."""
    mirror, going_on = machine(), threading.Event()
    for _ in run_of(mirror.folder):
        pass
    mirror._clock, mirror._sleep = time.monotonic, time.sleep
    put = stores.Store.put
    mirror.store.put = lambda path, name: (going_on.wait(60), put(mirror.store, path, name))
    try:
        started = time.monotonic()
        assert "not everything could be uploaded" in mirror.close(0.2)
        assert time.monotonic() - started < 5 and "summary.json" not in fake.names()
        ours = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
        assert ours and all(thread.daemon for thread in ours)
    finally:
        going_on.set()
        mirror._thread.join()


def test_close_repeats_what_fails_only_until_its_deadline(fake, machine, clock):
    """Each attempt takes 15 s here, so that two of them are more than the patience."""
    mirror = machine()
    for _ in run_of(mirror.folder):
        pass

    def before(name, path):
        clock.now += 15
        raise OSError("down")

    fake.before = before
    assert mirror.close(20.0) and clock.now <= 35


def test_the_thread_uploads_by_itself(fake, machine, monkeypatch):
    monkeypatch.setattr("tinylora_jax.io._mirror._POLL_S", 0.01)
    mirror = machine()
    mirror.start()
    for _ in run_of(mirror.folder):
        pass
    assert mirror.close(60.0) == ""
    assert sound(fake) == 4 and not mirror.said


def test_logs_and_results_are_read_without_the_rest(fake, machine):
    mirror = machine()
    finish(mirror)
    folder = fetch_run(URL)
    assert set(scan(folder)) == {
        *("config.json", "metrics.jsonl", "summary.json"),
        *("eval_before.json", "answers_before.jsonl", "answers_after.jsonl"),
    }
    fake.log.clear()
    assert fetch_run(URL) == folder and not any(kind == "get_file" for kind, _ in fake.log)
    with pytest.raises(stores.StoreError, match="no such folder"):
        fetch_run("s3://bucket/other")
