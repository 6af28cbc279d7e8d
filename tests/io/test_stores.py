"""Objects of a store as files, and errors that say what to do; on emulators of S3 and GCS where they are installed."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from emulated_stores import emulated_gcs, emulated_s3
from fake_store import FakeFilesystem

from tinylora_jax import stores
from tinylora_jax.data import DataError, DataSpec, load_questions
from tinylora_jax.io import load_pretrained
from tinylora_jax.stores import Store, StoreError, fetch_object, fetch_objects, send_folder


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fake(monkeypatch, cache):
    filesystem = FakeFilesystem()
    monkeypatch.setattr(stores, "_filesystem", lambda scheme: filesystem)
    return filesystem


def emulated(emulator, monkeypatch):
    with emulator() as (environment, url):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield url


@pytest.fixture
def s3(monkeypatch, cache):
    """An empty bucket of an emulated S3: its URL."""
    yield from emulated(emulated_s3, monkeypatch)


@pytest.fixture
def gs(monkeypatch, cache):
    """An empty bucket of an emulated GCS: its URL."""
    yield from emulated(emulated_gcs, monkeypatch)


@pytest.fixture(params=["fake", "s3", "gs"])
def bucket(request):
    found = request.getfixturevalue(request.param)
    return found if isinstance(found, str) else "s3://bucket"


@pytest.mark.filterwarnings("ignore")  # of the emulators and their clients
def test_objects_are_written_listed_read_replaced_and_removed(bucket, tmp_path):
    store = Store(f"{bucket}/a/run")
    assert store.objects() == {} and store.read("x") is None and store.find("x") is None
    store.check_writable()
    assert store.objects() == {}
    (tmp_path / "large").write_bytes(large := os.urandom(6_000_000))
    store.put(tmp_path / "large", "folder/large")
    store.write("small", b"one")
    Store(f"{bucket}/a/runner").write("other", b"of a longer name")
    found = store.objects()
    assert {name: each.size for name, each in found.items()} == {"folder/large": 6_000_000, "small": 3}
    assert store.find("small").size == 3 and store.find("folder") is None
    store.get_all(found, tmp_path / "copy")
    assert (tmp_path / "copy" / "folder" / "large").read_bytes() == large
    store.write("small", b"two")  # a listing must show it at once, although its size is the same
    assert store.read("small") == b"two" and store.objects()["small"].identity != found["small"].identity
    for _ in range(2):
        store.remove("small")
    assert set(store.objects()) == {"folder/large"}
    with pytest.raises(StoreError, match="there is no such object or bucket"):
        store.get("small", tmp_path / "small", 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_bucket_that_does_not_exist(request, scheme):
    request.getfixturevalue(scheme)
    for ask in (lambda store: store.objects(), lambda store: store.check_writable()):
        with pytest.raises(StoreError, match=rf"^{scheme}://none/run: there is no .*bucket.*check the URL"):
            ask(Store(f"{scheme}://none/run"))


@pytest.mark.filterwarnings("ignore")
def test_credentials_that_are_missing(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match="no valid credentials .*AWS_ACCESS_KEY_ID"):
        Store(f"{s3}/run").check_writable()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://bucket/run", "expected gs://bucket/folder or s3://bucket/folder, or a local path"),
        ("file:///tmp/run", "expected gs://bucket/folder or s3://bucket/folder, or a local path"),
        ("s3://", "expected s3://bucket/folder"),
        ("s3:///run", "expected s3://bucket/folder"),
        ("gs://bucket/a/../b", "without empty parts or"),
        ("gs://bucket//b", "without empty parts or"),
    ],
)
def test_urls_that_name_no_store(url, said):
    with pytest.raises(StoreError, match=said):
        Store(url)


@pytest.mark.parametrize(("scheme", "extra"), [("gs", "gcs"), ("s3", "s3")])
def test_a_package_that_is_not_installed(monkeypatch, scheme, extra):
    def absent(scheme):
        raise ImportError(f"Install it to access {scheme}")

    monkeypatch.setattr(stores, "_filesystem", absent)
    with pytest.raises(StoreError, match=rf"fs is not installed; run: pip install -e '.\[{extra}\]' "):
        Store(f"{scheme}://bucket/run")


def test_every_extra_is_in_setup():
    setup = (Path(__file__).parents[2] / "setup.py").read_text(encoding="utf-8")
    for package, extra, _ in stores._SCHEMES.values():
        assert f'"{extra}": ["{package}>=' in setup


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError("AccessDenied"), "this account may not do that .AccessDenied.*rights"),
        (type("HttpError", (OSError,), {"code": 403})("Forbidden"), "this account may not do that"),
        (OSError("Anonymous caller does not have storage.objects.list access"), "no valid credentials .*gcloud auth"),
        (TimeoutError("timed out"), "cannot be reached or refuses .TimeoutError: timed out"),
    ],
)
def test_what_a_store_refuses_is_one_sentence(fake, error, said):
    store = Store("gs://bucket/run")

    def before(name, path):
        raise error

    fake.before = before
    for ask in (store.objects, store.check_writable, lambda: store.read("x"), lambda: store.remove("x")):
        with pytest.raises(StoreError, match=f"^gs://bucket/run: .*{said}") as caught:
            ask()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "AccessDenied"])
def test_keys_that_s3_does_not_accept_are_not_called_missing_rights(fake, code):
    pytest.importorskip("s3fs", reason="pip install s3fs")
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    def before(name, path):
        raise translate_boto_error(ClientError({"Error": {"Code": code, "Message": "as it says"}}, "PutObject"))

    fake.before = before
    with pytest.raises(StoreError) as caught:
        Store("s3://bucket/run").check_writable()
    if code == "AccessDenied":
        assert "this account may not do that (as it says); ask for the rights" in str(caught.value)
    else:
        assert f"the credentials are not valid ({code}: as it says); run `aws configure`" in str(caught.value)


def test_names_that_would_leave_the_folder_are_refused(fake, tmp_path):
    fake.memory.store["/bucket/run/a/../../../b"] = fake.memory.open("/bucket/x", "wb")
    with pytest.raises(StoreError, match="which cannot be a file; remove it"):
        Store("s3://bucket/run").objects()


def test_a_copy_that_was_cut_off_is_not_taken(fake, tmp_path):
    store = Store("s3://bucket/run")
    store.write("x", b"123")
    with pytest.raises(StoreError, match="expected 4 bytes, received 3"):
        store.get("x", tmp_path / "x", 4)
    assert not (tmp_path / "x").exists()


def test_what_is_read_is_copied_once_for_each_content(fake):
    store = Store("s3://bucket/adapter")
    store.write("vector.bin", b"one")
    store.write("sub/deep", b"not in the folder itself")
    first = fetch_objects("s3://bucket/adapter/")
    assert [path.name for path in first.iterdir()] == ["vector.bin"]
    copied = lambda: sum(name == "get_file" for name, _ in fake.log)
    assert fetch_objects("s3://bucket/adapter") == first and copied() == 1
    store.write("vector.bin", b"two")
    second = fetch_objects("s3://bucket/adapter")
    assert (second / "vector.bin").read_bytes() == b"two" and (first / "vector.bin").read_bytes() == b"one"
    assert fetch_object("s3://bucket/adapter/sub/deep").read_bytes() == b"not in the folder itself"
    for missing in (lambda: fetch_objects("s3://bucket/none"), lambda: fetch_object("s3://bucket/adapter/none")):
        with pytest.raises(StoreError, match="there is no such"):
            missing()


def test_a_copy_that_fails_leaves_nothing(fake, cache):
    Store("s3://bucket/adapter").write("vector.bin", b"one")
    fake.before = lambda name, path: (_ for _ in ()).throw(OSError("cut")) if name == "get_file" else None
    with pytest.raises(StoreError, match="cut"):
        fetch_objects("s3://bucket/adapter")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_another_process_may_copy_the_same_and_be_faster(fake, monkeypatch):
    Store("s3://bucket/adapter").write("vector.bin", b"one")
    found = []

    def before(name, path):
        if name == "get_file" and not found:
            found.append(None)
            with monkeypatch.context() as patched:
                patched.setattr(stores.os, "getpid", lambda: 1)
                found.append(fetch_objects("s3://bucket/adapter"))

    fake.lock, fake.before = nullcontext(), before
    assert fetch_objects("s3://bucket/adapter") == found[1]
    assert [path.name for path in found[1].parent.iterdir()] == [found[1].name]


def test_a_folder_is_sent_only_to_an_empty_place(fake, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    send_folder(tmp_path, "s3://bucket/out")
    assert Store("s3://bucket/out").read("a/x") == b"1"
    with pytest.raises(StoreError, match="is not empty; choose a new folder"):
        send_folder(tmp_path, "s3://bucket/out")


def test_questions_of_a_store(fake):
    Store("s3://bucket/data").write("q.jsonl", b'{"question": "1 + 1?", "answer": "2"}\n')
    assert load_questions(DataSpec("s3://bucket/data/q.jsonl"))[0].answer == "2"
    with pytest.raises(DataError, match="s3://bucket/data/none.jsonl: there is no such object"):
        load_questions(DataSpec("s3://bucket/data/none.jsonl"))
    with pytest.raises(DataError, match="unknown data source 's3://bucket/data'"):
        load_questions(DataSpec("s3://bucket/data"))


def test_a_model_that_only_an_adapter_names_is_not_fetched(fake):
    """Its author would choose which server is asked."""
    with pytest.raises(FileNotFoundError, match="is in an object store"):
        load_pretrained("s3://bucket/model", download=False)
    assert not fake.log
