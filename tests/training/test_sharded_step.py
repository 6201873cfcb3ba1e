import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from entangle import models, sharding, training
from entangle.errors import UserError
from entangle.paths import named_leaves

PRODUCT = "data=2,fsdp=2,tensor=2"


def run_on(*meshes):
    program = Path(__file__).with_name("step_mesh_program.py")
    done = subprocess.run([sys.executable, program, *meshes], capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "Involuntary full rematerialization" not in done.stderr
    assert done.stdout.splitlines() == [f"{name} {mesh} equal" for name in ("full", "lora") for mesh in meshes]


def test_a_step_on_eight_devices_is_that_on_one():
    run_on(PRODUCT)


@pytest.mark.slow
def test_a_step_on_every_mesh_is_that_on_one():
    run_on("data=8", "fsdp=8", "tensor=8", "data=2,fsdp=4", "data=4,tensor=2", "fsdp=4,tensor=2", PRODUCT)


@pytest.mark.parametrize("name", ["gpt2", "llama3_8b", "qwen3_0_6b", "qwen2_5_7b"])
def test_every_parameter_of_every_family_has_a_place(name):
    lora = models.LoraConfig(4, 8.0, ("out", "up"))
    config = models.preset(name)
    config = type(config)(**{**vars(config), "lora": lora})
    shapes = jax.eval_shape(models.language_model(config).init, jax.random.key(0))
    axes = {path: sharding.logical_axes(path, leaf.ndim) for path, leaf in named_leaves(shapes)}
    assert [path for path, found in axes.items() if found is None] == []
    large = [path for path, leaf in named_leaves(shapes) if path.endswith(("kernel", "embedding"))]
    assert all(set(axes[path]) & {"embed", "vocab", "hidden", "heads"} for path in large)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=2", "mesh: data=2 x fsdp=1 x tensor=1 needs 2 devices, there are 1"),
        ("model=1", "mesh: no axis is called model: choose from data, fsdp, tensor"),
        ("data=0", "mesh 'data=0': write sizes of different axes as data=2,fsdp=4, each at least 1"),
        ("data=1,data=1", "write sizes of different axes"),
        (",", "write sizes of different axes"),
        ({"data": -1, "fsdp": -1}, "mesh: data=-1, fsdp=-1: sizes are whole numbers, each at least 1"),
        ("data", "write sizes of different axes"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        sharding.make_mesh(text, jax.devices()[:1])


def test_devices_that_a_mesh_leaves_out_are_named():
    with pytest.raises(
        UserError, match="data=1 x fsdp=1 x tensor=1 needs 1 devices, there are 4, and a mesh has all of"
    ):
        sharding.make_mesh("data=1", jax.devices()[:1] * 4)


def test_what_an_optimizer_keeps_in_other_shapes_lies_whole():
    """Adafactor's row and column moments are no matrices; its full moments lie as the parameters do."""
    mesh = sharding.make_mesh("fsdp=2,tensor=2", jax.devices()[:1] * 4)
    model = models.language_model(dataclasses.replace(models.preset("tiny", 64), scan_layers=True))
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=16)
    begun = lambda tx: jax.eval_shape(lambda key: training.init_state(model.init(key), tx), jax.random.key(0))  # noqa: E731
    lie = {name: place.spec for name, place in named_leaves(sharding.shardings(begun(tx), mesh))}
    kernel = "layers/attention/qkv/kernel"
    (row,) = (spec for name, spec in lie.items() if name.endswith(f"v_row/{kernel}"))
    assert lie[f"params/{kernel}"] == P(None, "fsdp", "tensor") and set(row) <= {None}
    adam = named_leaves(sharding.shardings(begun(optax.adam(1e-3)), mesh))
    assert [place.spec for name, place in adam if name.endswith(f"/{kernel}")] == [lie[f"params/{kernel}"]] * 3


def test_another_mesh_is_refused():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    with pytest.raises(UserError, match="mesh: its axes are data, fsdp, not data, fsdp, tensor: see make_mesh"):
        sharding.shardings({"token_embedding": jnp.zeros((4, 2))}, mesh)


def test_what_a_mesh_does_not_divide_is_refused():
    devices = jax.devices()[:1] * 4
    mesh = sharding.make_mesh("data=2,fsdp=2", devices)
    tree = {"layers": {"attention": {"query": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)}}}}
    with pytest.raises(
        UserError,
        match="tiny: layers/attention/query/kernel: embed of size 3 cannot be divided over fsdp=2 = 2 devices",
    ):
        sharding.shardings(tree, mesh, "tiny")
    with pytest.raises(
        UserError, match=r"--preference\.batch-size 6: cannot be divided over data=2 x fsdp=2 = 4 devices"
    ):
        sharding.check_pairs(mesh, 6, "--preference.batch-size")


def test_one_mesh_axis_divides_an_array_once():
    rules = {**sharding.RULES, "hidden": ("fsdp",)}
    with pytest.raises(ValueError, match=re.escape("('embed', 'hidden'): mesh axis fsdp would divide two of them")):
        sharding.spec(("embed", "hidden"), rules)
    for axes in sharding._LEAVES.values():
        sharding.spec(("layers", *axes))
