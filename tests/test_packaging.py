"""The wheel holds the two packages and nothing else, and the base install needs jax and optax alone."""

import configparser
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def archive(wheel):
    with zipfile.ZipFile(wheel) as archive:
        yield archive


def test_wheel_holds_the_packages_only(archive):
    roots = {name.split("/")[0] for name in archive.namelist()}
    assert {r for r in roots if not r.endswith(".dist-info")} == {"entangle", "experiments"}
    assert "entangle/py.typed" in archive.namelist()


def test_wheel_holds_every_module(archive):
    modules = {str(p.relative_to(ROOT)) for top in ("entangle", "experiments") for p in (ROOT / top).rglob("*.py")}
    assert modules <= set(archive.namelist())


def test_base_install_is_jax_and_optax(archive):
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
    requires = [line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert sorted(r.split(">")[0] for r in requires if "extra ==" not in r) == ["jax", "optax"]


def test_test_extra_includes_train():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert "entangle[train]" in config["options.extras_require"]["test"].split()
