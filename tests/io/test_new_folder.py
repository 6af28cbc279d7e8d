"""Folders are there whole or not at all."""

import pytest

from tinylora_jax.io._new_folder import new_folder


@pytest.mark.parametrize("before", ["absent", "empty", "below", "linked"])
def test_a_folder_appears_when_it_is_whole(tmp_path, before):
    path = tmp_path / "a" / "b" if before == "below" else tmp_path / "a"
    if before == "empty":
        path.mkdir()
    if before == "linked":
        (tmp_path / "real").mkdir()
        path.symlink_to(tmp_path / "real")
    with new_folder(path) as folder:
        (folder / "x").write_text("1")
        assert not (path / "x").exists()
    assert (path / "x").read_text() == "1"
    assert [p.name for p in path.resolve().parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_nothing_is_left_after_an_error(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path):
    (tmp_path / "x").write_text("mine")
    for path, what in ((tmp_path, "not empty"), (tmp_path / "x", "not a folder")):
        with pytest.raises(FileExistsError, match=f"is {what}; choose a new folder"), new_folder(path):
            raise AssertionError
    assert (tmp_path / "x").read_text() == "mine"


@pytest.mark.parametrize("place", ["x/a", "/proc/nothing/a", "/dev/null/a"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "x").write_text("a file")
    with pytest.raises(OSError, match="cannot create a folder in .*; choose another"), new_folder(tmp_path / place):
        raise AssertionError
