"""Docstrings read well: each file opens with one complete phrase, and entries are noun phrases."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for top in ("tinylora_jax", "experiments") for path in (ROOT / top).rglob("*.py"))
FRAGMENTS = 0  # entries that begin with "of", "the same" or "its": this number may only fall


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_first_line_says_what_the_file_is_for(path):
    lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
    assert lines, "no docstring"
    assert len(lines[0]) <= 100 and lines[0].endswith("."), lines[0]
    assert len(lines) == 1 or not lines[1], "the first line must be a phrase of its own"


def entries(docstring):
    """The entries of a docstring's Args and Attributes, as (name, text)."""
    section = ""
    for line in docstring.splitlines():
        if line and not line.startswith(" "):
            section = line
        entry = re.match(r"  (\*{0,2}\w+): (.*)", line)
        if entry and section in ("Args:", "Attributes:"):
            yield entry.groups()


def test_entries_are_noun_phrases():
    documented = ast.Module, ast.ClassDef, ast.FunctionDef
    found = [
        f"{path.relative_to(ROOT)}: {name}: {text}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, documented)
        for name, text in entries(ast.get_docstring(node) or "")
        if text.startswith(("of ", "the same", "its "))
    ]
    assert len(found) <= FRAGMENTS, "\n".join(found)
