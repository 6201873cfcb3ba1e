"""On a mesh of 8 devices: the same values, and nothing sent around for the geometry but sums."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ("gpt, tied; replicated", "llama, scanned; replicated")


@pytest.fixture(scope="module")
def found():
    program = [sys.executable, "-m", "tests.geometry.mesh_program"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_values_do_not_depend_on_the_mesh(found):
    assert set(found) > set(DATA)
    assert {name: case["error"] for name, case in found.items() if not case["error"] < 1e-10} == {}


@pytest.mark.parametrize("name", DATA)
def test_geometry_of_pairs_on_different_devices_needs_no_communication(found, name):
    assert found[name]["alone"] == []


@pytest.mark.parametrize("name", DATA)
def test_the_step_sends_what_the_plain_step_sends(found, name):
    """The sum of the gradients over devices, and no array more."""
    plain, step = ([(kind, math.prod(shape)) for kind, shape in found[name][key]] for key in ("plain", "step"))
    assert plain and {kind for kind, _ in plain} == {kind for kind, _ in step} == {"all-reduce"}
    assert sum(size for _, size in step) <= sum(size for _, size in plain)


def test_over_a_tensor_axis_row_gradients_send_their_sums_alone(found):
    """Activations are summed as in the plain step; what comes on top is one number a pair for each product."""
    case = found["llama, untied; tensor"]
    assert {kind for kind, _ in case["alone"]} == {"all-reduce"}
    local = 2  # of 8 pairs on 4 devices
    activations = [shape for _, shape in case["alone"] if math.prod(shape) > local]
    assert activations and all(
        shape[:2] == [local, 2] and shape[-2:] == [8, 8] for shape in activations
    )  # [2, 2, ..., T, D]
    assert any(shape == [local] for _, shape in case["alone"])
