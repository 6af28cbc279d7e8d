"""Evaluation sets by name, from the hub or a folder."""

import gzip
import json

import pytest

from tinylora_jax.data import EVAL_SETS, DataError, load_questions, parse_suite
from tinylora_jax.rewards import load_reward


def write(path, rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_sets_have_names_and_graders_and_come_from_the_hub():
    found = parse_suite(", ".join(EVAL_SETS))
    assert [each.name for each in found] == ["gsm8k", "math500", "aime24", "amc23", "minerva", "olympiadbench"]
    assert all("/" in each.data.source and load_reward(each.reward) for each in found)
    assert [each.reward for each in found] == ["math"] * 4 + ["minerva", "math"]


def test_a_folder_stands_in_for_the_hub(tmp_path):
    rows = [{"question": "2?", "answer": "2", "error": None}, {"question": "4.2?", "answer": "4.2", "error": "1e-1"}]
    write(tmp_path / "gsm8k_test.jsonl.gz", rows[:1])
    write(tmp_path / "olympiadbench.jsonl", rows)
    first, second = parse_suite("gsm8k,olympiadbench@8", tmp_path)
    assert (first.samples, second.samples) == (None, 8)
    assert [q.answer for q in load_questions(first.data)] == ["2"]
    assert [q.answer for q in load_questions(second.data)] == ["2", "4.2 (tolerance 0.1)"]


def test_files_and_hub_ids_are_sets_of_their_own(tmp_path):
    found = parse_suite("my.jsonl@4,some/dir/a.parquet,owner/name:config", tmp_path)
    assert [each.name for each in found] == ["my.jsonl", "some/dir/a.parquet", "owner/name:config"]
    assert {each.reward for each in found} == {"math"} and found[0].samples == 4
    assert found[2].data.source == "owner/name:config" and found[2].data.split == "test"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gsm8", "unknown set 'gsm8'; did you mean gsm8k"),
        ("", "it is empty; expected names out of gsm8k"),
        ("gsm8k,gsm8k@4", "gsm8k is listed more than once"),
        ("gsm8k,math500", "none of gsm8k.jsonl.*; .* has none of math500.jsonl"),
        ("aime24@0", "'aime24@0': expected a number of samples from 1"),
    ],
)
def test_what_is_wrong_with_a_suite_is_said_at_once(text, said, tmp_path):
    with pytest.raises(DataError, match=said):
        parse_suite(text, None if "more than once" in said else tmp_path)
