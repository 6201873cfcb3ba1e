"""Compiled by the TPU's own compiler, where the extra ``plan`` is installed."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow

SMALL = ["--model", "llama3_2_1b", "--vocab-size", "8192", "--lora", "paper", "--max-length", "128"]


def plan(*flags):
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    return subprocess.run(
        [sys.executable, "-m", "entangle.plan", *flags],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=1200,
    )


def test_a_step_is_compiled_for_a_slice_and_its_geometry_is_cheap(tmp_path):
    done = plan(*SMALL, "--topology", "v5e:2x4", "--batch-size", "8", "--mesh", "data=2,fsdp=4", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and "held up by" in done.stdout
    with_, without = found["step"]["flops"], found["without_geometry"]["flops"]
    assert with_ <= 1.1 * without
    # every layer gathers its parts of the parameters
    assert found["step"]["collectives"]["all-gather"]["times"] >= 16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v5e:3x5"], "error: --topology v5e:3x5: the TPU compiler does not know it"),
        (["--topology", "v5e:2x4", "--mesh", "data=3"], "error: mesh: data=3 x fsdp=1 x tensor=1 needs 3 devices"),
        (["--topology", "v5e:2x4", "--batch-size", "6"], "error: --batch-size 6: cannot be divided over"),
    ],
)
def test_what_the_compiler_or_the_mesh_refuses_ends_in_one_line(flags, message):
    done = plan(*SMALL, *flags)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith(message), done.stderr
