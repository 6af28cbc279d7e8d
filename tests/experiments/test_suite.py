"""A suite: several sets, one model, one table; and the comparison of two of its results."""

import json
from types import SimpleNamespace

import pytest

from experiments import compare as comparison
from experiments import evaluate as cli
from experiments.common.eval_metrics import accuracy_table, sampled_summary, summary
from experiments.common.specs import ConfigError
from experiments.compare import CompareError, compare, read
from tinylora_jax.data import DataError, parse_suite
from tinylora_jax.metrics import estimate


def row(number, sample, strict, lenient, found="1", **more):
    fields = {
        "mode": "sampled",
        "id": number,
        "sample": sample,
        "question": f"{number}?",
        "answer": "1",
        "found": found,
    }
    return {**fields, "strict": strict, "lenient": lenient, "tokens": 4, "stopped": sample != 1, **more}


# Two questions, four samples each: of the first two are right, of the second one.
SAMPLED = [
    row(0, 0, 1.0, 1.0, "7"),
    row(0, 1, 1.0, 1.0, "7.0"),
    row(0, 2, 0.0, 0.0, "8"),
    row(0, 3, 0.0, 0.0, None),
    row(1, 0, 0.0, 1.0, "5"),
    row(1, 1, 0.0, 0.0, "4"),
    row(1, 2, 0.0, 0.0, "4"),
    row(1, 3, 1.0, 1.0, "5"),
]


def test_scores_of_samples_by_hand():
    found = sampled_summary(SAMPLED, 4)
    assert (found["strict"], found["lenient"]) == (0.375, 0.5)
    interval = estimate([0.5, 0.25], 4)
    assert found["strict_interval"] == [round(interval.low, 6), round(interval.high, 6)]
    # The first question's majority is 7, right; the second's is 5 or 4, and of the fives one is strictly right.
    assert (found["majority"]["strict"], found["majority"]["lenient"]) == (0.625, 0.75)
    passed = {k: each["strict"] for k, each in found["pass"].items()}
    assert passed == {"1": 0.375, "2": round(((1 - 1 / 6) + (1 - 3 / 6)) / 2, 6), "4": 1.0}
    assert (found["mean_tokens"], found["truncated"]) == (4, 0.25)


def test_grades_that_are_no_right_or_wrong_have_means_alone():
    rows = [each | {"strict": 2.5, "lenient": 0.5} for each in SAMPLED]
    found = sampled_summary(rows, 4)
    assert (found["strict"], found["strict_interval"]) == (2.5, None) and "pass" not in found
    assert "250.0" in accuracy_table({"a": {"questions": 2, **summary(rows, 4), "sampled": {"samples": 4, **found}}})


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder with two small sets."""
    folder = tmp_path_factory.mktemp("sets")
    for name, answers in (("gsm8k", ["3", "7"]), ("math500", [r"\frac{1}{2}", "x+1", "2"])):
        rows = [{"question": f"What is {answer}?", "answer": answer} for answer in answers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder


@pytest.fixture
def boxed(config):
    config.template = "boxed"
    return config


@pytest.fixture
def evaluated(boxed, sets, tmp_path, monkeypatch, capsys, one_host):
    """Runs the command on the two sets: `(name, **changes of the config)` to the path of the result."""

    def run(name, adapter=None, suite="gsm8k,math500@3", suite_folder=str(sets), **changes):
        for field, value in changes.items():
            setattr(boxed, field, value)
        path = tmp_path / f"{name}.json"
        files = {"adapter": adapter, "output": str(path), "suite": suite, "suite_folder": suite_folder, "correct": None}
        files |= {"transfer": False}
        monkeypatch.setattr(cli, "FLAGS", SimpleNamespace(config=boxed, **files, **one_host), raising=False)
        cli.main([])
        return path, capsys.readouterr()

    return run


def test_a_suite_is_evaluated_with_one_model_and_told_in_one_table(evaluated, finished, monkeypatch):
    loads = []
    load = cli.load_task
    monkeypatch.setattr(cli, "load_task", lambda *arguments: loads.append(1) or load(*arguments))
    path, said = evaluated("trained", str(finished.workdir / "adapter"))
    result = json.loads(said.out.splitlines()[-1])
    assert result == json.loads(path.read_text()) and loads == [1]
    assert {name: each["questions"] for name, each in result["sets"].items()} == {"gsm8k": 2, "math500": 3}
    assert [each["sampled"]["samples"] for each in result["sets"].values()] == [1, 3]
    assert all(each["reward"] == "math" for each in result["sets"].values()) and result["template"] == "boxed"
    rows = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert [each["set"] for each in rows] == ["gsm8k"] * 4 + ["math500"] * 12
    lines = said.err.splitlines()
    head = next(number for number, line in enumerate(lines) if line.split()[:2] == ["strict", "[95"])
    ways = ["gsm8k: 2", "greedy", "avg@1", "math500: 3", "greedy", "avg@3", "maj@3", "pass@3", ""]
    assert all(way in line for way, line in zip(ways, lines[head + 1 :], strict=False))
    assert max(map(len, lines[head : head + len(ways)])) <= 80


@pytest.mark.slow
def test_questions_of_each_set_can_be_limited(evaluated, boxed):
    boxed.eval_data.limit = 1
    path, _ = evaluated("few")
    assert [each["questions"] for each in json.loads(path.read_text())["sets"].values()] == [1, 1]


def test_a_prompt_that_asks_for_no_box_is_refused(config, sets):
    with pytest.raises(ConfigError, match="add --config.template=boxed"):
        cli.run(config, None, parse_suite("gsm8k", sets))


def test_a_suite_is_compared_with_itself(evaluated, finished, monkeypatch, capsys):
    base, _ = evaluated("base")
    trained, _ = evaluated("trained", str(finished.workdir / "adapter"))
    comparison.main(["compare", str(base), str(trained.with_suffix(".jsonl"))])
    said = capsys.readouterr()
    found = json.loads(said.out.splitlines()[-1])["sets"]
    assert {name: sorted(modes) for name, modes in found.items()} == {
        n: ["greedy", "sampled"] for n in ("gsm8k", "math500")
    }
    each = found["math500"]["greedy"]["strict"]
    assert each["test"] == "McNemar, exact" and each["value"] == 0 and each["p"] == 1 and "McNemar" in said.err
    accuracy = json.loads(trained.read_text())["sets"]["math500"]["strict"]
    assert each["first"] == each["second"] == pytest.approx(accuracy)
    shown = f"{100 * accuracy:.1f}"
    assert f"{shown} → {shown} %" in said.err


@pytest.fixture
def results(tmp_path):
    """Writes a result by hand: `(name, rows, **changes of the result)` to its evaluation."""

    def write(name, rows, **changes):
        path = tmp_path / f"{name}.json"
        about = {"template": "boxed", "reward": "math", "max_new_tokens": 6, "data": "mine"}
        path.write_text(json.dumps(about | {"sampled": {"samples": 2, "temperature": 1.0}} | changes))
        lines = [json.dumps({"set": "mine", **each}) + "\n" for each in rows]
        path.with_suffix(".jsonl").write_text("".join(lines))
        return read(path)

    return write


def answers(greedy, sampled):
    rows = [row(i, 0, grade, 1.0, mode="greedy") for i, grade in enumerate(greedy)]
    return rows + [row(i, j, grade, 1.0) for i, pair in enumerate(sampled) for j, grade in enumerate(pair)]


def test_differences_by_hand(results):
    first = results("a", answers([0.0] * 6 + [1.0] * 2, [(0.0, 0.0)] * 8))
    second = results("b", answers([1.0] * 6 + [1.0, 0.0], [(0.0, 1.0)] * 8)[::-1])  # in any order
    found = compare(first, second)["mine"]
    greedy, sampled = found["greedy"]["strict"], found["sampled"]["strict"]
    assert (greedy.value, greedy.better, greedy.worse) == (5 / 8, 6, 1) and greedy.p == pytest.approx(2 * 8 / 2**7)
    assert sampled.value == 0.5 and sampled.p == pytest.approx(2 / 2**8) and sampled.test == "permutation"
    assert found["greedy"]["lenient"].value == 0
    assert compare(second, first)["mine"]["greedy"]["strict"].value == -5 / 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"template": "plain"},
            "template is 'boxed' in .*a.json and 'plain' in .*b.json; evaluate both with the same",
        ),
        ({"reward": "boxed"}, "reward of mine is 'math'"),
        ({"data": "other"}, "reward of mine is 'math' in .*a.json and None"),
    ],
)
def test_other_prompts_and_graders_are_refused(results, changes, said):
    rows = answers([1.0, 0.0], [(0.0, 1.0)] * 2)
    with pytest.raises(CompareError, match=said):
        compare(results("a", rows), results("b", rows, **changes))


def test_other_questions_are_refused(results):
    rows = answers([1.0, 0.0], [(0.0, 1.0)] * 2)
    for other in (rows[:1], [*rows, row(5, 0, 1.0, 1.0)], [each | {"answer": "9"} for each in rows]):
        with pytest.raises(CompareError, match="have different questions: [12] differ or are in only one"):
            compare(results("a", rows), results("b", other))


def test_damaged_and_missing_results_are_named(results, tmp_path, capsys):
    rows = answers([1.0], [])
    for bad, said in (
        ({"strict": "1"}, "row 1: expected finite grades"),
        ({"strict": float("nan")}, "row 1: expected finite grades"),
        ({"id": "0"}, "row 1: id, set, mode, question or answer has the wrong type"),
    ):
        with pytest.raises(DataError, match=said):
            results("a", [rows[0] | bad])
    with pytest.raises(DataError, match="row 1: it has no 'answer'"):
        results("a", [{name: value for name, value in rows[0].items() if name != "answer"}])
    with pytest.raises(DataError, match="row 2: id 0 is used for two questions"):
        results("a", [rows[0], rows[0] | {"question": "other?"}])
    for text, said in (
        ("{", "not a result of"),
        ("[]", "not a result of"),
        ('{"data": "mine"}', "it has no 'template'"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(CompareError, match=said):
            read(tmp_path / "a.json")
    with pytest.raises(SystemExit):
        comparison.main(["compare", str(tmp_path / "none.json"), str(tmp_path / "a.json")])
    assert "none.json: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        comparison.main(["compare"])
    assert "expected two results or workdirs" in capsys.readouterr().err


def test_a_workdir_is_compared_with_its_untrained_model(finished, capsys):
    def said(*names):
        comparison.main(["compare", *map(str, names)])
        return capsys.readouterr()

    alone = said(finished.workdir)
    (found,) = json.loads(alone.out)["sets"].values()
    strict = found["greedy"]["strict"]
    for name, which in (("first", "eval_before"), ("second", "eval_after")):
        assert strict[name] == pytest.approx(finished.summary[which]["strict"], abs=1e-6)
    assert f"--adapter={finished.workdir / 'adapter'}" in alone.err and "--adapter=base" in alone.err
    files = [finished.workdir / f"answers_{which}.jsonl" for which in ("before", "after")]
    assert json.loads(said(*files).out) == json.loads(alone.out)
    (same,) = json.loads(said(files[1], finished.workdir).out)["sets"].values()
    assert same["greedy"]["strict"]["value"] == 0


def test_a_run_is_compared_with_an_evaluation(evaluated, finished, boxed, capsys):
    boxed.template = "arithmetic"
    path, _ = evaluated("alone", str(finished.workdir / "adapter"), suite=None, suite_folder=None)
    comparison.main(["compare", str(finished.workdir), str(path)])
    (found,) = json.loads(capsys.readouterr().out)["sets"].values()
    assert found["greedy"]["strict"]["value"] == 0 and found["greedy"]["strict"]["p"] == 1


def test_members_share_the_untrained_answers(finished, tmp_path):
    member = tmp_path / "members" / "seed=0"
    member.mkdir(parents=True)
    for name in ("config.json", "answers_after.jsonl"):
        (member / name).write_bytes((finished.workdir / name).read_bytes())
    with pytest.raises(CompareError, match="answers_before.jsonl: no such file; the run is not finished"):
        comparison.read_before(member)
    (tmp_path / "answers_before.jsonl").write_bytes((finished.workdir / "answers_before.jsonl").read_bytes())
    (tmp_path / "config.json").write_bytes((finished.workdir / "config.json").read_bytes())
    assert comparison.read_before(member).asked == comparison.read(member).asked
    with pytest.raises(CompareError, match=f"name a member, such as {member}"):
        comparison.read(tmp_path)
    with pytest.raises(CompareError, match="is not the workdir of a run: it has no config.json"):
        comparison.read(tmp_path / "members")
