"""Projections with memory: the projector with full vectors, what stays orthogonal to what, and the first-order promise."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from entangle import geometry, losses, transforms
from entangle.transforms import (
    AdamMetric,
    combine_pair,
    fixed,
    margin,
    project_retain,
    protect_chosen,
    retain_invariant,
)
from entangle.types import PairGradients
from tests.toy import MODELS, draw_pairs, draw_params, pair_log_probs

MEMORY = 3
ADAM = AdamMetric(b2=0.9, eps=1e-3)
FORGET = combine_pair(fixed(chosen=0.0))
WIDTH = 18


@pytest.fixture
def standard_promotion():
    """For the parts of optax that mix counters and floats; nothing of this package needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def rows_to_tree(rows, dtype):
    """Vectors ``[..., 18]`` as a tree of unequal ranks, with a scalar, and a parameter that is not there."""
    rows = np.asarray(rows)
    lead = rows.shape[:-1]
    a, scalar, v = np.split(rows, [12, 13], -1)
    tree = {"a": a.reshape(*lead, 3, 4), "b": {"scalar": scalar[..., 0], "v": v}, "frozen": None}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def tree_to_rows(tree, lead):
    """The same back, in float64."""
    leaves = [
        np.asarray(leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf) for leaf in jax.tree.leaves(tree)
    ]
    return np.concatenate([leaf.astype(np.float64).reshape(*leaf.shape[:lead], -1) for leaf in leaves], -1)


def run(tx, chosen, rejected, params=None):
    """Updates of every step, leaves ``[steps, ...]``, and the last state; sequences have leaves ``[steps, ...]``."""

    def step(state, gradients):
        updates, state = tx.update(gradients, state, params)
        return state, updates

    start = tx.init(jax.tree.map(lambda x: x[0], chosen) if params is None else params)
    state, updates = jax.lax.scan(step, start, PairGradients(chosen, rejected))
    return updates, state


def vectors(tx, chosen, rejected, dtype=jnp.float64):
    """`run` from and to plain arrays ``[steps, 18]``."""
    trees = (rows_to_tree(rows, dtype) for rows in (chosen, rejected))
    updates, state = jax.jit(functools.partial(run, tx))(*trees)
    return tree_to_rows(updates, 1), state


@functools.cache
def _program(metric, radius):
    tx = project_retain(MEMORY, metric=metric, radius=radius)

    def step(state, gradients):
        updates, state = tx.update(gradients, state)
        return state, (updates, state.removed)

    def sequence(chosen, rejected):
        start = tx.init(jax.tree.map(lambda x: x[0], chosen))
        return jax.lax.scan(step, start, PairGradients(chosen, rejected))[1]

    return jax.jit(jax.vmap(sequence))


def many(chosen, rejected, metric=None, radius=None):
    """Updates and removed shares of float32 sequences ``[cases, steps, 18]``, filled up so that one program serves all."""
    cases, steps, _ = chosen.shape
    fill = [(0, 10 - cases), (0, 9 - steps), (0, 0)]
    trees = (rows_to_tree(np.pad(rows, fill), jnp.float32) for rows in (chosen, rejected))
    updates, removed = _program(metric, radius)(*trees)
    return tree_to_rows(updates, 2)[:cases, :steps], np.asarray(removed)[:cases, :steps]


def draw(seed, steps=13):
    return np.random.default_rng(seed).standard_normal((2, steps, WIDTH))


def kept(chosen, step, memory=MEMORY):
    """The retained gradients that count at a step, the current one last."""
    return chosen[max(0, step - memory) : step + 1]


class NaiveMetric:
    """The diagonal of H: ones, or Adam's second moment step by step."""

    def __init__(self, metric):
        self.metric, self.v, self.steps = metric, np.zeros(WIDTH), 0

    def __call__(self, forget):
        """With no gradient the metric before the step, else the one that this gradient would lead to."""
        if self.metric is None or (forget is None and not self.steps):
            return np.ones(WIDTH)
        b2, eps = self.metric
        v, steps = (self.v, self.steps) if forget is None else (b2 * self.v + (1 - b2) * forget**2, self.steps + 1)
        return 1 / (np.sqrt(v / (1 - b2**steps)) + eps)

    def went_out(self, update):
        if self.metric is not None:
            self.v = self.metric.b2 * self.v + (1 - self.metric.b2) * update**2
        self.steps += 1


def projected(columns, h, f):
    """``(I - U (U^T H U)^-1 U^T H) f``; dependent columns count once."""
    half = np.sqrt(h)
    lengths = np.linalg.norm(half[:, None] * columns, axis=0)
    units = columns / np.where(lengths == 0, 1, lengths)
    return f - units @ (np.linalg.pinv(half[:, None] * units, rcond=1e-9) @ (half * f))


def foreseen(h_of, columns, f):
    """The metric that the step is measured in: of the second moment that a first projection would lead to."""
    return h_of(projected(columns, h_of(None), f))


ALL = np.ones(WIDTH, bool)


def naive(chosen, rejected, metric=None, retain_weight=0.0, radius=None, remembered=ALL, memory=MEMORY):
    """``P = I - U (U^T H U)^-1 U^T H`` step by step with full vectors; also each step's share of length removed."""
    h_of, updates, shares = NaiveMetric(metric), [], []
    for step, (g, f) in enumerate(zip(chosen, rejected, strict=True)):
        columns = kept(chosen, step, memory).T.copy()
        columns[~remembered, :-1] = 0
        h = foreseen(h_of, columns, f)
        left = projected(columns, h, f)
        h = np.diag(h)
        shares.append(1 - (left @ h @ left) / (f @ h @ f))
        if radius is not None:
            left = left * radius / np.sqrt(left @ h @ left)
        updates.append(left - retain_weight * g)
        h_of.went_out(updates[-1])
    return np.array(updates), np.array(shares)


FIRST = np.arange(WIDTH) < 13  # all leaves but "b/v"
SETTINGS = {
    "euclidean": {},
    "adam, radius, older ones on some leaves": {
        "metric": ADAM,
        "radius": 0.5,
        "remember": lambda path: path in ("a", "b/scalar"),
    },
    "adam, joint, no memory": {"metric": ADAM, "retain_weight": 0.3, "memory": 0},
}


@functools.cache
def _found(name):
    return vectors(project_retain(**{"memory": MEMORY} | SETTINGS[name]), *draw(0))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.usefixtures("x64")
def test_the_update_is_the_forget_gradient_times_the_projector_for_the_last_retained_gradients(name):
    settings = dict(SETTINGS[name])
    remembered = FIRST if settings.pop("remember", None) else ALL
    expected, shares = naive(*draw(0), remembered=remembered, **settings)
    found, state = _found(name)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(state.removed, shares[-1], rtol=1e-10)
    assert int(state.seen) == len(expected)


@pytest.mark.usefixtures("x64")
def test_a_radius_is_the_length_of_the_step_in_the_metric_and_keeps_its_direction():
    chosen, rejected = draw(0)
    h_of = NaiveMetric(ADAM)
    for step, (u, f) in enumerate(zip(_found("adam, radius, older ones on some leaves")[0], rejected, strict=True)):
        columns = kept(chosen, step).T.copy()
        columns[~FIRST, :-1] = 0
        h = foreseen(h_of, columns, f)
        assert np.sqrt(u @ (h * u)) == pytest.approx(0.5, rel=1e-12)
        np.testing.assert_allclose((h * u) @ columns, 0, atol=1e-12 * np.linalg.norm(h * u))
        assert u @ (h * f) > 0
        h_of.went_out(u)


@pytest.mark.usefixtures("x64")
def test_an_even_step_of_adam_without_momentum_leaves_the_retained_sum_better_than_the_euclidean_projection_does():
    """Not exactly: the foreseen second moment has the first projection in it, that after the step what went out."""
    rng = np.random.default_rng(2)
    # coordinates of very different size, as Adam is there for
    chosen, rejected = rng.standard_normal((2, 60, WIDTH)) * np.exp(rng.uniform(-2, 2, WIDTH))
    adam = optax.scale_by_adam(b1=0.0, b2=0.99, eps=1e-8)
    leaked = {}
    for name, metric in (("adam", AdamMetric(b2=0.99, eps=1e-8)), ("euclidean", None)):
        with jax.numpy_dtype_promotion("standard"):
            found, _ = vectors(optax.chain(project_retain(0, metric=metric), adam), chosen, rejected)
        cosines = np.sum(found * chosen, 1) / np.linalg.norm(found, axis=1) / np.linalg.norm(chosen, axis=1)
        leaked[name] = np.abs(cosines[30:]).mean()
    assert leaked["adam"] < leaked["euclidean"] / 5
    assert leaked["adam"] > 1e-6  # it is not exact, as is said


def _retained_sequences():
    """Name to chosen and rejected gradients ``[steps, 18]`` and the bound on cosines with older retained gradients.

    Directions whose eigenvalue is below 1e-5 of the largest, at most 4, are not solved for: an older gradient has at most
    sqrt(4e-5) = 6.3e-3 of its length in them, and no more than its own distance from the others.
    """
    rng = np.random.default_rng(3)
    steps, found = 9, {}
    base, forget = rng.standard_normal(WIDTH), rng.standard_normal((steps, WIDTH))
    found["random"] = rng.standard_normal((steps, WIDTH)), forget, 1e-6
    for size, bound in ((1e-1, 1e-6), (1e-2, 6.4e-3), (1e-3, 6.4e-3), (1e-5, 1e-4), (0.0, 1e-6)):
        found[f"the same but for {size:g}"] = base + size * rng.standard_normal((steps, WIDTH)), forget + base, bound
    scales = 10.0 ** rng.uniform(-10, 10, (2, steps, 1))
    scales[:, :4, 0] = [[1e-10, 1e10, 1e-10, 1e10], [1e10, 1e-10, 1e10, 1e-10]]
    found["scales"] = rng.standard_normal((steps, WIDTH)) * scales[0], forget * scales[1], 1e-6
    zero = rng.standard_normal((steps, WIDTH))
    zero[[0, 4, 5]] = 0
    found["zeros among them"] = zero, forget, 1e-6
    found["all zero"] = 0 * zero, forget, 1e-6
    opposite = np.where(np.arange(steps)[:, None] % 2, -1.0, 2.0) * base
    found["parallel"] = opposite, forget, 1e-6
    return found


@pytest.mark.parametrize("metric", [None, ADAM], ids=["euclidean", "adam"])
def test_the_step_is_orthogonal_to_every_retained_gradient_in_single_precision(metric):
    sequences = _retained_sequences()
    if metric is not None:
        # where directions are not solved for, the metric that a first projection leads to is not the exact one's
        sequences = {name: s for name, s in sequences.items() if s[2] == 1e-6}
    chosen, rejected = (np.float32([s[i] for s in sequences.values()]) for i in (0, 1))
    updates, _ = many(chosen, rejected, metric)
    for name, g, f, u in zip(sequences, *map(np.float64, (chosen, rejected)), updates, strict=True):
        h_of, worst = NaiveMetric(metric), {"older": 0.0, "current": 0.0}
        for step in range(len(g)):
            h = foreseen(h_of, kept(g, step).T, f[step])
            length = lambda v, h=h: np.sqrt(np.sum(h * v * v, -1))  # noqa: E731
            retained = kept(g, step)
            cosines = abs(retained @ (h * u[step])) / np.maximum(length(retained) * length(f[step]), 1e-300)
            worst = {"older": max(worst["older"], *cosines), "current": max(worst["current"], cosines[-1])}
            assert np.linalg.norm(u[step]) > 0.01 * np.linalg.norm(f[step]), name  # something is left to be orthogonal
            h_of.went_out(u[step])
        assert worst["current"] < 1e-6 and worst["older"] < sequences[name][2], (name, worst)


def test_retained_gradients_that_are_all_but_alike_count_as_one():
    """What they differ by is far below what products are good to: nothing may be solved for along it."""
    rng = np.random.default_rng(14)
    base, forget = rng.standard_normal(WIDTH), rng.standard_normal((9, WIDTH))
    sizes = 0.0, 1e-6, 1e-5, 1e-4
    chosen = np.float32([base + size * rng.standard_normal((9, WIDTH)) for size in sizes])
    found, _ = many(chosen, np.float32([forget] * 4))
    for size, u, g in zip(sizes, found, np.float64(chosen), strict=True):
        alone, _ = naive(g, forget, memory=0)
        distance = np.linalg.norm(u - alone, axis=1) / np.linalg.norm(forget, axis=1)
        assert distance.max() < 2 * size + 1e-6  # the one that they count as is as far from the current one as they are


@pytest.mark.parametrize(("metric", "radius"), [(None, None), (None, 2.0), (ADAM, None)])
def test_a_forget_gradient_in_the_span_gives_no_step_at_all_whatever_the_radius(metric, radius):
    chosen = np.float32(draw(4, 8)[0])
    older = chosen[np.maximum(np.arange(8) - MEMORY, 0)]
    outside = np.float32(draw(5, 8)[0])
    # float32 combinations, so that they are in the span to rounding only
    forgets = [
        chosen,
        older,
        chosen - np.float32(0.5) * older,
        np.float32(1e8) * older,
        0 * chosen,
        chosen + outside / 16,
    ]
    (*inside, beside), removed = many(np.stack([chosen] * 6), np.stack(forgets), metric, radius)
    np.testing.assert_array_equal(inside, np.zeros((5, 8, WIDTH)))
    np.testing.assert_allclose(removed[:5], np.repeat([[1, 1, 1, 1, 0]], 8, 0).T, atol=1e-6)
    assert np.all(np.linalg.norm(beside, axis=1) > 0.01)
    if metric is None and radius is not None:
        np.testing.assert_allclose(np.linalg.norm(beside, axis=1), radius, rtol=1e-5)


def test_the_current_sum_is_left_alone_even_where_rounding_is_brought_to_the_radius():
    """Nearly dependent retained gradients and a forget gradient nearly in their span: what is left is mostly rounding."""
    rng = np.random.default_rng(6)
    sizes = 10.0 ** rng.uniform(-4, -1, (10, 1, 1))
    chosen = np.float32(rng.standard_normal((10, 1, WIDTH)) + sizes * rng.standard_normal((10, 9, WIDTH)))
    u, _ = many(chosen, np.roll(chosen, 1, 1), radius=2.0)
    g = np.float64(chosen)
    lengths = np.linalg.norm(u, axis=-1)
    made = lengths > 0
    assert 10 < made.sum() < made.size
    np.testing.assert_allclose(lengths[made], 2.0, rtol=1e-5)
    cosines = np.abs(np.sum(u * g, -1)) / np.linalg.norm(g, axis=-1)
    assert cosines[made].max() < 1e-6


def test_half_precision_is_rounded_once_at_the_end():
    chosen, rejected = (np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), np.float64) for x in draw(7))
    found, state = vectors(project_retain(MEMORY, retain_weight=0.7), chosen, rejected, jnp.bfloat16)
    expected, _ = naive(chosen, rejected, retain_weight=0.7)
    # 2^-8: half a unit of bfloat16's 8 bits
    np.testing.assert_allclose(found, expected, rtol=2**-8 + 1e-6, atol=1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.earlier)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_state_holds_the_remembered_leaves_alone_each_with_a_leading_axis_of_the_memory(dtype):
    params = rows_to_tree(np.zeros(WIDTH), dtype)
    state = project_retain(5, remember=lambda path: path.startswith("b/")).init(params)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state.earlier)] == [((5,), dtype), ((5, 5), dtype)]
    assert state.second_moment == ()
    state = project_retain(0, metric=ADAM).init(params)
    assert state.earlier == ()
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state.second_moment)] == [
        (s, jnp.float32) for s in ((3, 4), (), (5,))
    ]
    inner = optax.chain(FORGET, optax.sgd(0.1))
    assert [leaf.shape for leaf in jax.tree.leaves(retain_invariant(inner, 2).init(params).retain.earlier)] == [
        (2, 3, 4),
        (2,),
        (2, 5),
    ]


def test_what_is_remembered_are_the_last_gradients_in_a_ring():
    chosen, rejected = draw(8, 7)
    _, state = vectors(project_retain(3), chosen, rejected, jnp.float32)
    # step t lies in place t mod 3: 6, 4, 5
    np.testing.assert_array_equal(
        np.concatenate([np.reshape(x, (3, -1)) for x in jax.tree.leaves(state.earlier)], 1),
        np.float32(chosen[[6, 4, 5]]),
    )


BAD = {
    "nan in chosen": (0, jnp.nan),
    "nan in rejected": (1, jnp.nan),
    "inf": (0, jnp.inf),
    "square of chosen too large": (0, 1e25),
    "square of rejected too large": (1, 1e25),
}


@pytest.mark.parametrize("settings", [{}, {"metric": ADAM}, {"memory": 1}], ids=str)
def test_a_bad_gradient_gives_nan_and_is_not_remembered(settings):
    chosen, rejected = np.float32(draw(9, 6))
    expected, _ = naive(*map(np.float64, (chosen, rejected)), **settings)
    sequences = np.stack([np.insert(np.stack([chosen, rejected]), 3, np.ones(WIDTH), 1)] * len(BAD), 1)
    for case, (side, value) in enumerate(BAD.values()):
        sequences[side, case, 3, 4] = value
    if "memory" in settings:
        tx = retain_invariant(optax.chain(FORGET, optax.scale(1.0)), **settings)
        trees = (rows_to_tree(rows, jnp.float32) for rows in sequences)
        updates = tree_to_rows(jax.jit(jax.vmap(functools.partial(run, tx)))(*trees)[0], 2)
    else:
        updates, _ = many(*sequences, **settings)
    for case, row in zip(BAD, updates, strict=True):
        assert np.isnan(row[3]).all(), case
        np.testing.assert_allclose(np.delete(row, 3, 0), expected, rtol=1e-4, atol=1e-5, err_msg=case)


def test_protect_chosen_passes_a_bad_gradient_on():
    tx = protect_chosen(optax.chain(combine_pair(margin()), optax.sgd(1.0)))
    # -1e25 beside 1e-20: the product is finite, the square is not
    for bad in (jnp.array([jnp.nan, 1.0]), jnp.array([jnp.inf, 1.0]), jnp.array([1e25, 1.0])):
        updates, _ = tx.update(PairGradients(bad, jnp.ones(2)), tx.init(jnp.zeros(2)))
        assert not bool(jnp.isfinite(updates).all())


INNERS = {
    "adam": optax.chain(FORGET, optax.adam(0.1, b1=0.9)),
    "adamw": optax.chain(FORGET, optax.adamw(0.1, weight_decay=0.3)),
    "sgd": optax.chain(FORGET, optax.sgd(0.1, momentum=0.9)),
}


@pytest.mark.parametrize(("name", "memory"), [("adam", 0), ("adamw", MEMORY), ("sgd", 0)])
@pytest.mark.usefixtures("standard_promotion")
def test_retain_invariant_takes_the_span_from_whatever_the_optimizer_makes(name, memory):
    chosen, rejected = np.float32(draw(10, 8))
    params = rows_to_tree(np.linspace(-1, 1, WIDTH), jnp.float32)
    trees = tuple(rows_to_tree(rows, jnp.float32) for rows in (chosen, rejected))
    tx = retain_invariant(INNERS[name], memory)
    updates, state = jax.jit(functools.partial(run, tx))(*trees, params)
    plain, inside = jax.jit(functools.partial(run, INNERS[name]))(*trees, params)
    found, given = tree_to_rows(updates, 1), tree_to_rows(plain, 1)
    for step, (u, v) in enumerate(zip(found, given, strict=True)):
        retained = np.float64(kept(chosen, step, memory))
        scale = np.linalg.norm(retained, axis=1) * np.linalg.norm(v)
        assert np.max(abs(retained @ u) / scale) < 1e-6
        assert np.max(abs(retained @ v) / scale) > 1e-3  # the chain alone does not leave it
        left = v - retained.T @ np.linalg.lstsq(retained.T, v)[0]  # nothing but the span is taken
        np.testing.assert_allclose(u, left, rtol=0, atol=1e-6 * np.linalg.norm(v))
    np.testing.assert_allclose(state.retain.removed, 1 - (left @ left) / (v @ v), atol=1e-5)
    for a, b in zip(jax.tree.leaves(state.inner), jax.tree.leaves(inside), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)  # the chain inside goes its own way


def test_retain_invariant_remembers_older_gradients_on_the_chosen_leaves_only():
    chosen, rejected = draw(11, 5)
    inner = optax.chain(FORGET, optax.sgd(1.0))
    found, state = vectors(
        retain_invariant(inner, 2, remember=lambda path: path != "b/v"), chosen, rejected, jnp.float32
    )
    expected, _ = naive(chosen, rejected, remembered=FIRST, memory=2)
    np.testing.assert_allclose(found, -expected, atol=1e-5)
    assert [leaf.shape for leaf in jax.tree.leaves(state.retain.earlier)] == [(2, 3, 4), (2,)]


def test_no_step_of_the_chain_inside_removes_nothing():
    tx = retain_invariant(optax.chain(FORGET, optax.set_to_zero()), 1)
    g = jnp.array([1.0, 2.0])
    updates, state = jax.jit(tx.update)(PairGradients(g, g), tx.init(g))
    assert updates.tolist() == [0, 0] and float(state.retain.removed) == 0


@pytest.mark.parametrize("wrap", [retain_invariant, protect_chosen])
def test_micro_batches_are_not_accumulated_inside_of_a_wrapper(wrap):
    params = jnp.zeros(2)
    for inner in (
        transforms.accumulate_pairs(optax.chain(FORGET, optax.sgd(1.0)), 2),
        optax.chain(FORGET, optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()),
    ):
        with pytest.raises(
            ValueError, match=rf"accumulate around it, as in accumulate_pairs\({wrap.__name__}\(chain\)"
        ):
            wrap(inner).init(params)


@pytest.mark.parametrize("wrap", [retain_invariant, protect_chosen])
def test_a_chain_without_a_head_inside_of_a_wrapper_is_named(wrap):
    g = {"w": jnp.ones(2)}
    tx = wrap(optax.trace(0.9))
    with pytest.raises(
        TypeError, match=f"the chain inside of {wrap.__name__} takes one gradient tree.*put combine_pair"
    ):
        tx.update(PairGradients(g, g), tx.init(g))


@pytest.mark.parametrize("wrap", [lambda inner, **k: retain_invariant(inner, 2, **k), protect_chosen])
def test_what_is_not_trained_does_not_move_and_counts_for_nothing(wrap):
    chosen = {"body": jnp.array([1.0, 0.0]), "backbone": jnp.array([3.0, 1.0])}
    rejected = {"body": jnp.array([2.0, 1.0]), "backbone": jnp.array([-5.0, 1.0])}
    freeze = optax.multi_transform(
        {"train": optax.sgd(1.0), "freeze": optax.set_to_zero()}, {"body": "train", "backbone": "freeze"}
    )
    tx = wrap(optax.chain(combine_pair(margin()), freeze), where=lambda path: path == "body")
    updates, _ = tx.update(PairGradients(chosen, rejected), tx.init(chosen), chosen)
    # the plain step chosen - rejected = (-1, -1) lowers the chosen sum by its first entry
    np.testing.assert_allclose(updates["body"], [0.0, -1.0], atol=1e-6)
    assert updates["backbone"].tolist() == [0, 0]


def test_project_retain_gives_zero_to_what_is_not_trained():
    chosen = {"body": jnp.array([1.0, 0.0]), "backbone": jnp.array([3.0, 1.0])}
    rejected = {"body": jnp.array([2.0, 1.0]), "backbone": jnp.array([-5.0, 1.0])}
    tx = project_retain(2, metric=ADAM, where=lambda path: path == "body")
    state = tx.init(chosen)
    assert [leaf.shape for leaf in jax.tree.leaves(state.earlier)] == [(2, 2)]
    assert len(jax.tree.leaves(state.second_moment)) == 1
    updates, _ = tx.update(PairGradients(chosen, rejected), state)
    np.testing.assert_allclose(updates["body"], [0.0, 1.0], atol=1e-6)
    assert updates["backbone"].tolist() == [0, 0]


@pytest.mark.parametrize("wrap", [lambda inner: retain_invariant(inner, 2), protect_chosen])
def test_a_step_that_the_chain_inside_passes_over_stays_so(wrap):
    inner = optax.chain(combine_pair(margin()), optax.apply_if_finite(optax.sgd(1.0), 3))
    tx, params = wrap(inner), jnp.zeros(2)
    state = tx.init(params)
    bad, state = tx.update(PairGradients(jnp.array([jnp.nan, 1.0]), jnp.ones(2)), state, params)
    good, _ = tx.update(PairGradients(jnp.array([1.0, 0.0]), jnp.array([2.0, 1.0])), state, params)
    assert bad.tolist() == [0, 0]
    np.testing.assert_allclose(good, [0.0, -1.0], atol=1e-6)


@pytest.mark.parametrize("memory", [1, 8])
def test_a_smooth_course_of_retained_gradients_never_makes_the_step_longer(memory):
    """Step after step they differ by less and less independent parts: each pivot is sound, the whole Gram is not."""
    rng = np.random.default_rng(10)
    steps, width = 40, 400
    parts = rng.standard_normal((12, width))
    times = np.linspace(0, 1.5, steps)[:, None]
    course = sum(times**n / math.factorial(n) * part for n, part in enumerate(parts))
    forget = rng.standard_normal((steps, width)) + course
    trees = PairGradients(*(jnp.asarray(x, jnp.float32) for x in (course, forget)))
    tx = retain_invariant(optax.chain(FORGET, optax.sgd(1.0)), memory)

    def step(state, gradients):
        updates, state = tx.update(gradients, state)
        return state, updates

    _, updates = jax.jit(lambda g: jax.lax.scan(step, tx.init(g.chosen[0]), g))(trees)
    lengths, plain = (np.linalg.norm(x, axis=1) for x in (updates, np.float32(forget)))
    assert np.all(lengths <= plain * (1 + 1e-6))
    assert np.all(lengths > 0.3 * plain)
    cosines = np.abs(np.sum(np.float64(updates) * course, 1)) / lengths / np.linalg.norm(course, axis=1)
    assert cosines.max() < 1e-6


@pytest.mark.usefixtures("standard_promotion")
def test_protect_chosen_takes_only_what_lowers_the_chosen_sum():
    chosen, rejected = np.float32(draw(12, 24))
    rejected[:12] += 2 * chosen[:12]  # conflicts
    params = rows_to_tree(np.linspace(-1, 1, WIDTH), jnp.float32)
    trees = tuple(rows_to_tree(rows, jnp.float32) for rows in (chosen, rejected))
    inner = optax.chain(combine_pair(margin()), optax.adamw(0.1, weight_decay=0.3))
    updates, state = jax.jit(functools.partial(run, protect_chosen(inner)))(*trees, params)
    plain, inside = jax.jit(functools.partial(run, inner))(*trees, params)
    u, v, g = tree_to_rows(updates, 1), tree_to_rows(plain, 1), np.float64(chosen)
    before = np.sum(g * v, 1)
    lengths = np.linalg.norm(g, axis=1) * np.linalg.norm(v, axis=1)
    harmless = before >= 0
    assert 5 < harmless.sum() < 19
    np.testing.assert_allclose(u[harmless], v[harmless], rtol=0, atol=1e-7)  # two programs round differently
    assert np.all(np.sum(g * u, 1) > -1e-6 * lengths)
    expected = v - np.minimum(before, 0)[:, None] / np.sum(g * g, 1)[:, None] * g
    np.testing.assert_allclose(u, expected, atol=1e-6)
    assert jax.tree.structure(state.inner) == jax.tree.structure(inside)
    taken = np.sum((v - expected) ** 2, 1) / np.sum(v**2, 1)
    for steps in (5, 24):
        first = (jax.tree.map(lambda rows, steps=steps: rows[:steps], tree) for tree in trees)
        _, after = run(protect_chosen(inner), *first, params)
        np.testing.assert_allclose(after.removed, taken[steps - 1], atol=1e-6)
    assert not harmless[4] and harmless[23] and after.removed == 0


def test_protect_chosen_with_no_chosen_gradient_changes_nothing():
    tx = protect_chosen(optax.chain(combine_pair(margin()), optax.sgd(1.0)))
    updates, _ = tx.update(PairGradients(jnp.zeros(2), jnp.array([1.0, -2.0])), tx.init(jnp.zeros(2)))
    assert updates.tolist() == [-1, 2]


# the promise on a model


@jax.jit
def _coefficients_and_gradients(params, reference, batch):
    log_probs = pair_log_probs(MODELS["mlp"](params, batch), MODELS["mlp"](reference, batch), batch)
    d = losses.coefficients(losses.dpo, log_probs)
    return d, geometry.pair_vjp(MODELS["mlp"], params, batch)[1](*d)


@functools.cache
def _model():
    params, reference = (draw_params("mlp", seed, jnp.float64) for seed in (0, 1))
    batches = [draw_pairs(seed) for seed in range(4)]
    ds, gradients = zip(*(_coefficients_and_gradients(params, reference, batch) for batch in batches), strict=True)
    return params, batches, ds, gradients


@jax.jit
def _sums(params):
    """What the gradients of every batch are gradients of: coefficient-weighted means of log-probabilities, ``[4, 2]``."""
    _, batches, ds, _ = _model()
    log_probs = MODELS["mlp"](params, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches))
    d = jnp.stack([jnp.stack(d, 1) for d in ds])
    return jnp.mean(d * log_probs.reshape(d.shape), 1)


def _changes(step, size):
    """Of every batch's two sums after `size` times the step."""
    params = _model()[0]
    moved = jax.tree.map(lambda p, u: p + size * u, params, step)
    return np.asarray(_sums(moved)) - np.asarray(_sums(params))


def _last_step(tx):
    """The update for the last of four batches, all at the same parameters."""
    params, _, _, gradients = _model()
    sequence = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    updates, _ = jax.jit(functools.partial(run, tx))(*sequence, params)
    return jax.tree.map(lambda x: x[-1], updates)


@pytest.mark.usefixtures("x64")
def test_on_a_model_the_retained_sums_change_to_second_order_and_the_forget_sum_falls():
    step = _last_step(optax.chain(project_retain(MEMORY), optax.sgd(1.0)))
    whole, half = _changes(step, 1e-3), _changes(step, 5e-4)
    np.testing.assert_allclose(whole[:, 0] / half[:, 0], 4, rtol=0.02)  # all four batches' chosen sums
    lost = geometry.inner_product(step, step)  # <rejected, -P rejected> = -|P rejected|^2
    assert whole[3, 1] == pytest.approx(-1e-3 * float(lost), rel=0.02) and lost > 0


@pytest.mark.usefixtures("x64")
def test_on_a_model_the_plain_forget_step_changes_the_retained_sums_to_first_order():
    step = _last_step(optax.chain(FORGET, optax.sgd(1.0)))
    whole, half = _changes(step, 1e-3), _changes(step, 5e-4)
    np.testing.assert_allclose(whole[:, 0] / half[:, 0], 2, rtol=0.02)


@pytest.mark.usefixtures("x64", "standard_promotion")
def test_on_a_model_the_promise_holds_for_the_step_that_adam_makes():
    step = _last_step(retain_invariant(optax.chain(FORGET, optax.adam(1.0, b1=0.9)), MEMORY))
    np.testing.assert_allclose(_changes(step, 1e-4)[:, 0] / _changes(step, 5e-5)[:, 0], 4, rtol=0.05)


# optax


ADAMW = optax.chain(combine_pair(margin()), optax.adamw(0.1, weight_decay=0.1))
TRANSFORMS = {
    "project_retain": project_retain(2),
    "project_retain, all settings": project_retain(
        2, metric=AdamMetric(), radius=0.5, retain_weight=0.1, remember=lambda path: path == "a"
    ),
    "retain_invariant": retain_invariant(ADAMW, 2),
    "retain_invariant, plain": retain_invariant(optax.chain(FORGET, optax.scale(1.0)), 2),
    "protect_chosen": protect_chosen(ADAMW),
}


def signature(tree):
    return jax.tree.structure(tree), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


def mixed(rows):
    """`rows_to_tree`, one part of it in float32 and one in bfloat16."""
    return {"a": rows_to_tree(rows, jnp.float32)["a"], "b": rows_to_tree(rows, jnp.bfloat16)["b"], "frozen": None}


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if "plain" not in name])
@pytest.mark.usefixtures("standard_promotion")
def test_laws_of_optax(name):
    tx = TRANSFORMS[name]
    params = mixed(np.linspace(-1, 1, WIDTH))
    gradients = PairGradients(*map(mixed, draw(13)[:, 0]))
    state = tx.init(params)
    assert signature(jax.eval_shape(tx.init, params)) == signature(state)
    traces = []

    @functools.partial(jax.jit, donate_argnums=1)  # every array of the state has a buffer of its own
    def update(gradients, state):
        traces.append(None)
        return tx.update(gradients, state, params, value=1.0, unknown="swallowed")

    right = signature(state)
    updates, after = update(gradients, state)
    assert signature(after) == right
    assert signature(updates) == signature(params)
    update(gradients, after)
    assert len(traces) == 1  # the second call is served by the first compilation


@pytest.mark.parametrize("name", ["project_retain, all settings", "retain_invariant, plain"])
@pytest.mark.parametrize(("params", "gradients"), [("float64", "float32"), ("float32", "float64")])
@pytest.mark.usefixtures("x64")
def test_the_state_keeps_its_dtypes_where_gradients_are_narrower_or_wider_than_the_parameters(name, params, gradients):
    tx = TRANSFORMS[name]
    state = tx.init(jnp.ones(3, params))
    pair = PairGradients(jnp.arange(3, dtype=gradients), jnp.ones(3, gradients))
    updates, after = jax.eval_shape(tx.update, pair, state)
    assert signature(after) == signature(state)
    assert updates.dtype == gradients


@pytest.mark.parametrize("wrap", [functools.partial(retain_invariant, memory=0), protect_chosen])
def test_extra_arguments_reach_the_chain_inside(wrap):
    scaled = optax.GradientTransformationExtraArgs(
        optax.init_empty_state, lambda u, s, p=None, *, factor, **_: (jax.tree.map(lambda x: factor * x, u), s)
    )
    tx = wrap(optax.chain(FORGET, scaled))
    gradients = PairGradients(jnp.array([0.0, 1.0]), jnp.array([-1.0, 0.0]))
    updates, _ = jax.jit(tx.update)(gradients, tx.init(jnp.zeros(2)), factor=jnp.float32(3.0))
    np.testing.assert_allclose(updates, [-3.0, 0.0], atol=1e-6)


def test_states_of_projections_are_found_however_deep():
    inside = optax.chain(project_retain(1), optax.sgd(1.0))
    state = optax.named_chain(("all", transforms.accumulate_pairs(inside, 2))).init(jnp.zeros(2))
    around = retain_invariant(optax.chain(FORGET, optax.sgd(1.0)), 3).init(jnp.zeros(2))
    assert [jax.tree.leaves(s.earlier)[0].shape for s in transforms.retained({"a": (state,), "b": around})] == [
        (1, 2),
        (3, 2),
    ]
    assert transforms.retained(optax.adam(1.0).init(jnp.zeros(2))) == []


def test_settings_may_be_injected():
    tx = optax.inject_hyperparams(project_retain, static_args=("memory", "metric"))(
        memory=1, retain_weight=0.5, radius=2.0
    )
    g = PairGradients(jnp.array([1.0, 0.0]), jnp.array([3.0, 4.0]))
    state = tx.init(g.chosen)
    np.testing.assert_allclose(tx.update(g, state)[0], [-0.5, 2.0], rtol=1e-6)  # 2 (0, 1) - 0.5 (1, 0)
    state.hyperparams["radius"] = jnp.float32(1.0)
    np.testing.assert_allclose(tx.update(g, state)[0], [-0.5, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": -1}, "memory: -1 is no whole number from 0 up"),
        ({"memory": 1.5}, "memory: 1.5 is no whole number from 0 up"),
        ({"retain_weight": -0.1}, r"retain_weight: -0.1 is not in \[0, inf\)"),
        ({"radius": 0.0}, r"radius: 0 is not in \(0, inf\)"),
        ({"metric": AdamMetric(b2=1.0)}, r"b2: 1 is not in \[0, 1\)"),
        ({"metric": AdamMetric(eps=-1.0)}, r"eps: -1 is not in \[0, inf\)"),
    ],
)
def test_settings_outside_of_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        project_retain(**settings)


def test_a_negative_memory_of_retain_invariant_is_refused():
    with pytest.raises(ValueError, match="memory: -2 is no whole number from 0 up"):
        retain_invariant(FORGET, -2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": "3"}, "memory: a whole number is needed, got '3'"),
        ({"metric": "adam"}, "metric: AdamMetric.* got 'adam'"),
        ({"metric": AdamMetric}, "metric: AdamMetric.* got <class"),
        ({"radius": "1"}, "radius: a number is needed, got '1'"),
    ],
)
def test_settings_of_another_type_are_refused(settings, message):
    with pytest.raises(TypeError, match=message):
        project_retain(**settings)


@pytest.mark.parametrize("name", ["where", "remember"])
def test_what_should_be_a_function_of_a_path_is_refused(name):
    message = rf"^{name}: a function of a parameter's path is needed, got \['w'\]"
    with pytest.raises(TypeError, match=message):
        project_retain(**{name: ["w"]})
    with pytest.raises(TypeError, match=message):
        retain_invariant(FORGET, **{name: ["w"]})
    if name == "where":
        with pytest.raises(TypeError, match=message):
            protect_chosen(FORGET, where=["w"])


def test_an_injected_memory_names_the_fix():
    params = {"w": jnp.ones(2)}
    with pytest.raises(TypeError, match=r"memory: .*static_args='memory'"):
        optax.inject_hyperparams(project_retain)(memory=2).init(params)
    tx = optax.inject_hyperparams(project_retain, static_args="memory")(memory=2, retain_weight=0.5)
    updates, _ = jax.jit(tx.update)(PairGradients(params, params), tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.5, -0.5], atol=1e-6)


def test_an_injected_radius_under_strict_promotion():
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    tx = optax.inject_hyperparams(lambda r: project_retain(0, radius=r))(r=2.0)
    gradients = PairGradients({"w": jnp.array([1, 0], jnp.bfloat16)}, {"w": jnp.array([1, 1], jnp.bfloat16)})
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    assert updates["w"].tolist() == [0, 2]


@pytest.mark.parametrize("wrapper", [protect_chosen, retain_invariant])
def test_a_guard_after_the_wrapper_passes_over_what_overflows(wrapper):
    inner = optax.chain(combine_pair(margin()), optax.sgd(0.1))
    params = jnp.zeros(2)
    too_large = PairGradients(jnp.array([1e25, 1.0]), jnp.array([1.0, 1.0]))
    bare, guarded = wrapper(inner), optax.chain(wrapper(inner), optax.apply_if_finite(optax.identity(), 5))
    assert np.all(np.isnan(bare.update(too_large, bare.init(params), params)[0]))
    assert guarded.update(too_large, guarded.init(params), params)[0].tolist() == [0, 0]


@pytest.mark.parametrize("changed", [{"w": (2,), "new": (1,)}, {"w": (3,)}], ids=str)
@pytest.mark.parametrize(
    "tx",
    [project_retain(2), project_retain(0, metric=AdamMetric()), retain_invariant(FORGET, 2)],
    ids=["euclidean", "adam", "invariant"],
)
def test_gradients_unlike_the_parameters_are_refused(tx, changed):
    other = {name: jnp.ones(shape) for name, shape in changed.items()}
    with pytest.raises(
        ValueError, match=r"gradients of shapes \[.*\], but the state was made for parameters of \[\(2,\)\]"
    ):
        tx.update(PairGradients(other, other), tx.init({"w": jnp.ones(2)}), other)


@pytest.mark.parametrize("name", ["project_retain", "retain_invariant", "protect_chosen"])
def test_updates_that_are_not_pair_gradients_are_refused(name):
    tx = TRANSFORMS[name]
    with pytest.raises(TypeError, match=f"{name} takes PairGradients, got dict: put it first in the chain"):
        tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))
