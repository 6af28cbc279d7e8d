"""Sources behind optional packages and the network: reasoning-gym, and the hub with its client replaced."""

import json
import sys

import datasets
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError

from tinylora_jax.data import DataError, DataSpec, Question, load_questions, sources


@pytest.fixture
def hub(monkeypatch):
    """Replaces the hub's client by one that serves a tiny GSM8K; holds its calls, and what it raises."""

    class Hub:
        calls: list = []
        error: Exception | None = None

        def load(self, name, config, *, split):
            self.calls.append((name, config, split))
            if self.error is not None:
                raise self.error
            return datasets.Dataset.from_dict(
                {
                    "question": ["a?", "b?", "c?"],
                    "answer": ["#### 1,000", "#### 2", "#### 3"],
                    "level": [1, 2, 3],
                }
            )

    hub = Hub()
    hub.calls = []
    monkeypatch.setattr(datasets, "load_dataset", hub.load)
    return hub


def test_hub_data_set(hub):
    questions = load_questions(DataSpec("openai/gsm8k:main", split="test"))
    rows = (("a?", "1000", "#### 1,000"), ("b?", "2", "#### 2"), ("c?", "3", "#### 3"))
    assert questions == tuple(Question(i, *row) for i, row in enumerate(rows))
    assert load_questions(DataSpec("openai/gsm8k", start=1, limit=1)) == questions[1:2]
    assert load_questions(DataSpec("openai/gsm8k", start=1, limit=9)) == questions[1:]
    assert hub.calls[:2] == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", None, "train")]
    with pytest.raises(DataError, match="no rows from row 3"):
        load_questions(DataSpec("openai/gsm8k", start=3))


def test_hub_columns_are_named(hub):
    with pytest.raises(DataError, match="lacks column 'problem'; it has 'question', 'answer', 'level'"):
        load_questions(DataSpec("openai/gsm8k", question_column="problem"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach it"), "hub could not be reached.*HF_HUB_OFFLINE"),
        (datasets.exceptions.DatasetNotFoundError("does not exist"), "check the name"),
        (
            ValueError("BuilderConfig 'x' not found"),
            "BuilderConfig 'x' not found; check the name, its config",
        ),
        (datasets.exceptions.DatasetGenerationError("broken"), "cannot load"),
        (HTTPError("peer closed connection"), "the connection broke .*; check the network and run"),
        (
            datasets.exceptions.DatasetNotFoundError("'x' is a gated dataset on the Hub."),
            "accept the data set.s licence.*log in",
        ),
        (json.JSONDecodeError("Expecting value", "<html>", 0), "not come from the hub but, for example, from a proxy"),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer supported; check the name"),
    ],
)
def test_hub_failures_are_one_clear_error(hub, error, said):
    hub.error = error
    with pytest.raises(DataError, match=said):
        load_questions(DataSpec("openai/gsm8k:main"))


def test_reasoning_gym_is_deterministic_and_keyed_by_seed_and_split():
    pytest.importorskip("reasoning_gym")
    spec = DataSpec("reasoning-gym:chain_sum", limit=20)
    questions = load_questions(spec)
    assert len(questions) == 20 and questions == load_questions(spec)
    assert load_questions(DataSpec("reasoning-gym:chain_sum", start=5, limit=3)) == questions[5:8]
    asked = {q.question for q in questions}
    for other in (DataSpec(spec.source, split="test", limit=20), DataSpec(spec.source, seed=1, limit=20)):
        assert len(asked & {q.question for q in load_questions(other)}) < 3


def test_unknown_reasoning_gym_task_is_named_with_close_matches():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(DataError, match="no task 'chain_sums'; did you mean chain_sum"):
        load_questions(DataSpec("reasoning-gym:chain_sums"))


def test_missing_reasoning_gym_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r"pip install -e '.\[reasoning-gym\]"):
        load_questions(DataSpec("reasoning-gym:chain_sum"))


def test_a_cached_data_set_does_not_wait_for_a_hub_that_fails(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "_hub_problem", lambda name: "could not be reached within 5 s")
    seen, load = [], hub.load

    def loading(*args, **options):
        seen.append((constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        return load(*args, **options)

    monkeypatch.setattr(datasets, "load_dataset", loading)
    assert len(load_questions(DataSpec("openai/gsm8k:main"))) == 3
    assert seen == [(True, True)] and not constants.HF_HUB_OFFLINE
    hub.error = ConnectionError("not in the cache")
    with pytest.raises(DataError, match="hub could not be reached within 5 s, and its cache lacks it"):
        load_questions(DataSpec("openai/gsm8k:main"))
    assert seen[1:] == [(True, True)], "it is not asked again, which would take most of a minute"
