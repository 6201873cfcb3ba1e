"""On a mesh of 8 devices: projections with memory, groups and accumulation give the same, and only numbers are sent around."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GRAM = 16  # of four retained gradients; the smallest parameter in parts has 96 elements, 12 on a device
CASES = [
    f"{case}; {kind}"
    for case in ("project_retain", "project_retain, adam", "retain_invariant", "combine_groups", "accumulate_pairs")
    for kind in ("Auto", "Explicit")
]


@pytest.fixture(scope="module")
def found():
    program = [sys.executable, "-m", "tests.transforms.memory_mesh_program"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_values_do_not_depend_on_the_mesh(found):
    assert sorted(found) == sorted(CASES)
    assert {name: case["error"] for name, case in found.items() if not case["error"] < 1e-5} == {}


def test_updates_and_state_lie_as_the_parameters_do(found):
    assert {name: case["misplaced"] for name, case in found.items() if case["misplaced"]} == {}


@pytest.mark.parametrize("name", [name for name in CASES if "retain" in name])
def test_the_memory_is_in_parts_as_the_parameters_are(found, name):
    assert found[name]["in parts"] == 2  # "down" and "up"; it is not parted over the steps, or it would be misplaced


@pytest.mark.parametrize("name", CASES)
def test_only_products_are_sent_around(found, name):
    sizes = [math.prod(shape) for shape in found[name]["sent"]]
    assert sizes and max(sizes) <= GRAM
