"""The contenders of the pair chain's benchmark, at a small size: what is checked of them, and that the checks can fail."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scripts.benchmarks import pair_chain
from scripts.benchmarks.measuring import measure
from scripts.benchmarks.table import BENCHMARKS

F32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
SHAPES = {
    "embedding": F32((301, 96)),
    "layers": {str(layer): {"bias": F32((128,)), "kernel": F32((96, 128))} for layer in range(3)},
}


@pytest.fixture(autouse=True)
def standard_promotion():
    """For optax's AdamW, which mixes counters and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def drawn():
    return pair_chain.draw(SHAPES)


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_the_sides_agree_with_numpy_and_their_memory_is_known():
    result = measure(BENCHMARKS["pair_chain"]._replace(runs=3), pair_chain.contenders(SHAPES))
    assert [timing.name for timing in result.timings] == ["pcgrad", "adamw", "margin", "blocks"]
    for timing in result.timings:
        np.testing.assert_allclose(timing.losses, 1.0, atol=2e-4)
    # parameters, two moments and the gradients; everything else is less than a tenth of the parameters
    for timing, trees in zip(result.timings, (5, 4, 5, 5), strict=True):
        assert 0 <= timing.memory / size(drawn()[0]) - trees < 0.1


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("pcgrad", lambda sides: sides["margin"].tx),
        ("pcgrad", lambda sides: sides["blocks"].tx),
        ("adamw", lambda sides: optax.adamw(1.01 * pair_chain.LEARNING_RATE)),
        ("adamw", lambda sides: optax.adamw(pair_chain.LEARNING_RATE, b2=0.998)),
    ],
)
def test_a_chain_that_does_something_else_is_not_timed(name, wrong):
    params, gradients = drawn()
    sides = pair_chain.sides(gradients)
    with pytest.raises(AssertionError, match="not strictly ordered"):
        pair_chain.contender(name, sides[name]._replace(tx=wrong(sides)), params, gradients)


def test_a_chain_that_goes_astray_later_is_noticed(monkeypatch):
    """The number of every run is 1 on the right way only: here the first step is right, and the learning rate then grows."""
    params, gradients = drawn()
    rate = lambda step: jnp.where(step < 2, 1.0, 1.01) * pair_chain.LEARNING_RATE  # noqa: E731
    side = pair_chain.sides(gradients)["adamw"]._replace(tx=optax.adamw(rate))
    run = pair_chain.contender("astray", side, params, gradients).run
    # of 1, 2, 3 steps' ways
    np.testing.assert_allclose([run() for _ in range(3)], [1.0, 1.0, 1 + 0.01 / 3], atol=2e-4)


def concatenating(rule):
    """A head that makes one vector of each gradient first."""

    def update(gradients, state, params=None):
        w, l = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in gradients)
        x, y = rule(jnp.vdot(w, w), jnp.vdot(l, l), jnp.vdot(w, l))
        _, back = jax.flatten_util.ravel_pytree(gradients.chosen)
        return back(y * l - x * w), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def test_a_chain_that_copies_its_gradients_is_not_timed():
    params, gradients = drawn()
    rule = lambda a, b, c: (1 + jnp.maximum(c, 0) / a, 1 + jnp.maximum(c, 0) / b)  # noqa: E731
    side = pair_chain.sides(gradients)["pcgrad"]
    side = side._replace(tx=optax.chain(concatenating(rule), optax.adamw(pair_chain.LEARNING_RATE)))
    with pytest.raises(pair_chain.CopyError, match=r"^temporaries of [\d,]+ bytes in a step of [\d,]+ bytes of"):
        pair_chain.contender("copies", side, params, gradients)


def test_a_step_that_keeps_its_old_state_is_not_timed():
    params = drawn()[0]
    compiled = jax.jit(lambda params: jax.tree.map(jnp.negative, params)).lower(params).compile()
    with pytest.raises(pair_chain.CopyError, match=r"^results not in place of"):
        pair_chain.peak_memory(compiled, params)


def test_the_gradients_conflict_here_and_agree_there():
    """Else PCGrad would be the same in every block, or the margin's own combination."""
    products = jax.tree.leaves(jax.tree.map(jnp.vdot, *drawn()[1]))
    assert min(products) < 0 < max(products) and sum(products) > 0


def test_the_size_is_that_of_gpt2_small():
    # vocabulary and positions; in each of 12 blocks 12 width^2 weights, 13 width biases and scales; the last norm
    right = (50257 + 1024) * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert sum(leaf.size for leaf in jax.tree.leaves(pair_chain.gpt2_shapes())) == right == 124_439_808


def test_blocks():
    paths = ("layers/3/attention/out/kernel", "layers/11/norm/bias", "token_embedding", "final_norm/scale")
    assert [pair_chain.block(path) for path in paths] == ["layers/3", "layers/11", "token_embedding", "final_norm"]
