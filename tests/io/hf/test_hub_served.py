"""Models, adapters and uploads over the hub's own HTTP API, from a server on this machine that can go wrong."""

import json
import time
from pathlib import Path

import pytest
from hub_server import Fault, serving
from huggingface_hub import constants
from huggingface_hub.utils import _http

from tinylora_jax.hub import HubError
from tinylora_jax.io.hf import _hub
from tinylora_jax.io.hf._hub import NotInCacheError, fetch_folder
from tinylora_jax.io.hf._hub_adapters import adapter_folder, check_push, push_folder

TOKEN = "hf_a_secret_that_nobody_may_see"
READ = {"config.json": b"{}", "tokenizer.json": b"{ }", "merges.txt": b"a b", "model.safetensors": b"weights" * 9}
NEVER = {
    "pytorch_model.bin": b"\x80\x04pickle",
    "original/consolidated.pt": b"\x80",
    "modeling.py": b"raise SystemExit",
    "training_args.bin": b"\x80",
    "onnx/model.safetensors": b"other",
    "consolidated.safetensors": b"other",
    "README.md": b"# card",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving(tmp_path, monkeypatch) as hub:
        hub.repo("org/model").commit({**READ, **NEVER})
        hub.repo("org/pickles").commit({"pytorch_model.bin": b"\x80"})
        yield hub
    assert hub.tokens <= {f"Bearer {TOKEN}", ""}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_only_safetensors_json_and_the_tokenizer_are_fetched(hub):
    folder = fetch_folder("org/model")
    assert names(folder) == sorted(READ) == hub.fetched()
    assert all((folder / name).read_bytes() == data for name, data in READ.items())


def test_shards_of_the_index_are_fetched_and_no_others(hub):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    shards = {"model-1.safetensors": b"1", "model-2.safetensors": b"2", "model-3.safetensors": b"3"}
    files = {**shards, "config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    hub.repo("org/shards").commit(files)
    assert set(names(fetch_folder("org/shards"))) == set(files) - {"model-3.safetensors"}


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub):
    old = hub.repo("org/model").refs["main"]
    hub.repo("org/model").refs["v1"] = old
    new = hub.repo("org/model").commit({**READ, "config.json": b'{"new": 1}'})
    hub.repo("org/model").refs["refs/pr/3"] = new
    read = lambda source: (fetch_folder(source) / "config.json").read_bytes()
    assert read("org/model") == read("org/model@refs/pr/3") == read(f"org/model@{new}") == b'{"new": 1}'
    assert read("org/model@v1") == read(f"org/model@{old}") == b"{}"


def gated(status):
    def change(hub):
        hub.repo("org/model").gated = status

    return change


def fault(*args, **options):
    return lambda hub: hub.faults.append(Fault(*args, **options))


BAD_TOKEN = {"X-Error-Message": "Invalid credentials in Authorization header"}
WEIGHTS = r"GET .*/resolve/.*\.safetensors"
AT_ALL = r"/(api|resolve)/"
FAILURES = {
    "gated, 401": (gated(401), "org/model", "is gated; accept the model's licence on its page"),
    "gated, 403": (gated(403), "org/model", "is gated; accept the model's licence on its page"),
    "no such repository": (None, "org/none", "no such model, or hides it from this account; check the id"),
    "no such revision": (None, "org/model@v9", "has the model, but not this revision; name a branch, a tag"),
    "no such commit": (None, f"org/model@{'0' * 40}", "has the model, but not this revision"),
    "bad token": (fault("/api/", status=401, headers=BAD_TOKEN), "org/model", "does not accept this login"),
    "forbidden": (fault("/api/", status=403), "org/model", r"refuses access with this token \(403\)"),
    "429": (fault("/api/", status=429), "org/model", "limits the rate.*429.*in a few minutes, or log in"),
    "429 for a file": (fault("GET .*/resolve/", status=429), "org/model", "limits the rate.*in a few minutes"),
    "429 for an hour": (fault("GET .*/resolve/", status=429, headers={"Retry-After": "3600"}), "org/model",
                        "run the same command again in 3600 seconds"),
    "429 until reset": (fault("GET .*/resolve/", status=429, headers={"RateLimit": '"api";r=0;t=299'}), "org/model",
                        "run the same command again in 299 seconds"),
    "503": (fault(AT_ALL, status=503), "org/model", r"has a problem of its own \(status 503\)"),
    "cut off": (fault(WEIGHTS, cut=20), "org/model", r"connection broke \(\w+\); check the network and run"),
    "no answer": (fault("/api/", stall_s=2), "org/model", "the connection broke"),
    "no answer for a file": (fault("GET .*/resolve/", stall_s=2), "org/model", "the connection broke"),
    "nothing to read": (None, "org/pickles", "holds none of the files that are read here"),
    "a login page": (fault("/api/", status=200, body=b"<html>hotel</html>"), "org/model", "not come from the hub but"),
    "an empty id": (None, "org/..", "is not a model: expected a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_every_failure_is_one_sentence_in_bounded_time(hub, case, monkeypatch, capfd):
    change, source, said = FAILURES[case]
    monkeypatch.setattr("tinylora_jax.hub._STALL_S", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    if change is not None:
        change(hub)
    started = time.monotonic()
    with pytest.raises(FileNotFoundError, match=said) as caught:
        fetch_folder(source)
    assert "\n" not in str(caught.value) and source in str(caught.value)
    assert time.monotonic() - started < 8 and hub.slept_s < 100
    assert TOKEN not in str(caught.value) + "".join(capfd.readouterr())


def test_a_short_rate_limit_is_waited_for(hub):
    hub.faults.append(Fault("GET .*/resolve/", status=429, headers={"Retry-After": "2"}, times=1))
    assert names(fetch_folder("org/model")) == sorted(READ)
    assert 2 <= hub.slept_s < 10


def test_a_file_that_was_cut_off_once_is_whole_in_the_end(hub):
    hub.faults.append(Fault(WEIGHTS, cut=20, times=1))
    assert (fetch_folder("org/model") / "model.safetensors").read_bytes() == READ["model.safetensors"]


def test_other_bytes_than_the_hub_states_are_refused(hub):
    """The size is right, so that only the hash tells."""
    hub.faults.append(Fault(WEIGHTS, change=True))
    for _ in range(2):
        with pytest.raises(
            ValueError, match="model.safetensors is damaged: the hash .* is not the one stated"
        ) as caught:
            fetch_folder("org/model")
    Path(str(caught.value).split("Delete ")[1].split(" and run")[0]).unlink()
    hub.faults.clear()
    assert (fetch_folder("org/model") / "model.safetensors").read_bytes() == READ["model.safetensors"]


def test_a_file_that_is_missing_is_named_when_the_model_is_opened(hub):
    from tinylora_jax.io import open_pretrained

    for lacking in ("config.json", "tokenizer.json"):
        files = {name: data for name, data in READ.items() if name != lacking}
        hub.repo(f"org/no-{lacking}").commit(files)
        with pytest.raises((FileNotFoundError, ValueError), match=r"config.json is missing|expected|lacks"):
            open_pretrained(f"org/no-{lacking}")


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "down", "no download"])
def test_what_is_cached_is_enough_and_what_is_not_is_told(hub, monkeypatch, how):
    fetch_folder("org/model")
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "down":
        hub.close()
        _http.close_session()  # which keeps connections open
    download, asked = how != "no download", len(hub.asked)
    assert names(fetch_folder("org/model", download)) == sorted(READ)
    expected = {
        "HF_HUB_OFFLINE": (FileNotFoundError, "HF_HUB_OFFLINE is set, and the cache lacks it; unset it, or use"),
        "down": (FileNotFoundError, "the hub cannot be reached .*; check the network"),
        "no download": (NotInCacheError, "'org/other' is not in the cache"),
    }
    kind, said = expected[how]
    with pytest.raises(kind, match=said):
        fetch_folder("org/other", download)
    assert len(hub.asked) == asked or how == "down"


def test_a_download_that_was_interrupted_does_not_pass_for_a_model_offline(hub, monkeypatch):
    hub.faults.append(Fault(WEIGHTS, status=403))
    with pytest.raises(FileNotFoundError, match="403"):
        fetch_folder("org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set, and the cache lacks it"):
        fetch_folder("org/model")


ADAPTER = {"adapter.json": b"{}", "vector.bin": b"26", "adapter_model.bin": b"\x80", "optimizer.pt": b"\x80"}
PEFT = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"A"}


@pytest.mark.parametrize(
    "files, found",
    [
        (ADAPTER, {"adapter.json", "vector.bin"}),
        (PEFT | {"adapter_model.bin": b"\x80"}, set(PEFT)),
        ({**PEFT, **{f"tinylora/{name}": data for name, data in ADAPTER.items()}}, {"adapter.json", "vector.bin"}),
    ],
    ids=["ours", "PEFT's", "both"],
)
def test_an_adapter_is_found_without_its_pickles(hub, files, found):
    hub.repo("me/adapter").commit(files)
    assert set(names(adapter_folder("hub:me/adapter"))) == found
    assert not [name for name in hub.fetched() if name.endswith((".bin", ".pt")) and "vector" not in name]


def test_other_bytes_in_the_folder_of_an_adapter_are_refused_too(hub):
    hub.repo("me/adapter").commit({f"tinylora/{name}": data for name, data in ADAPTER.items()})
    hub.faults.append(Fault("GET .*/resolve/.*vector.bin", change=True))
    with pytest.raises(ValueError, match="vector.bin is damaged: the hash"):
        adapter_folder("hub:me/adapter")


def test_a_revision_of_an_adapter(hub):
    first = hub.repo("me/adapter").commit(ADAPTER)
    hub.repo("me/adapter").commit(ADAPTER | {"vector.bin": b"27"})
    read = lambda name: (adapter_folder(name) / "vector.bin").read_bytes()
    assert read("hub:me/adapter") == b"27" and read(f"hub:me/adapter@{first}") == b"26"
    assert adapter_folder(Path("hub:me/adapter")) == adapter_folder("hub:me/adapter")
    assert adapter_folder("/tmp/mine") == Path("/tmp/mine")


@pytest.mark.parametrize(
    "name, said",
    [
        ("hub:me/none", "no such adapter"),
        ("hub:me", "not an adapter on the hub; expected hub:owner/name"),
        ("hub:", "not an adapter on the hub"),
        ("hub:../..", "not an adapter on the hub"),
        ("hub:org/model", "holds none of the files that are read here"),
        ("hub:org/vector", "holds no adapter: expected tinylora/adapter.json, adapter.json or adapter_config.json"),
    ],
)
def test_what_is_no_adapter_is_told(hub, name, said):
    hub.repo("org/vector").commit({"vector.bin": b"26"})
    with pytest.raises(FileNotFoundError, match=said):
        adapter_folder(name)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "to-push"
    (folder / "tinylora").mkdir(parents=True)
    (folder / "README.md").write_text("---\ntags: [a]\n---\n")
    (folder / "tinylora" / "vector.bin").write_bytes(b"26")
    return folder


def test_a_folder_arrives_in_one_commit(hub, folder):
    hub.writers = {TOKEN}
    commit = push_folder(folder, "me/new", "the title", private=True)
    repo = hub.repos["models", "me/new"]
    assert repo.private and repo.refs["main"] == commit and repo.titles[-1] == "the title"
    files = repo.commits[commit]
    assert files["tinylora/vector.bin"] == b"26" and files["README.md"] == b"---\ntags: [a]\n---\n"
    (folder / "tinylora" / "vector.bin").write_bytes(b"27")
    again = push_folder(folder, "me/new", "the second")
    assert repo.commits[again]["tinylora/vector.bin"] == b"27" and len(repo.commits) == 3


PUSHES = {
    "no token may write": (None, "me/new", "refuses access with this token.*So far nothing was uploaded"),
    "no login": (fault("repos/create", status=401), "me/new", "does not accept this login.*nothing was uploaded"),
    "conflict": (fault("/commit/", status=409), "me/old", "status 409.*exists, and its files are unchanged"),
    "conflicts without end": (
        fault("repos/create", status=409, body=b"Cannot create repo: another conflicting operation is in progress"),
        *("me/new", "keeps answering that another operation is in progress.*nothing was uploaded"),
    ),
    "refused commit": (fault("/commit/", status=403), "me/old", r"refuses access .*\(403\).*its files are unchanged"),
    "no answer to the commit": (fault("/commit/", stall_s=2), "me/old", "whether the files arrived is not known"),
    "rate": (fault("/preupload/", status=429), "me/old", "limits the rate.*its files are unchanged"),
    "no id": (None, "me", "'me' is not the id of a repository; expected <user>/<name>"),
    "a revision": (None, "me/old@main", "is not the id of a repository"),
}


@pytest.mark.parametrize("case", PUSHES)
def test_a_push_that_fails_claims_nothing(hub, folder, case, monkeypatch, capfd):
    change, name, said = PUSHES[case]
    monkeypatch.setattr("tinylora_jax.hub._STALL_S", 0.2)
    hub.repo("me/old").commit({"a": b"1"})
    hub.writers = set() if case == "no token may write" else {TOKEN}
    if change is not None:
        change(hub)
    started = time.monotonic()
    with pytest.raises(HubError, match=said) as caught:
        push_folder(folder, name, "title")
    assert "\n" not in str(caught.value) and time.monotonic() - started < 8
    assert TOKEN not in str(caught.value) + "".join(capfd.readouterr())
    assert len(hub.repos["models", "me/old"].commits) == 1


def test_nothing_private_goes_to_a_public_repository(hub, folder):
    hub.writers = {TOKEN}
    hub.repo("me/old").commit({"a": b"1"})
    with pytest.raises(HubError, match="exists and is public, so --private would not hide"):
        push_folder(folder, "me/old", "title", private=True)
    assert len(hub.repos["models", "me/old"].commits) == 1


def test_the_names_of_models_on_the_hub_are_still_the_ids(hub):
    assert _hub.HUB_ID.fullmatch("Qwen/Qwen2.5-0.5B") and not _hub.HUB_ID.fullmatch("a/b@")


def test_a_hub_that_refuses_the_connection_is_said_with_one_piece_of_advice(hub, tmp_path):
    hub.close()
    for folder, instead in ((fetch_folder, "use a local folder with config.json and model.safetensors"),
                            (lambda name: adapter_folder(f"hub:{name}"), "name a local folder")):  # fmt: skip
        with pytest.raises(FileNotFoundError) as caught:
            folder("org/model")
        assert str(caught.value) == (
            "cannot get 'org/model' from the Hugging Face hub: the hub cannot be reached (ConnectError); check the"
            f" network and run the same command again, or {instead}"
        )
    with pytest.raises(HubError) as caught:
        push_folder(tmp_path, "me/model", "title")
    assert str(caught.value) == (
        "cannot push to 'me/model': the hub cannot be reached (ConnectError); check the network and run the same"
        " command again. So far nothing was uploaded"
    )


@pytest.mark.parametrize(
    "repo", ["sums", "me/", "/sums", "me/a/b", "me/sums@main", "me/a--b", "me/a.git", "me/..", "a b/c"]
)
def test_a_malformed_id_and_a_missing_token_are_found_without_the_hub(hub, monkeypatch, tmp_path, repo):
    for check in (check_push, lambda repo: push_folder(tmp_path, repo, "title")):
        with pytest.raises(HubError, match="is not the id of a repository; expected"):
            check(repo)
    check_push("me/sums")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no token to push to 'me/sums' is known; log in with `hf auth login`, or set"):
        check_push("me/sums")
    assert not hub.asked
