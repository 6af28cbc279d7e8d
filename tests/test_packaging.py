"""`pip install -e` makes the commands importable in any folder; a wheel holds the library alone."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("setuptools", minversion="68")


def build(folder, kind):
    """The wheel of that kind, from a copy of the files that packaging reads."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for package in ("tinylora_jax", "experiments"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (found,) = folder.glob("*.whl")
    return zipfile.ZipFile(found)


def test_an_editable_install_finds_the_commands_from_any_folder(tmp_path):
    (tmp_path / "checkout").mkdir()
    build(tmp_path / "checkout", "editable").extractall(tmp_path / "site")
    (link,) = (tmp_path / "site").glob("*.pth")
    code = f"import sys; sys.path.append({str(tmp_path / 'site')!r}); {link.read_text().strip()}\n"
    code += "import experiments.common.wording as found; print(found.__file__)"
    ran = subprocess.run([sys.executable, "-S", "-c", code], cwd="/", env={}, capture_output=True, text=True)
    assert ran.stdout.strip() == str(tmp_path / "checkout" / "experiments" / "common" / "wording.py"), ran.stderr


def test_a_wheel_holds_the_library_alone(tmp_path):
    names = {name.split("/")[0] for name in build(tmp_path, "wheel").namelist()}
    assert "tinylora_jax" in names and "experiments" not in names
