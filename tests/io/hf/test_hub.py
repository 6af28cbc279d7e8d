"""What comes from the hub, or from something that answers in its place: the right bytes, or one clear error."""

import hashlib
import importlib
import json
import os

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from tinylora_jax.hub import check_blobs
from tinylora_jax.io.hf import _hub as huggingface
from tinylora_jax.io.hf._hub import NotInCacheError, check_links, fetch_folder, read_json

http = importlib.import_module(huggingface.HTTPError.__module__.split(".")[0])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A snapshot as the hub's cache keeps it: `add(name, data, large)` puts a file there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()

    def add(name, data, large, stored=None):
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        blob = blobs / (hashlib.sha256(data).hexdigest() if large else git)
        blob.write_bytes(data if stored is None else stored)
        (snapshot / name).symlink_to(blob)
        return blob

    return snapshot, add


@pytest.mark.parametrize("large", [False, True])
def test_bytes_that_the_hub_does_not_state_are_refused_every_time(cache, large):
    snapshot, add = cache
    add("config.json", b"{}", False)
    blob = add("model.safetensors", b"right", large)
    check_blobs(snapshot)
    blob.write_bytes(b"wrong")
    for _ in range(2):
        with pytest.raises(ValueError, match="model.safetensors is damaged: the hash of its .* is not the one stated"):
            check_blobs(snapshot)
    blob.write_bytes(b"right")
    check_blobs(snapshot)


def test_what_was_right_is_not_hashed_again(cache, monkeypatch):
    snapshot, add = cache
    add("model.safetensors", b"right", True)
    check_blobs(snapshot)
    monkeypatch.setattr("tinylora_jax.hub._hash", lambda _: pytest.fail("hashed again"))
    check_blobs(snapshot)


def test_a_folder_of_ones_own_has_no_hashes(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"anything")
    check_blobs(tmp_path)


def raising(error):
    def download(*_args, **_options):
        raise error

    return download


def refused(kind, status):
    request = http.Request("GET", "https://huggingface.co/a/b")
    return kind("refused", response=http.Response(status, request=request))


@pytest.mark.parametrize(
    "error, said",
    [
        (refused(GatedRepoError, 403), "accept the model's licence on its page.*`hf auth login`"),
        (refused(RepositoryNotFoundError, 401), "check the id; for a private model log in"),
        (json.JSONDecodeError("Expecting value", "<html>", 0), "not come from the hub but.*a network's login page"),
        (http.ReadError("connection reset"), "check the network and run the same command again"),
    ],
)
def test_every_failure_says_what_to_do(monkeypatch, error, said):
    monkeypatch.setattr(huggingface, "snapshot_download", raising(error))
    with pytest.raises(FileNotFoundError, match=f"cannot get 'a/b' from the Hugging Face hub: .*{said}"):
        fetch_folder("a/b")


def test_what_is_not_in_the_cache_is_told_apart(monkeypatch):
    monkeypatch.setattr(huggingface, "snapshot_download", raising(LocalEntryNotFoundError("not there")))
    with pytest.raises(NotInCacheError, match="'a/b' is not in the cache"):
        fetch_folder("a/b", download=False)


def test_only_the_weights_that_are_read_are_fetched(monkeypatch, tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    asked = []

    def download(source, **options):
        asked.append(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface, "snapshot_download", download)
    fetch_folder("a/b")
    first, second = asked
    assert "*.safetensors" not in first["allow_patterns"] and "model.safetensors" in first["allow_patterns"]
    assert second["allow_patterns"] == sorted(index["weight_map"].values())
    assert second["revision"] == tmp_path.name


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "model.safetensors"])
def test_a_link_to_nothing_is_not_taken_for_absence(tmp_path, name):
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=f"{name} links to a file that is absent"):
        check_links(tmp_path)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a named pipe, expected a file"):
        check_links(tmp_path)


def test_a_web_page_is_called_one(tmp_path):
    (tmp_path / "config.json").write_text("<!DOCTYPE html><html>Welcome to the hotel</html>")
    with pytest.raises(ValueError, match="config.json.*it is a web page, perhaps from a proxy or a network's"):
        read_json(tmp_path / "config.json")
