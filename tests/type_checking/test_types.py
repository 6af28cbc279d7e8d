"""The annotations of the public API are right for who uses them, and a type checker finds no error where it looks."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def check(*arguments):
    command = [sys.executable, "-m", "mypy", "--cache-dir", "/dev/null", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_library_and_what_a_user_writes(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from tinylora_jax import TinyLoRA\n\nTinyLoRA(rank='two')\n")
    found = check("tinylora_jax", Path(__file__).with_name("user_code.py"), wrong)
    errors = [line for line in found.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 1 and "wrong.py:3" in errors[0], found.stdout + found.stderr


def test_users_of_the_installed_package_get_its_types():
    assert (ROOT / "tinylora_jax" / "py.typed").is_file()
    assert "py.typed" in (ROOT / "setup.py").read_text(encoding="utf-8")
