"""The islands in somebody else's project: programs that know the wheel and their own model library, and nothing else."""

import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROGRAMS = Path(__file__).parent / "foreign"
LIBRARIES = {"plain_dict": (), "linen_model": ("flax",), "equinox_model": ("equinox",)}
# What the islands must do without, even where a model library happens to bring it, as flax brings orbax.
NEVER = {"orbax", "tensorstore", "experiments", "entangle.data", "entangle.models", "entangle.training"}

# Under -I and -S nothing is on the path but the standard library: not this checkout, nor the finder that its editable
# installation puts there. A module that is None in sys.modules cannot be imported.
START = """
import json, runpy, sys
program, wheel, libraries, fenced_off = json.loads(sys.argv[1])
sys.path[:] = [wheel, *sys.path, *libraries]
sys.modules.update(dict.fromkeys(fenced_off))
runpy.run_path(program, run_name="__main__")
ours = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "entangle" and module]
print(json.dumps([sys.path, ours]))
"""


@functools.cache
def installed_with(*requirements):
    """What pip brings for these requirements, themselves included."""
    found, ahead = set(), [Requirement(text) for text in requirements]
    while ahead:
        requirement = ahead.pop()
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            ahead += [Requirement(text) for text in importlib.metadata.requires(name) or ()]
    return found


def fenced_off(distributions):
    """Every installed module that none of the distributions brings."""
    modules = importlib.metadata.packages_distributions()
    foreign = {name for name, owners in modules.items() if not {canonicalize_name(o) for o in owners} & distributions}
    return (foreign | NEVER) - {"entangle"} - set(sys.stdlib_module_names)


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_apart(program, unpacked, libraries, cwd):
    (info,) = unpacked.glob("*.dist-info")
    base = [r for r in importlib.metadata.Distribution.at(info).requires if "extra ==" not in r]
    allowed = installed_with(*base, *libraries)
    folders = sorted({str(importlib.metadata.distribution(name).locate_file("")) for name in allowed})
    words = json.dumps([str(program), str(unpacked), folders, sorted(fenced_off(allowed))])
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", START, words], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def test_every_program_is_run():
    assert {p.stem for p in PROGRAMS.glob("*.py")} == set(LIBRARIES)


@pytest.mark.parametrize("name", LIBRARIES)
def test_program_runs_with_the_wheel_and_its_library_alone(name, unpacked, tmp_path):
    program = shutil.copy(PROGRAMS / f"{name}.py", tmp_path)
    done = run_apart(program, unpacked, LIBRARIES[name], tmp_path)
    assert done.returncode == 0, done.stderr
    said, last = done.stdout.splitlines()
    assert said.startswith("ok")
    path, ours = json.loads(last)
    assert [folder for folder in path if (Path(folder) / "entangle").exists()] == [str(unpacked)]
    assert str(unpacked / "entangle" / "transforms" / "__init__.py") in ours
    assert all(Path(file).is_relative_to(unpacked) for file in ours)


@pytest.mark.parametrize("name", LIBRARIES)
def test_nothing_else_can_be_imported(name, unpacked, tmp_path):
    others = {"flax", "equinox"} - set(LIBRARIES[name])
    trained_with = {"grain", "matplotlib", "tensorflow_datasets", "tokenizers", "tyro", "wandb"}
    program = tmp_path / "program.py"
    program.write_text(f"""
import importlib
for name in {sorted(NEVER | others | trained_with)}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name == name, error  # refused itself, not for want of something that it imports
    else:
        raise SystemExit(name + " was imported")
""")
    done = run_apart(program, unpacked, LIBRARIES[name], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_programs_run_in_a_fresh_environment(wheel, tmp_path):
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    python = environment / "bin" / "python"

    def run(*words):
        done = subprocess.run([*map(str, words)], cwd=elsewhere, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-I", "-m", "venv", environment)
    run(python, "-I", "-m", "pip", "install", "-qq", "--disable-pip-version-check", wheel, "flax", "equinox")
    assert run(python, "-I", "-c", "import entangle; print(entangle.__file__)").startswith(str(environment))
    for name in LIBRARIES:
        program = shutil.copy(PROGRAMS / f"{name}.py", elsewhere)
        assert run(python, "-I", program).startswith("ok")
