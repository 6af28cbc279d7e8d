"""Sources behind optional packages and the network: reasoning-gym, and the hub with its client replaced."""

import sys

import datasets
import pytest

from tinylora_jax.data import DataError, DataSpec, Question, load_questions


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
    with pytest.raises(DataError, match="pip install 'reasoning-gym"):
        load_questions(DataSpec("reasoning-gym:chain_sum"))
