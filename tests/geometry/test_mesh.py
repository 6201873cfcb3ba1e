"""On a mesh of 8 devices: the same values, and nothing sent around for the geometry but sums."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAIRS_APART = ("gpt, tied; replicated; gram; Auto", "llama, scanned; replicated; rows; Explicit")
TENSOR = ("llama, untied; tensor; gram; Auto", "llama, scanned; tensor; gram; Explicit")
LOCAL = 2  # of 8 pairs on 4 devices


@pytest.fixture(scope="module")
def found():
    program = [sys.executable, "-m", "tests.geometry.mesh_program"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def activations(sent):
    """What has the shape of activations or their cotangents, ``[B, 2, ..., T, D]`` of one device's pairs."""
    return [shape for kind, shape in sent if shape[:2] == [LOCAL, 2] and shape[-2:] == [8, 8] and kind == "all-reduce"]


def test_values_do_not_depend_on_the_mesh(found):
    assert len(found) == 6
    assert {name: case["error"] for name, case in found.items() if not case["error"] < 1e-10} == {}


@pytest.mark.parametrize("name", PAIRS_APART)
def test_geometry_of_pairs_on_different_devices_needs_no_communication(found, name):
    assert found[name]["alone"] == []


@pytest.mark.parametrize("name", PAIRS_APART)
def test_the_step_sends_what_the_plain_step_sends(found, name):
    """The sum of the gradients over devices, and no array more."""
    plain, step = ([(kind, math.prod(shape)) for kind, shape in found[name][key]] for key in ("plain", "step"))
    assert plain and {kind for kind, _ in plain} == {kind for kind, _ in step} == {"all-reduce"}
    assert sum(size for _, size in step) <= sum(size for _, size in plain)


def test_with_parameters_in_parts_they_are_gathered_as_for_the_forward_and_nothing_is_summed(found):
    case = found["gpt, tied; fsdp; rows; Auto"]
    size = {key: sum(math.prod(shape) for _, shape in case[key]) for key in ("alone", "forward")}
    assert "all-reduce" not in {kind for kind, _ in case["alone"]}
    assert 0 < size["alone"] <= 2 * size["forward"]  # once for the forward, once for the backward


@pytest.mark.parametrize("name", TENSOR)
def test_over_a_tensor_axis_one_small_sum_a_weight_is_sent(found, name):
    """Activations are summed as in the plain step; on top come three numbers a pair for every weight in parts."""
    case = found[name]
    assert {kind for kind, _ in case["alone"]} == {"all-reduce"}
    summed = [shape for _, shape in case["alone"] if shape not in activations(case["alone"])]
    assert summed and all(shape == [LOCAL, 3] for shape in summed)
    assert 0 < len(activations(case["alone"])) <= len(activations(case["plain"]))


def test_over_a_tensor_axis_row_gradients_send_their_sums_alone(found):
    case = found["llama, untied; tensor; rows; Auto"]
    summed = [shape for _, shape in case["alone"] if shape not in activations(case["alone"])]
    assert summed and all(shape == [LOCAL] for shape in summed)
    assert 0 < len(activations(case["alone"])) <= len(activations(case["plain"]))
