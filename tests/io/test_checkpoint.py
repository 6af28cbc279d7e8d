"""Checkpoints: restoring inverts saving, incomplete ones do not count, foreign ones are named."""

import os
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tinylora_jax.io import _checkpoint
from tinylora_jax.io._checkpoint import CheckpointError, Checkpoints
from tinylora_jax.training import Optimizer, init_state

# Orbax leaves coroutines behind when it fails to read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

OPTIMIZER = Optimizer(1e-3, schedule="cosine", total_updates=9).transform()
RECORD = {"data": {"next_index": 3, "nested": [1, {"a": None}]}, "totals": {"wall_s": 0.1 + 0.2, "tokens": 2**53}}


def state(seed=0, shape=(3, 2)):
    """A state in which no leaf has its initial value, with denormals and extremes in v."""
    rng = np.random.default_rng(seed)
    first = init_state(jnp.zeros(shape), OPTIMIZER)
    fill = lambda x: jnp.asarray(rng.integers(1, 99) if x.ndim == 0 else rng.standard_normal(x.shape), x.dtype)
    filled = jax.tree.map(fill, first)
    odd = np.array(filled.v)
    odd.flat[:2] = 1e-42, -3.4e38
    return jax.tree_util.tree_unflatten(jax.tree.structure(first), [jnp.asarray(odd), *jax.tree.leaves(filled)[1:]])


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints")
    yield made
    made.close()


def save(checkpoints, step, state, record):
    """Saves a step, complete on disk."""
    checkpoints.save(step, state, record)
    checkpoints.wait()


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_restore_inverts_save(checkpoints):
    assert checkpoints.latest_step() is None
    save(checkpoints, 1, state(), RECORD)
    found, record = checkpoints.restore(init_state(jnp.zeros((3, 2)), OPTIMIZER))
    assert_same(found, state())
    assert record == RECORD


def test_another_process_finds_it(checkpoints):
    save(checkpoints, 1, state(), RECORD)
    other = Checkpoints(checkpoints.directory)
    assert other.latest_step() == 1
    assert_same(other.restore(state(1))[0], state())
    other.close()


def test_the_newest_is_read_and_few_are_kept(checkpoints):
    for step in range(1, 6):
        save(checkpoints, step, state(step), {"step": step})
    found, record = checkpoints.restore(state())
    assert record == {"step": 5}
    assert_same(found, state(5))
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["4", "5"]


def test_a_step_is_written_while_the_next_one_runs(checkpoints, monkeypatch):
    write, allowed, record = checkpoints._manager.save, threading.Event(), {"step": 1}

    def slow(*args, **kwargs):
        assert allowed.wait(60)
        write(*args, **kwargs)

    monkeypatch.setattr(checkpoints._manager, "save", slow)
    checkpoints.save(1, state(1), record)  # returns before anything is written
    record["step"] = 2
    assert not any(path.name.isdigit() for path in checkpoints.directory.iterdir())
    allowed.set()
    checkpoints.save(2, state(2), record)
    assert (checkpoints.directory / "1").is_dir()
    found, record = checkpoints.restore(state())
    assert record == {"step": 2}
    assert_same(found, state(2))
    shutil.rmtree(checkpoints.directory / "2")
    other = Checkpoints(checkpoints.directory)
    assert other.restore(state())[1] == {"step": 1}
    other.close()


@pytest.mark.parametrize("then", ["save", "wait", "latest_step", "restore", "close"])
def test_the_error_of_writing_a_step_is_raised_by_the_next_call(tmp_path, monkeypatch, then):
    checkpoints = Checkpoints(tmp_path / "checkpoints")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints._manager, "save", full)
        checkpoints.save(1, state(1), {})
        arguments = {"save": (2, state(2), {}), "restore": (state(),)}.get(then, ())
        with pytest.raises(CheckpointError, match="the checkpoint of step 1.*No space left"):
            getattr(checkpoints, then)(*arguments)
    checkpoints.close()


def test_small(checkpoints):
    save(checkpoints, 1, state(), RECORD)
    files = [path for path in checkpoints.directory.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 64 * 1024


def test_a_leftover_of_a_killed_save_is_ignored(checkpoints):
    save(checkpoints, 1, state(1), {"step": 1})
    leftover = checkpoints.directory / "2.orbax-checkpoint-tmp"
    shutil.copytree(checkpoints.directory / "1" / "state", leftover / "state")
    other = Checkpoints(checkpoints.directory)
    assert other.latest_step() == 1
    assert_same(other.restore(state())[0], state(1))
    save(other, 2, state(2), {"step": 2})
    save(other, 3, state(3), {"step": 3})
    assert_same(other.restore(state())[0], state(3))
    assert not leftover.exists()
    other.close()


def test_another_structure_is_named(checkpoints):
    save(checkpoints, 4, state(), RECORD)
    other = init_state(jnp.zeros((7, 1)), Optimizer(1e-3).transform())
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(other)
    message = str(caught.value)
    assert str(checkpoints.directory / "4") in message and "belongs to another run" in message
    assert "v: expected float32[7, 1], found float32[3, 2]" in message
    assert "step" not in message.replace("the checkpoint of step", "").split("\n", 1)[1]
    with pytest.raises(CheckpointError, match=r"extra: expected int32\[\], found nothing"):
        checkpoints.restore({"extra": jnp.int32(0)})


def test_another_dtype_is_named(checkpoints):
    save(checkpoints, 1, {"v": jnp.zeros(3, jnp.float32)}, {})
    with pytest.raises(CheckpointError, match=r"v: expected bfloat16\[3\], found float32\[3\]"):
        checkpoints.restore({"v": jnp.zeros(3, jnp.bfloat16)})


def damage(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "overwritten":
        path.write_bytes(bytes(byte ^ 0x5A for byte in path.read_bytes()))
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "emptied", "overwritten", "deleted"])
def test_no_damage_to_a_file_goes_unnoticed(checkpoints, tmp_path, how):
    # Either the damage is reported, naming the folder, or the file did not matter and the state is the same.
    save(checkpoints, 1, state(), RECORD)
    files = sorted(p.relative_to(checkpoints.directory) for p in checkpoints.directory.rglob("*") if p.is_file())
    reported, unharmed = [], []
    for number, file in enumerate(files):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(checkpoints.directory, copy)
        damage(copy / file, how)
        damaged = Checkpoints(copy)
        try:
            if damaged.latest_step() is None:
                continue  # counts as incomplete: the step is done again
            found, record = damaged.restore(state(1))
        except CheckpointError as error:
            assert f"the checkpoint {copy / '1'} is damaged" in str(error), (file, error)
            assert "Delete that folder" in str(error)
            reported.append(file)
        else:
            assert_same(found, state())
            assert record == RECORD, file
            unharmed.append(file)
        finally:
            damaged.close()
    assert reported, unharmed


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot store checkpoints in .*file/checkpoints"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_failed_write_leaves_the_step_before(checkpoints, monkeypatch):
    save(checkpoints, 1, state(1), {"step": 1})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(CheckpointError, match="the checkpoint of step 2.*No space left.*earlier steps are"):
        save(checkpoints, 2, state(2), {})
    assert_same(checkpoints.restore(state())[0], state(1))


def test_a_record_in_which_anything_changed_is_damaged(checkpoints, tmp_path):
    save(checkpoints, 1, state(), RECORD)
    (path,) = checkpoints.directory.rglob("record/metadata")
    text, rng = path.read_bytes(), np.random.default_rng(0)
    for number in range(40):
        changed = bytearray(text)
        changed[rng.integers(len(text))] ^= 1 << int(rng.integers(8))
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(checkpoints.directory, copy)
        (copy / path.relative_to(checkpoints.directory)).write_bytes(changed)
        damaged = Checkpoints(copy)
        try:
            found, record = damaged.restore(state(1))
        except CheckpointError as error:
            assert "is damaged" in str(error)
        else:  # a space in the JSON
            assert record == RECORD
            assert_same(found, state())
        finally:
            damaged.close()


def test_a_checkpoint_of_before_there_was_a_checksum_is_read(checkpoints):
    named = {"v": np.arange(3.0, dtype=np.float32)}
    items = {"state": ocp.args.StandardSave(named), "record": ocp.args.JsonSave(RECORD)}
    checkpoints._manager.save(1, args=ocp.args.Composite(**items))
    found, record = checkpoints.restore({"v": jnp.zeros(3)})
    assert record == RECORD and np.array_equal(found["v"], named["v"])


def test_a_checkpoint_of_before_arrays_were_joined_is_read(checkpoints):
    named = {"v": np.arange(3.0, dtype=np.float32), "step": np.int32(4)}
    signed = {"record": RECORD, "sha256": _checkpoint._digest({k: np.asarray(a) for k, a in named.items()}, RECORD)}
    items = {"state": ocp.args.StandardSave(named), "record": ocp.args.JsonSave(signed)}
    checkpoints._manager.save(1, args=ocp.args.Composite(**items))
    found, record = checkpoints.restore({"v": jnp.zeros(3), "step": jnp.int32(0)})
    assert record == RECORD and np.array_equal(found["v"], named["v"]) and found["step"] == 4


def test_many_small_arrays_become_one(checkpoints, monkeypatch):
    rng, shapes = np.random.default_rng(0), [(), (3,), (2, 5), (0,), (400,)]
    dtypes = (jnp.float32, jnp.bfloat16, jnp.int32)
    many = {f"a{i}": jnp.asarray(rng.integers(-99, 99, shapes[i % 5]), dtypes[i % 3]) for i in range(60)}
    monkeypatch.setattr(_checkpoint, "_SMALL", 1000)  # of 400 numbers, those of four bytes are large
    save(checkpoints, 1, many, RECORD)
    large = [name for name, array in many.items() if array.nbytes >= 1000]
    arrays, layout = _checkpoint._join({name: np.asarray(array) for name, array in many.items()})
    assert large and sorted(arrays) == sorted([*large, *(f"layout.{jnp.dtype(dtype)}" for dtype in dtypes)])
    found, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, many))
    assert_same(found, many)


def test_a_full_disk_says_nothing_else(tmp_path):
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "import numpy as np; from tinylora_jax.io._checkpoint import CheckpointError, Checkpoints\n"
        "kept = Checkpoints(Path(sys.argv[1])); kept.save(1, {'v': np.ones(3)}, {}); kept.wait()\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try: kept.save(2, {'v': np.ones(3000)}, {}); kept.wait()\n"
        "except CheckpointError as error: print('refused', kept.latest_step())"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert result.stdout == "refused 1\n", result.stderr
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr


@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_what_is_no_file_is_refused_at_once(checkpoints, kind):
    save(checkpoints, 1, state(), RECORD)
    for path in sorted(path for path in checkpoints.directory.rglob("*") if path.is_file()):
        data = path.read_bytes()
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
        with pytest.raises(CheckpointError, match=f"{path.name} is a .*, expected a file; remove it"):
            Checkpoints(checkpoints.directory)
        path.unlink()
        path.write_bytes(data)
