"""To and from optax's aggregators: the same steps either way round."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.experimental import aggregating

from entangle import transforms
from entangle.transforms import (
    aggregate_pair,
    combine_groups,
    combine_pair,
    combined,
    margin,
    pair_aggregator,
    pcgrad,
    stack_pair,
    unstack_pair,
)
from entangle.types import PairGradients
from tests.toy import flatten


@pytest.fixture
def standard_promotion():
    """For the parts of optax that mix counters and floats; nothing of this package needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def draw(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"body": {"w": (2, 3), "scalar": ()}, "head": (4,)}
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jnp.asarray(rng.standard_normal(shape), dtype), shapes, is_leaf=is_shape)


def draw_conflict(seed, dtype=jnp.float32):
    common, one, other = (draw(3 * seed + i, dtype) for i in range(3))
    add = lambda a, b: jax.tree.map(lambda a, b: 2 * a + b, a, b)  # noqa: E731
    return PairGradients(add(common, one), add(common, other))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stacked_rows_are_the_descent_gradients_and_come_apart_again(dtype):
    gradients = draw_conflict(0, dtype)
    rows = stack_pair(gradients)
    for row, w, l in zip(*map(jax.tree.leaves, (rows, *gradients)), strict=True):
        assert row.shape == (2, *w.shape) and row.dtype == dtype
        np.testing.assert_array_equal(row[0], -w)
        np.testing.assert_array_equal(row[1], l)
    back = unstack_pair(rows)
    assert jax.tree.structure(back) == jax.tree.structure(gradients)
    np.testing.assert_array_equal(flatten(back), flatten(gradients))


@pytest.mark.parametrize(
    "rows", [{"w": jnp.ones((2, 3)), "v": jnp.ones(3)}, {"w": jnp.ones((2, 3)), "v": jnp.ones(())}]
)
def test_leaves_without_two_rows_are_refused(rows):
    with pytest.raises(
        ValueError, match="unstack_pair: leaves need the leading axis of 2 rows, -chosen and rejected; got"
    ):
        unstack_pair(rows)


def test_pair_gradients_are_no_rows_whatever_their_leading_axis():
    gradients = PairGradients(jnp.ones((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(TypeError, match=r"unstack_pair takes leaves \[2, ...\]: stack_pair\(gradients\) makes them"):
        unstack_pair(gradients)


def steps(tx, gradients, params):
    """Parameters after every step, and the last state."""

    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    found, state = [], tx.init(params)
    for g in gradients:
        params, state = step(params, state, g)
        found.append(flatten(params))
    return np.stack(found), state


@pytest.mark.parametrize("options", [{}, {"group": lambda path: path.split("/")[0]}], ids=["whole", "groups"])
@pytest.mark.usefixtures("standard_promotion")
def test_a_process_of_optax_with_a_weighting_steps_as_the_chain_does(options):
    params, gradients = draw(99), [draw_conflict(seed) for seed in range(4)]
    optimizer = optax.adamw(0.1, weight_decay=0.1)
    chain = optax.chain(combine_pair(pcgrad(), **options), optimizer)
    process = aggregating.process(optax.identity(), pair_aggregator(pcgrad(), **options), optimizer)
    assert isinstance(process, aggregating.Aggregator)
    ours, ours_state = steps(chain, gradients, params)
    theirs, theirs_state = steps(process, [stack_pair(g) for g in gradients], params)
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-6)
    (found,), (right,) = combined(theirs_state), combined(ours_state)
    assert jax.tree.structure(found) == jax.tree.structure(right)
    np.testing.assert_allclose(flatten(found), flatten(right), rtol=1e-5)
    plain, _ = steps(optax.chain(combine_pair(margin()), optimizer), gradients, params)
    assert np.abs(plain - ours).max() > 1e-2  # the weighting makes a difference


@pytest.mark.usefixtures("standard_promotion")
def test_rows_may_be_preprocessed_one_by_one():
    """What optax's process is for: every row by itself, before they are combined."""
    gradients = draw_conflict(5)
    clip = optax.stateless(lambda rows, _: jax.vmap(optax.projections.projection_l2_ball)(rows))
    process = aggregating.process(clip, pair_aggregator(margin()), optax.sgd(1.0))
    params = draw(99)
    updates, _ = process.update(stack_pair(gradients), process.init(params), params)
    w, l = map(flatten, gradients)
    expected = w / np.linalg.norm(w) - l / np.linalg.norm(l)  # both are longer than 1
    np.testing.assert_allclose(flatten(updates), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "aggregator",
    [aggregating.average_per_element_updates(), combine_groups(transforms.group_mean(), 2)],
    ids=["optax", "groups"],
)
def test_the_average_of_the_two_rows_is_half_the_margin_step(aggregator):
    gradients = draw_conflict(6)
    tx = optax.chain(aggregate_pair(aggregator), optax.sgd(1.0))
    updates, _ = tx.update(gradients, tx.init(gradients.chosen))
    w, l = map(flatten, gradients)
    np.testing.assert_allclose(flatten(updates), (w - l) / 2, rtol=1e-6, atol=1e-6)


def test_rules_for_groups_serve_as_heads_with_their_extra_arguments():
    gradients = draw_conflict(7)
    tx = optax.chain(aggregate_pair(combine_groups(transforms.adaptive_balance(), 2)), optax.sgd(1.0))
    state = tx.init(gradients.chosen)
    updates, state = jax.jit(tx.update)(gradients, state, group_losses=jnp.array([1.0, 3.0]))
    w, l = map(flatten, gradients)
    np.testing.assert_allclose(flatten(updates), 0.25 * w - 0.75 * l, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state[0].gram, [[w @ w, -(w @ l)], [-(w @ l), l @ l]], rtol=1e-5)


@pytest.mark.parametrize(
    "tx",
    [pair_aggregator(transforms.reward_calibrated()), aggregate_pair(combine_groups(transforms.soft_aggregation(), 2))],
    ids=["pair_aggregator", "aggregate_pair"],
)
def test_laws_of_optax(tx):
    params, gradients = draw(0, jnp.bfloat16), draw_conflict(1, jnp.bfloat16)
    updates = stack_pair(gradients) if isinstance(tx, aggregating.Aggregator) else gradients
    state = tx.init(params)

    def signature(tree):
        return jax.tree.structure(tree), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]

    assert signature(jax.eval_shape(tx.init, params)) == signature(state)
    traces = []

    @jax.jit
    def update(updates, state):
        traces.append(None)
        return tx.update(updates, state, unknown="swallowed")

    out, after = update(updates, state)
    assert signature(out) == signature(params) and signature(after) == signature(state)
    update(updates, after)
    assert len(traces) == 1  # the second call is served by the first compilation


def test_updates_that_are_not_pair_gradients_are_refused():
    tx = aggregate_pair(aggregating.average_per_element_updates())
    with pytest.raises(TypeError, match="aggregate_pair takes PairGradients, got dict: put it first in the chain"):
        tx.update({"w": jnp.ones((2, 3))}, tx.init({"w": jnp.ones(3)}))
