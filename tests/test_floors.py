"""Imports only go down, and importing the library touches no device."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "tinylora_jax"

# What each floor may import of the others.
BELOW = {
    "adapters": set(),
    "rewards": set(),
    "metrics": set(),
    "data": {"rewards"},
    "models": {"adapters"},
    "io": {"adapters", "models"},
    "rollout": {"adapters", "models"},
    "training": {"adapters", "models"},
    "rl": {"adapters", "data", "models", "rewards", "rollout", "training"},
}
GROUND = {"extras", "files", "hub", "multihost", "stores"}  # modules: `hub` needs huggingface_hub, `multihost` JAX
# The library without what a floor above needs: all that `import tinylora_jax` may ask for is JAX and its own needs.
FOR_OTHERS = (
    *("absl", "datasets", "etils", "flax", "gguf", "grain", "jinja2", "matplotlib", "ml_collections", "optax"),
    *("orbax", "safetensors", "tensorboardX", "threadpoolctl", "tqdm", "transformers"),
)
# What must not be needed to use a floor.
WITHOUT = {
    "adapters": {"flax", "optax", "transformers", "datasets"},
    "rewards": {"jax", "jaxlib", "flax", "optax", "transformers", "datasets"},
    "metrics": {"jax", "jaxlib", "flax", "optax", "transformers", "datasets"},
    "data": {"jax", "jaxlib", "flax", "optax"},
    "models": {"transformers", "datasets", "optax"},
    "rollout": {"transformers", "datasets", "optax"},
    "training": {"transformers", "datasets"},
    "rl": {"transformers", "datasets"},
}


def imports(path):
    """Dotted names of every import of a file, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def files(*folders):
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


def test_every_package_has_its_floor():
    packages = {path.parent.name for path in (ROOT / LIBRARY).glob("*/__init__.py")}
    assert packages == set(BELOW)


@pytest.mark.parametrize("floor", BELOW)
def test_imports_go_down(floor):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(f"{LIBRARY}/{floor}")
        for name in sorted(imports(path))
        if name.split(".")[0] in (LIBRARY, "experiments", "tests")
        and (name.split(".") + [""])[1] not in BELOW[floor] | {floor} | GROUND
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("floor", WITHOUT)
def test_floors_do_without(floor):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(f"{LIBRARY}/{floor}")
        for name in sorted(imports(path))
        if name.split(".")[0] in WITHOUT[floor]
    ]
    assert not wrong, wrong


def test_torch_is_an_oracle_of_the_tests_alone():
    banned = {"torch", "tensorflow", "peft", "tunix", "qwix", "pickle", "dill", "joblib", "tests", "pytest"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(LIBRARY, "experiments")
        if path.name not in ("peers.py", "tunix_peer.py", "peft_logits.py")  # which measure them
        for name in sorted(imports(path))
        if name.split(".")[0] in banned
    ]
    assert not wrong, wrong


def is_public(module):
    """Whether others import from it: a package, or a module beside the floors."""
    return (ROOT / module.replace(".", "/")).is_dir() or module.removeprefix(f"{LIBRARY}.") in GROUND


def imported_modules(source):
    """The modules of the library that Python source imports from."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == LIBRARY:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == LIBRARY)


def test_experiments_and_notebooks_import_what_is_public():
    sources = {path: path.read_text(encoding="utf-8") for path in files("experiments")}
    for path in sorted((ROOT / "colab").glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        lines = [
            line
            for cell in cells
            for line in "".join(cell["source"]).splitlines()
            if not line.lstrip().startswith(("%", "!"))
        ]
        sources[path] = "\n".join(lines)
    wrong = [
        f"{path.relative_to(ROOT)} imports from {module}"
        for path, source in sources.items()
        for module in imported_modules(source)
        if not is_public(module)
    ]
    assert not wrong, wrong


def test_the_library_needs_jax_alone():
    code = f"""
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {FOR_OTHERS!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import {LIBRARY}
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_no_cycle_between_floors():
    done = set()
    while len(done) < len(BELOW):
        ready = {floor for floor, below in BELOW.items() if floor not in done and below <= done}
        assert ready
        done |= ready


def test_importing_the_library_touches_nothing():
    code = f"""
import logging, sys, warnings
handlers, level, filters = list(logging.root.handlers), logging.root.level, list(warnings.filters)
import jax
import {LIBRARY}
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
heavy = {{"torch", "transformers", "datasets", "tensorflow", "flax", "orbax", "experiments"}} & set(sys.modules)
assert not heavy, heavy
assert list(logging.root.handlers) == handlers and logging.root.level == level
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_importing_any_module_starts_no_backend():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files(LIBRARY, "experiments")]
    modules = [name.removesuffix(".__init__") for name in modules]
    code = f"""
import importlib
from jax._src import xla_bridge
for name in {modules!r}:
    importlib.import_module(name)
    assert not xla_bridge._backends, name
import sys
assert "matplotlib" not in sys.modules, "only drawing needs it"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
