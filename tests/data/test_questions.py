"""Loading questions: every source, and every way in which a file can be bad."""

import gzip
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tinylora_jax.data import DataError, DataSpec, Question, load_questions
from tinylora_jax.data.questions import final_answer

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"
ROWS = [{"question": f"What is {i}?", "answer": f"It is {i}.\n#### {i}", "extra": None} for i in range(5)]


def write_jsonl(path, rows=ROWS):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def write_parquet(path, rows=ROWS):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def pairs_of(questions):
    return [tuple(map(int, re.findall(r"\d+", q.question))) for q in questions]


def test_arithmetic_is_deterministic_correct_and_keyed_by_seed():
    spec = DataSpec("arithmetic")
    questions = load_questions(spec)
    assert len(questions) == 1024
    assert [q.id for q in questions] == list(range(1024))
    assert questions == load_questions(spec)
    assert questions != load_questions(replace(spec, seed=1))
    assert all(a + b == int(q.answer) for (a, b), q in zip(pairs_of(questions), questions, strict=True))


@pytest.mark.parametrize("below", [2, 7, 50])
def test_arithmetic_splits_partition_all_pairs(below):
    everything = 4 * below * below // 5
    train = pairs_of(load_questions(DataSpec("arithmetic", below=below, limit=everything)))
    test = pairs_of(load_questions(DataSpec("arithmetic", split="test", below=below)))
    assert sorted(train + test) == list(itertools.product(range(below), repeat=2))


def test_a_limit_of_zero_takes_all():
    """A flag can set it, where None cannot be written."""
    assert DataSpec("arithmetic", limit=0) == DataSpec("arithmetic", limit=None)
    assert len(load_questions(DataSpec("arithmetic", split="test", limit=0))) == 500


@pytest.mark.parametrize("start", [0, 3])
def test_start_and_limit_keep_ids(start, tmp_path):
    whole = {q.id: q for q in load_questions(DataSpec("arithmetic"))}
    part = load_questions(DataSpec("arithmetic", start=start, limit=7))
    assert [q.id for q in part] == list(range(start, start + 7))
    assert all(whole[q.id] == q for q in part)
    part = load_questions(DataSpec(write_jsonl(tmp_path / "a.jsonl"), start=start, limit=2))
    assert part == tuple(Question(i, f"What is {i}?", str(i), f"It is {i}.\n#### {i}") for i in (start, start + 1))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"split": "dev"}, "splits train and test"),
        ({"split": "test", "limit": 501}, "has 500 test questions, but rows 0 to 500 were requested"),
        ({"start": 1999, "limit": 2}, "has 2000 train questions"),
        ({"start": 2000}, "no rows from row 2000"),
        ({"below": 1}, "below in 2"),
        ({"limit": -1}, "limit >= 0"),
        ({"start": -1}, "start=-1"),
        ({"source": "arithmetics"}, "unknown data source 'arithmetics'"),
        ({"source": ""}, "non-empty source"),
        ({"source": "json"}, "or a hub id such as"),
        ({"source": "no/such/file.jsonl"}, "no such file"),
        ({"source": "no_such_file.parquet"}, "no such file"),
        ({"source": "a/b/c"}, "unknown data source"),
    ],
)
def test_impossible_specs_are_refused(fields, said):
    with pytest.raises(DataError, match=said):
        load_questions(DataSpec(**{"source": "arithmetic", **fields}))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_files_hold_the_same_questions(tmp_path, name):
    write = write_parquet if name.endswith("parquet") else write_jsonl
    expected = tuple(Question(i, f"What is {i}?", str(i), f"It is {i}.\n#### {i}") for i in range(5))
    assert load_questions(DataSpec(write(tmp_path / name))) == expected
    renamed = [{"problem": row["question"], "gold": row["answer"]} for row in ROWS]
    source = write(tmp_path / f"renamed_{name}", renamed)
    spec = DataSpec(source, question_column="problem", answer_column="gold")
    assert load_questions(spec) == expected
    with pytest.raises(DataError, match="lacks column 'answer'; it has 'problem', 'gold'"):
        load_questions(replace(spec, answer_column="answer"))


def test_solutions_have_a_column_of_their_own(tmp_path):
    rows = [{"question": f"q{i}", "answer": str(i), "solution": f"so {i}"} for i in range(3)]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    assert [q.solution for q in load_questions(DataSpec(source))] == [None] * 3
    found = load_questions(DataSpec(source, solution_column="solution", start=1))
    assert found == (Question(1, "q1", "1", "so 1"), Question(2, "q2", "2", "so 2"))
    with pytest.raises(DataError, match="lacks column 'worked'"):
        load_questions(DataSpec(source, solution_column="worked"))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("72", "72"),
        ("work\n#### 72", "72"),
        ("#### 1,234,567", "1234567"),
        ("#### (1, 2)", "(1, 2)"),
        ("#### 1 #### 2", "2"),
        ("1,000", "1,000"),
    ],
)
def test_final_answer(answer, expected):
    assert final_answer(answer) == expected


@pytest.mark.parametrize(("answer", "expected"), [(7, "7"), (27.5, "27.5"), (" x ", "x")])
def test_plain_values_become_text(tmp_path, answer, expected):
    source = write_jsonl(tmp_path / "a.jsonl", [{"question": "\nq ", "answer": answer}])
    assert load_questions(DataSpec(source)) == (Question(0, "q", expected),)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"question": "", "answer": "1"}, "row 2: column 'question' is empty"),
        ({"question": "q", "answer": "  "}, "row 2: column 'answer' is empty"),
        ({"question": "q", "answer": "so\n####"}, "row 2: nothing follows '####'"),
        ({"question": "q", "answer": None}, "row 2: column 'answer' is null"),
        ({"question": "q", "answer": [1]}, "row 2: column 'answer' is of type list"),
        ({"question": "q", "answer": []}, "row 2: column 'answer' is of type list"),
        ({"question": "q", "answer": True}, "row 2: column 'answer' is of type bool"),
        ({"question": "q", "answer": float("nan")}, "row 2: column 'answer' is of type float"),
        (
            {"question": "q\ud800", "answer": "1"},
            "row 2: column 'question' contains a lone surrogate at character 1",
        ),
        ({"question": "q"}, "row 2, lacks column 'answer'; it has 'question'"),
    ],
)
def test_bad_rows_are_named(tmp_path, bad, said):
    source = write_jsonl(tmp_path / "a.jsonl", [*ROWS[:2], bad, ROWS[2]])
    with pytest.raises(DataError, match=re.escape(said)):
        load_questions(DataSpec(source))


def test_all_bad_rows_are_counted_and_the_first_named(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": ""}] * 9)
    with pytest.raises(DataError, match="9 unusable rows: row 0: .* row 4: .*empty; ..."):
        load_questions(DataSpec(source))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{'question': 1}", "line 3: not valid JSON"),
        (b'{"question": "q", "ans', "line 3: not valid JSON"),
        (b'["question"]', "line 3: expected a JSON object, got list"),
        (b"\xff\xfe", "line 3: not valid JSON"),
        (b"[" * 100_000, "line 3: not valid JSON"),
        (b'{"question": ' + b"1" * 5000 + b"}", "line 3: not valid JSON"),
        (b" " * (1 << 24) + b"{}", "line 3: longer than"),
    ],
    ids=["quotes", "cut", "list", "utf-8", "nesting", "integer", "long"],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_corrupt_line_is_named(tmp_path, line, said, suffix):
    good = json.dumps(ROWS[0]).encode()
    data = b"\n".join([good, good, line, good])
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(data, 1) if suffix.endswith(".gz") else data)
    with pytest.raises(DataError, match=said) as caught:
        load_questions(DataSpec(str(path)))
    assert path.name in str(caught.value)


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    row = json.dumps(ROWS[0]).encode()
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\n  \n" + row)
    assert [q.id for q in load_questions(DataSpec(str(path)))] == [0, 1]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b[:40], lambda b: b"plain", lambda b: b[:30] + b"x" + b[31:]]
)
def test_damaged_gzip_is_named(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    write_jsonl(path, ROWS * 50)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
        load_questions(DataSpec(str(path)))


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-9], lambda b: b"plain text, not parquet"])
def test_damaged_parquet_is_named(tmp_path, damage):
    path = tmp_path / "a.parquet"
    write_parquet(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        load_questions(DataSpec(str(path)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_no_rows_is_an_error(tmp_path, name):
    with pytest.raises(DataError, match="no rows"):
        load_questions(DataSpec(write_jsonl(tmp_path / name, [])))


def test_unsupported_file_and_folder_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\n")
    for source in (tmp_path / "a.csv", tmp_path):
        with pytest.raises(DataError, match="unknown data source"):
            load_questions(DataSpec(str(source)))


@pytest.mark.parametrize(("file", "rows"), [("gsm8k_test", 1319), ("math500", 500), ("aime24", 30)])
def test_shared_data_loads(file, rows):
    path = SHARED_DATA / f"{file}.jsonl.gz"
    if not path.exists():
        pytest.skip("needs ../shared/data")
    assert len(load_questions(DataSpec(str(path)))) == rows


def test_a_list_is_several_answers_and_a_tolerance_stands_behind_them(tmp_path):
    rows = [
        {"question": "a", "final_answer": ["$2$"], "error": None},
        {"question": "b", "final_answer": ["1", "-1"], "error": ""},
        {"question": "c", "final_answer": ["4.2"], "error": "1e-1"},
    ]
    spec = DataSpec(write_jsonl(tmp_path / "a.jsonl", rows), answer_column="final_answer", tolerance_column="error")
    assert [q.answer for q in load_questions(spec)] == ["$2$", "1, -1", "4.2 (tolerance 0.1)"]
    for bad in ("much", -1, float("inf")):
        write_jsonl(tmp_path / "a.jsonl", [rows[0] | {"error": bad}])
        with pytest.raises(DataError, match="row 0: column 'error' is .*, expected a number >= 0"):
            load_questions(spec)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_rows_are_kept_by_a_column(tmp_path, write):
    rows = [{"question": f"{i}?", "answer": str(i), "level": i % 4, "error": None} for i in range(8)]
    source = write(tmp_path / f"a.{'jsonl' if write is write_jsonl else 'parquet'}", rows)
    assert [q.id for q in load_questions(DataSpec(source, keep="level=1, 3", tolerance_column="error"))] == [1, 3, 5, 7]
    with pytest.raises(DataError, match="has no rows with level=9"):
        load_questions(DataSpec(source, keep="level=9"))
    with pytest.raises(DataError, match="lacks column 'difficulty'"):
        load_questions(DataSpec(source, keep="difficulty=1"))
    for bad in ("level", "=3", "level=", "a,b=1"):
        with pytest.raises(DataError, match="keep like 'level=3,4,5'"):
            DataSpec(source, keep=bad)


def peak_of(source, **options):
    """The error of loading a source in a process of its own, and how many MB it and its children took for it."""
    code = (
        "import resource, sys, pyarrow.parquet, pyarrow.compute\n"
        "from tinylora_jax.data import DataError, DataSpec, load_questions\n"
        "peak = lambda: sum(resource.getrusage(who).ru_maxrss // 1024 for who in (0, resource.RUSAGE_CHILDREN))\n"
        "before, said = peak(), 'nothing'\n"
        f"try: load_questions(DataSpec({source!r}, **{options!r}))\n"
        "except DataError as error: said = str(error)\n"
        "print(peak() - before); print(said)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    grown, said = result.stdout.splitlines()
    return int(grown), said


def test_a_parquet_bomb_is_refused_before_it_goes_off(tmp_path):
    text = pyarrow.array(["x" * (1 << 20)] * 1000).dictionary_encode()
    table = pyarrow.table({"question": text, "answer": ["1"] * 1000})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 19
    for options in ({}, {"limit": 4}):
        grown, said = peak_of(str(tmp_path / "a.parquet"), **options)
        assert "too large for a file of questions" in said and grown < 300


def test_a_parquet_file_of_long_pages_is_refused(tmp_path):
    table = pyarrow.table({"question": ["x" * (1 << 20)] * 200, "answer": ["1"] * 200})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    grown, said = peak_of(str(tmp_path / "a.parquet"))
    assert "too large for a file of questions" in said and grown < 300


@pytest.mark.slow
def test_a_parquet_file_that_lies_about_its_size_is_refused(tmp_path):
    """Its one text has 400 MB, and its metadata say 1000 bytes wherever they speak of the size."""
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"question": ["x" * (400 << 20)], "answer": ["1"]})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
    data = path.read_bytes()
    for size in {group.total_byte_size, group.column(0).total_uncompressed_size}:
        written = varint(2 * size)
        data = data.replace(written, b"\xd0\x8f" + b"\x80" * (len(written) - 3) + b"\x00")
    path.write_bytes(data)
    assert pyarrow.parquet.ParquetFile(path).metadata.row_group(0).total_byte_size == 1000
    grown, said = peak_of(str(path))
    assert "too large for a file of questions" in said and grown < 500


def varint(number):
    """A whole number in groups of seven bits, as Thrift writes it."""
    groups = [number >> place & 127 for place in range(0, number.bit_length(), 7)]
    return bytes([each | 128 for each in groups[:-1]] + groups[-1:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blank", pytest.param("rows", marks=pytest.mark.slow), "fields"])
def test_a_small_archive_of_many_bytes_is_refused(tmp_path, kind):
    row = {"blank": b"\n", "rows": b'{"question": "1", "answer": "1"}\n', "fields": b"[" * (1 << 23) + b"\n"}[kind]
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", 9) as file:
        for _ in range(200):
            file.write(row * max(1, (1 << 20) // len(row)))
    grown, said = peak_of(str(tmp_path / "a.jsonl.gz"))
    assert "too large for a file of questions" in said or "longer than" in said, said
    assert grown < 2000


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e400", "NaN", "1" * 5000])
def test_numbers_beyond_all_bounds_are_one_error(tmp_path, number):
    (tmp_path / "a.jsonl").write_text(f'{{"question": "a?", "answer": {number}}}\n')
    with pytest.raises(DataError, match="column 'answer'|not valid JSON"):
        load_questions(DataSpec(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_what_is_no_file_is_refused_at_once(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    os.mkfifo(path)
    with pytest.raises(DataError, match="is a named pipe, expected a file"):
        load_questions(DataSpec(str(path)))
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match="is a device, expected a file"):
        load_questions(DataSpec(str(path)))


def test_variables_in_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("QUESTIONS", str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl")
    assert len(load_questions(DataSpec("$QUESTIONS/a.jsonl"))) == 5
    with pytest.raises(DataError, match="the variable .NOWHERE is not set"):
        load_questions(DataSpec("$NOWHERE/a.jsonl"))
