"""What imports what: the islands stay islands, and arrows between the parts go one way."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import entangle
import experiments

PACKAGE = Path(entangle.__file__).parent
# A part may import itself and those before it; the islands need jax and optax alone.
ORDER = (
    "types",
    "errors",
    "extras",
    "distributed",
    "command_line",
    "paths",
    "jaxprs",
    "sharding",
    "data",
    "models",
    "losses",
    "geometry",
    "transforms",
    "training",
    "plan",
)
EXPERIMENTS = Path(experiments.__file__).parent
WALLS = {"pairs": set(), "theorems": set(), "sweep": {"pairs"}, "reports": {"sweep", "theorems"}}
"""Folder of experiments -> the others that it may import. What one runs is beside them and may import all."""
ISLANDS = ("losses", "geometry", "transforms")
# numpy comes with jax
BASE = {"jax", "numpy", "optax", "entangle"} | set(sys.stdlib_module_names)
FOREIGN = ("flax", "orbax", "tensorflow", "tensorflow_datasets", "wandb", "ray", "tokenizers", "matplotlib", "grain")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(part):
    return [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").exists() else sorted((PACKAGE / part).glob("*.py"))


def test_islands_load_nothing_else():
    code = "import sys, json, entangle.losses, entangle.geometry, entangle.transforms; print(json.dumps(list(sys.modules)))"
    done = run(code)
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & set(FOREIGN)


def test_every_part_has_its_place():
    found = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p.is_dir() and (p / "__init__.py").exists())}
    assert found - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("part", ORDER)
def test_imports_go_leftward(part):
    for file in files(part):
        for name in imported(file):
            root, _, rest = name.partition(".")
            assert root != "experiments", f"{file} imports {name}"
            if root == "entangle":
                other = rest.split(".")[0]
                assert ORDER.index(other) <= ORDER.index(part), f"{file} imports {name}, which is to its right"


@pytest.mark.parametrize("folder", WALLS)
def test_folders_of_experiments_import_one_way(folder):
    known = {p.parent.name for p in EXPERIMENTS.glob("*/__init__.py")}
    assert known == set(WALLS)
    for file in (EXPERIMENTS / folder).glob("*.py"):
        others = {name.split(".")[1] for name in imported(file) if name.startswith("experiments.")} & known
        assert others <= WALLS[folder] | {folder}, f"{file} imports {others - WALLS[folder] - {folder}}"


@pytest.mark.parametrize("part", ISLANDS)
def test_islands_import_jax_and_optax_only(part):
    for file in files(part):
        roots = {name.split(".")[0] for name in imported(file)}
        assert roots <= BASE, f"{file}: {roots - BASE}"
        parts = {name.split(".")[1] for name in imported(file) if name.startswith("entangle.")}
        assert not parts & {"data", "models", "training"}


@pytest.mark.parametrize(("part", "module"), [("models", "flax"), ("data", "grain"), ("training", "orbax")])
def test_a_missing_extra_is_named(part, module):
    hide = f"import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == {module!r} else f(n, *a)"
    done = run(f"{hide}\nimport entangle.{part}")
    assert done.returncode != 0
    assert f'MissingExtraError: {module} not installed: it comes with the extra "train"' in done.stderr


def test_an_experiment_without_its_extra_ends_in_one_line():
    hide = (
        "import importlib.util as u, sys; f = u.find_spec; "
        "u.find_spec = lambda n, *a: None if n == 'tyro' else f(n, *a); sys.argv = ['-m']; "
    )
    done = run(f"{hide}import experiments")
    assert done.returncode == 2
    assert done.stderr.startswith('error: tyro not installed: it comes with the extra "train": scripts/setup train')
    assert done.stderr.count("\n") == 1
