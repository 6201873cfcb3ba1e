"""A pair chain as XLA compiles it: once, on the device alone, without copies; on a mesh only numbers are sent around."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from entangle import transforms
from entangle.types import PairGeometry, PairGradients

ROOT = Path(__file__).parents[2]
HEADS = {name: transforms.combine_pair(transforms.get_weighting(name)) for name in transforms.WEIGHTINGS} | {
    "grouped": transforms.combine_pair(transforms.pcgrad(), group=lambda path: path),
    "grouped, with memory": transforms.combine_pair(transforms.gradvac_ema(), group=lambda path: path.split("/")[0]),
    "stacked": transforms.combine_pair(
        transforms.pcgrad(), group=lambda path: path, stacked=lambda path: "layers" in path
    ),
}
FORMS = ("pcgrad", "reward_calibrated", "grouped, with memory", "stacked")
LARGE = {"embedding": (512, 256), "layers": {"bias": (2, 1024), "kernel": (2, 256, 1024)}}
SMALL = {"embedding": (5, 4), "layers": {"bias": (2, 3), "kernel": (2, 4, 3)}}
MOST_COPIED = 0.02  # of the parameters' size


def draw(shapes, seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jnp.asarray(rng.standard_normal(shape), dtype), shapes, is_leaf=is_shape)


def draw_gradients(shapes, seed, dtype=jnp.float32):
    return PairGradients(draw(shapes, 2 * seed + 1, dtype), draw(shapes, 2 * seed + 2, dtype))


def make_step(head, donate):
    tx = optax.chain(head, optax.sgd(0.1, momentum=0.9))

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return tx, jax.jit(step, donate_argnums=(0, 1) if donate else ())


@functools.cache
def compile_large(head, dtype=jnp.float32):
    tx, step = make_step(head, donate=True)
    params = draw(LARGE, 0, dtype)
    return step.lower(params, tx.init(params), draw_gradients(LARGE, 0, dtype)).compile()


@pytest.mark.parametrize(
    ("name", "donate"), [(name, True) for name in HEADS] + [(name, False) for name in FORMS], ids=str
)
def test_many_steps_are_compiled_once_and_nothing_comes_from_the_host(name, donate):
    tx, step = make_step(HEADS[name], donate)
    params = draw(SMALL, 0)
    none = jax.tree.map(jnp.zeros_like, params)
    after = step(params, tx.init(params), draw_gradients(SMALL, 0))
    assert {leaf.is_deleted() for leaf in jax.tree.leaves(params)} == {donate}
    later = [draw_gradients(SMALL, seed) for seed in (1, 2)] + [PairGradients(none, none)]
    with jax.transfer_guard("disallow"):
        for gradients in later:
            after = step(*after, gradients)
    assert step._cache_size() == 1
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(after[0]))


def test_the_guard_is_awake():
    tx, step = make_step(HEADS["pcgrad"], donate=False)
    params = draw(SMALL, 0)
    arguments = params, tx.init(params), jax.tree.map(np.asarray, draw_gradients(SMALL, 0))
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        step(*arguments)


def calls_to_the_host(compiled):
    """Operations of a program that talk to the host, by name."""
    pattern = r'custom_call_target="([^"]*(?:callback|host)[^"]*)"|\b(infeed|outfeed|send|recv)\('
    return {target or name for target, name in re.findall(pattern, compiled.as_text(), re.IGNORECASE)}


@pytest.mark.parametrize("name", FORMS)
def test_the_program_does_not_talk_to_the_host(name):
    assert calls_to_the_host(compile_large(HEADS[name])) == set()


def test_a_callback_would_be_found():
    def weighting(gram):
        jax.debug.callback(lambda number: None, gram.inner_product)
        return transforms.pcgrad()(gram)

    assert len(calls_to_the_host(compile_large(transforms.combine_pair(weighting)))) == 1


def copied(compiled, dtype=jnp.float32):
    """Temporaries, and results that are not put in the place of arguments, over the parameters' size."""
    memory = compiled.memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(draw(LARGE, 0, dtype)))
    return (memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes) / size


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_nothing_of_the_parameters_size_is_copied(name, dtype):
    assert 0 <= copied(compile_large(HEADS[name], dtype), dtype) < MOST_COPIED


def concatenating_update(gradients, state, params=None):
    """PCGrad of two long vectors."""
    w, l = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in gradients)
    x, y = transforms.pcgrad()(PairGeometry(jnp.vdot(w, w), jnp.vdot(l, l), jnp.vdot(w, l)))
    return jax.flatten_util.ravel_pytree(gradients.chosen)[1](y * l - x * w), state


def keeping_update(gradients, state, params=None):
    """The margin's own combination, all of which is shown in the state, for logging."""
    update = jax.tree.map(jnp.subtract, gradients.rejected, gradients.chosen)
    return update, update


@pytest.mark.parametrize(
    ("update", "least"),
    [
        (concatenating_update, 2.0),  # both gradients as vectors
        (keeping_update, 1.0),  # a result for which nothing of its size was given away
    ],
)
def test_a_head_that_copies_would_be_found(update, least):
    head = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    assert copied(compile_large(head)) >= least


@pytest.fixture(scope="module")
def program():
    words = [sys.executable, "-m", "tests.transforms.mesh_program"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def on_a_mesh(program):
    return program["cases"]


def test_gradients_that_are_closed_over_are_accumulated_where_they_lie(program):
    found = program["accumulated"]
    assert found["eager"] == found["scanned"] == [[0], [-2]]
    assert found["lie"] == ["P('x', 'y')", "P('x', 'y')", "P(None, 'x', 'y')"]


def test_values_do_not_depend_on_the_mesh(on_a_mesh):
    assert len(on_a_mesh) == 10
    assert {name: case["error"] for name, case in on_a_mesh.items() if not case["error"] < 1e-6} == {}


def test_what_comes_out_lies_where_the_parameters_do(on_a_mesh):
    assert {name: case["moved"] for name, case in on_a_mesh.items() if case["moved"]} == {}


def test_on_a_mesh_it_is_compiled_once_too(on_a_mesh):
    assert {name: case["compiled"] for name, case in on_a_mesh.items() if case["compiled"] != 1} == {}


def test_over_the_mesh_a_few_numbers_are_summed_and_nothing_else_is_sent(on_a_mesh):
    """Three numbers of every parameter that lies in parts, along each axis; where layers are groups, of every layer of it.

    Where layers lie on different devices, each layer's numbers go to them all.
    """
    for name, case in on_a_mesh.items():
        layers = [[], [1], [2]] if "stacked" in name else [[]]
        gathers = {"all-gather"} if "stacked; stage" in name else set()
        assert {kind for kind, _ in case["sent"]} == {"all-reduce"} | gathers, name
        assert all(shape in layers for _, shape in case["sent"]), (name, case["sent"])
        assert len(case["sent"]) <= 3 * case["in parts"], name
