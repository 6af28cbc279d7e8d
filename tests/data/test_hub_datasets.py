"""Data sets over the hub's own HTTP API, from a server on this machine that can go wrong."""

import re
import shutil
import time
from pathlib import Path

import pytest
from hub_server import Fault, serving
from huggingface_hub import constants

from tinylora_jax.data import DataError, DataSpec, load_questions

TOKEN = "hf_a_secret_that_nobody_may_see"
ROWS = b'{"question": "a?", "answer": "#### 1,000"}\n{"question": "b?", "answer": "#### 2"}\n'
CARD = b"---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train.jsonl\n---\n"
SPEC = DataSpec("org/sums:main")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving(tmp_path, monkeypatch) as hub:
        hub.repo("org/sums", "datasets").commit({"README.md": CARD, "main/train.jsonl": ROWS, "x.bin": b"\x80"})
        yield hub


def offline(monkeypatch):
    import datasets

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_a_data_set_is_loaded_by_its_id(hub):
    questions = load_questions(SPEC)
    assert [(each.question, each.answer) for each in questions] == [("a?", "1000"), ("b?", "2")]
    assert "main/train.jsonl" in hub.fetched() and "x.bin" not in hub.fetched()


@pytest.mark.parametrize("how", ["offline", "429", "503", "no answer"])
def test_what_is_cached_is_enough(hub, monkeypatch, how):
    before = load_questions(SPEC)
    monkeypatch.setattr("tinylora_jax.data.sources._PROBE_S", 0.3)
    if how == "offline":
        offline(monkeypatch)
    else:
        fault = Fault(".", stall_s=1) if how == "no answer" else Fault(".", status=int(how))
        hub.faults.append(fault)
    assert load_questions(SPEC) == before


def gated(status):
    def change(hub):
        hub.repo("org/sums", "datasets").gated = status

    return change


def fault(*args, **options):
    return lambda hub: hub.faults.append(Fault(*args, **options))


FILE = r"GET .*/resolve/.*jsonl"
FAILURES = {
    "gated, 401": (gated(401), SPEC, "is gated; accept the data set's licence.*log in"),
    "gated, 403": (gated(403), SPEC, "is gated; accept the data set's licence.*log in"),
    "no such data set": (None, DataSpec("org/none"), "doesn't exist on the Hub or cannot be accessed; check the name"),
    "no such config": (None, DataSpec("org/sums:other"), "BuilderConfig 'other' not found.*check the name, its config"),
    "no such split": (
        None,
        DataSpec("org/sums:main", split="test"),
        'Unknown split "test".*check the name, its config',
    ),
    "no file": (lambda hub: hub.repo("org/sums", "datasets").commit({"README.md": CARD}), SPEC, "check the name"),
    "429": (
        fault(".", status=429),
        SPEC,
        "answered 429 .too many requests.*wait a few minutes, and its cache lacks it",
    ),
    "429 for an hour": (fault(FILE, status=429, headers={"Retry-After": "3600"}), SPEC, "again in 3600 seconds"),
    "503": (fault(".", status=503), SPEC, "answered with status 503 for .*and its cache lacks it"),
    "cut off": (fault(FILE, cut=20), SPEC, "the connection broke .*; check the network and run"),
    "no answer": (fault(".", stall_s=1), SPEC, "could not be reached .* and its cache lacks it"),
    "a login page": (
        fault("GET .*/resolve/", status=200, body=b"<html>"),
        SPEC,
        "a file arrived with another size than the hub states",
    ),
    "offline": (offline, SPEC, "could not be reached .*check the network and HF_HUB_OFFLINE"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_every_failure_is_one_sentence_in_bounded_time(hub, case, monkeypatch, capfd):
    change, spec, said = FAILURES[case]
    monkeypatch.setattr("tinylora_jax.data.sources._PROBE_S", 0.3)
    if change is not None:
        change(monkeypatch if change is offline else hub)
    started = time.monotonic()
    with pytest.raises(DataError, match=said) as caught:
        load_questions(spec)
    assert time.monotonic() - started < 8 and hub.slept_s < 100
    assert "\n" not in str(caught.value), str(caught.value)
    assert TOKEN not in str(caught.value) + "".join(capfd.readouterr())


def test_other_bytes_than_the_hub_states_are_refused(hub):
    """The size is right, so that only the hash tells."""
    turned = bytes(ord("3") if byte == ord("2") else byte for byte in ROWS)
    hub.faults.append(Fault(FILE, body=turned, status=200, headers={"X-Repo-Commit": "x"}))
    for _ in range(2):
        with pytest.raises(DataError, match="train.jsonl is damaged: the hash .*delete .* too") as caught:
            load_questions(SPEC)
    hub.faults.clear()
    blob, table = re.search(r"Delete (\S+) and run .*; delete (\S+) too", str(caught.value)).groups()
    Path(blob).unlink()
    shutil.rmtree(table)
    assert [each.answer for each in load_questions(SPEC)] == ["1000", "2"]
