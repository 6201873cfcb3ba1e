"""Strict numerics for every test: dtypes and ranks never promote silently, warnings are errors (see pyproject.toml)."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import jax
import pytest

ROOT = Path(__file__).parent.parent

collect_ignore = ["foreign"]  # somebody else's programs: test_foreign.py runs them, each in a process of its own

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("gate", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("gate")


@pytest.fixture
def x64():
    """Run a test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The package's wheel, built once for all processes of a test run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker's folder lies in one that all workers share
        folder = folder.parent
    folder /= "wheel"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob("*.whl")):
            build_wheel(folder)
    return next(folder.glob("*.whl"))


def build_wheel(folder):
    # built from a copy, so that no build folder is left in the checkout
    source = folder / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "entangle", "experiments", "tests", "scripts"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    words = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, *words, "-w", str(folder), str(source)], check=True, capture_output=True)
