"""Many gradients into one: every rule against its definition on the vectors themselves, and balanced losses on a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from entangle import losses, transforms
from entangle.transforms import adaptive_balance, combine_groups, group_mean, projected_on_last, soft_aggregation
from entangle.types import PairGradients
from tests.toy import MODELS, draw_pairs, draw_params, flatten, pair_log_probs

WIDTH = 12
LOSSES = np.array([0.5, 2.0, 0.125])


def rows_to_tree(rows, dtype=jnp.float32):
    """Rows ``[..., N, 12]`` as leaves ``[..., N, ...]`` of unequal ranks, with a scalar."""
    lead = rows.shape[:-1]
    tree = {"a": rows[..., :6].reshape(*lead, 2, 3), "b": (rows[..., 6], rows[..., 7:]), "frozen": None}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def tree_to_rows(tree, lead):
    leaves = [
        np.asarray(leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf) for leaf in jax.tree.leaves(tree)
    ]
    return np.concatenate([leaf.astype(np.float64).reshape(*leaf.shape[:lead], -1) for leaf in leaves], -1)


# the definitions


def _unit(v):
    """A zero vector stays one."""
    return v / (np.linalg.norm(v) or 1.0)


def _soft(rows, temperature):
    units = [_unit(g) for g in rows]
    agreement = [sum(u @ v for j, v in enumerate(units) if j != i) for i, u in enumerate(units)]
    weights = np.exp(np.array(agreement) / temperature)
    return weights @ rows / weights.sum()


def _projected(rows):
    target = _unit(rows[-1])
    return np.mean([(g @ target) * target for g in rows[:-1]], 0)


RULES = {
    "group_mean": (group_mean(), lambda rows: rows.mean(0)),
    "soft_aggregation": (soft_aggregation(), lambda rows: _soft(rows, 1.0)),
    "soft_aggregation, colder": (soft_aggregation(0.25), lambda rows: _soft(rows, 0.25)),
    "projected_on_last": (projected_on_last(), _projected),
    "adaptive_balance": (adaptive_balance(), lambda rows: LOSSES @ rows / 2.625),
}


def _cases():
    rng = np.random.default_rng(0)
    draw = lambda: rng.standard_normal((3, WIDTH))  # noqa: E731
    one = draw()[0]
    found = {
        "random": draw(),
        "alike": draw() + 2 * one,
        "equal": np.stack([one] * 3),
        "opposite": np.stack([one, -one, one]),
    }
    found |= {f"zero row {i}": draw() * (np.arange(3) != i)[:, None] for i in range(3)}
    found |= {"all zero": 0 * draw(), "small": 1e-12 * draw(), "large": 1e12 * draw()}
    found |= {f"scales {i}": draw() * np.roll([1e-10, 1.0, 1e10], i)[:, None] for i in range(3)}
    return found


def _combined(rule, rows, dtype=jnp.float32, groups=3, **extra):
    """Updates of many cases at once, and the states."""
    tx = combine_groups(rule, groups)
    tree = rows_to_tree(rows, dtype)
    state = tx.init(jax.tree.map(lambda x: x[0, 0], tree))
    updates, states = jax.jit(jax.vmap(lambda u: tx.update(u, state, **extra)))(tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    return tree_to_rows(updates, 1), states


@pytest.mark.parametrize("name", RULES)
def test_the_update_is_the_definition_on_the_vectors_themselves(name):
    rule, definition = RULES[name]
    cases = _cases()
    rows = np.float32(list(cases.values()))
    found, states = _combined(rule, rows, group_losses=jnp.asarray(LOSSES, jnp.float32))
    for case, u, g in zip(cases, found, np.float64(rows), strict=True):
        # products are good to the lengths that are multiplied: so is what is added up
        scale = np.linalg.norm(g, axis=1).max()
        np.testing.assert_allclose(u, definition(g), rtol=0, atol=1e-6 * scale, err_msg=case)
    np.testing.assert_allclose(states.gram[0], rows[0] @ rows[0].T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.einsum("cn,cnp->cp", states.weights[:4], rows[:4]), found[:4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["soft_aggregation", "adaptive_balance"])
def test_half_precision_is_rounded_once_at_the_end(name):
    rule, definition = RULES[name]
    rows = np.asarray(jnp.asarray(_cases()["random"], jnp.bfloat16).astype(jnp.float32), np.float64)
    found, states = _combined(rule, rows[None], jnp.bfloat16, group_losses=jnp.asarray(LOSSES, jnp.bfloat16))
    np.testing.assert_allclose(found[0], definition(rows), rtol=2**-8 + 1e-5)  # half a unit of bfloat16's 8 bits
    assert states.gram.dtype == states.weights.dtype == jnp.float32


@pytest.mark.parametrize("rule", [group_mean(), soft_aggregation(), adaptive_balance()])
def test_one_group_is_left_as_it_is(rule):
    rows = np.random.default_rng(1).standard_normal((1, 1, WIDTH))
    found, _ = _combined(rule, rows, groups=1, group_losses=jnp.array([3.0]))
    np.testing.assert_allclose(found[0], rows[0, 0], rtol=1e-6)


def test_two_groups_are_softly_aggregated_to_their_mean_whatever_their_angle():
    rows = np.random.default_rng(2).standard_normal((4, 2, WIDTH))
    found, _ = _combined(soft_aggregation(0.1), rows, groups=2)
    np.testing.assert_allclose(found, rows.mean(1), atol=1e-6)


def test_losses_that_are_all_zero_weigh_the_same():
    assert adaptive_balance()(jnp.eye(4), jnp.zeros(4)).tolist() == [0.25] * 4


def test_balanced_weights_have_no_derivative_in_the_losses():
    weights = lambda losses: jnp.sum(adaptive_balance()(jnp.eye(2), losses) * jnp.array([1.0, 3.0]))  # noqa: E731
    assert jax.grad(weights)(jnp.array([3.0, 1.0])).tolist() == [0, 0]


@pytest.mark.parametrize("name", ["group_mean", "soft_aggregation", "projected_on_last", "adaptive_balance"])
def test_a_bad_row_gives_no_plausible_step(name):
    rows = np.stack([_cases()["random"]] * 2)
    rows[0, 0, 7], rows[1, 0, 7] = np.nan, np.inf
    found, _ = _combined(RULES[name][0], rows, group_losses=jnp.asarray(LOSSES, jnp.float32))
    assert not np.isfinite(found).all(1).any()


def test_a_loss_that_is_not_finite_gives_no_plausible_step():
    weights = adaptive_balance()(jnp.eye(2), jnp.array([jnp.nan, 1.0]))
    assert bool(jnp.isnan(weights).all())


# two decoupled pairs, each with a loss of its own


def _decoupled(params, reference, batch):
    """DPO losses of single pairs, ``[2]``."""
    return losses.dpo(pair_log_probs(MODELS["mlp"](params, batch), reference, batch))


@pytest.mark.usefixtures("x64")
def test_balanced_groups_are_the_gradient_of_the_balanced_loss_with_weights_held_fixed():
    params, other = (draw_params("mlp", seed, jnp.float64) for seed in (0, 1))
    batch = draw_pairs(3, pairs=2)
    of = jax.jit(functools.partial(_decoupled, reference=MODELS["mlp"](other, batch), batch=batch))

    @jax.jit
    def balanced(params):
        first, second = of(params)
        weight = jax.lax.stop_gradient(first / (first + second))
        return weight * first + (1 - weight) * second

    tx = optax.chain(
        optax.scale(2.0), combine_groups(adaptive_balance(), 2), optax.identity(), optax.sgd(0.5)
    )  # the losses are handed on
    values, rows = of(params), jax.jit(jax.jacrev(of))(params)
    updates, state = jax.jit(tx.update)(rows, tx.init(params), params, group_losses=values)
    np.testing.assert_allclose(flatten(updates), -flatten(jax.grad(balanced)(params)), rtol=1e-9, atol=1e-12)
    assert abs(state[1].weights[0] - 0.5) > 0.05  # or else the mean would do


# optax


@pytest.mark.parametrize("name", RULES)
def test_laws_of_optax(name):
    tx = combine_groups(RULES[name][0], 3)
    rows = rows_to_tree(_cases()["random"])
    rows["b"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), rows["b"])
    params = jax.tree.map(lambda x: x[0], rows)
    state = tx.init(params)

    def signature(tree):
        return jax.tree.structure(tree), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]

    assert signature(jax.eval_shape(tx.init, params)) == signature(state)
    traces = []

    @functools.partial(jax.jit, donate_argnums=1)  # every array of the state has a buffer of its own
    def update(rows, state):
        traces.append(None)
        return tx.update(rows, state, params, group_losses=jnp.asarray(LOSSES, jnp.float32), unknown="swallowed")

    right = signature(state)
    updates, after = update(rows, state)
    assert signature(after) == right
    assert signature(updates) == signature(params)
    update(rows, after)
    assert len(traces) == 1  # the second call is served by the first compilation


@pytest.mark.parametrize(("params", "rows"), [("float64", "float32"), ("float32", "float64")])
@pytest.mark.usefixtures("x64")
def test_the_state_keeps_its_dtypes_where_rows_are_narrower_or_wider_than_the_parameters(params, rows):
    tx = combine_groups(soft_aggregation(), 2)
    state = tx.init(jnp.ones(3, params))
    updates, after = tx.update(jnp.ones((2, 3), rows), state)
    assert {x.dtype for x in jax.tree.leaves(after)} == {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(params)}
    assert updates.dtype == rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": jnp.ones((2, 3))}, r"combine_groups: leaves need the leading axis of 3 groups, got \[\(2,\)\]"),
        ({"a": jnp.ones((3, 3)), "b": jnp.ones(())}, r"leading axis of 3 groups, got \[\(\), \(3,\)\]"),
    ],
)
def test_leaves_with_another_leading_axis_are_refused(rows, message):
    tx = combine_groups(group_mean(), 3)
    with pytest.raises(ValueError, match=message):
        tx.update(rows, tx.init({"a": jnp.ones(3)}))


def test_pair_gradients_are_refused_with_what_makes_rows_of_them():
    tx = combine_groups(group_mean(), 2)
    pair = PairGradients(jnp.ones((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(TypeError, match=r"combine_groups takes leaves \[N, ...\], a row a group, not PairGradients"):
        tx.update(pair, tx.init(jnp.ones((2, 3))))


@pytest.mark.parametrize(
    ("extra", "got"), [({}, "none"), ({"group_losses": jnp.ones(3)}, r"shape \(3,\)"), ({"loss": jnp.ones(2)}, "none")]
)
def test_missing_losses_are_asked_for(extra, got):
    tx = optax.chain(combine_groups(adaptive_balance(), 2), optax.sgd(1.0))
    message = rf"adaptive_balance: give update\(..., group_losses=\) of shape \(2,\), got {got}"
    with pytest.raises(ValueError, match=message):
        tx.update(jnp.eye(2), tx.init(jnp.ones(2)), **extra)


@pytest.mark.parametrize(
    "rule", [transforms.margin(), transforms.gradvac_ema(), "soft"], ids=["pair", "pair, running", "name"]
)
def test_what_is_no_rule_for_groups_is_refused(rule):
    with pytest.raises(
        TypeError, match=r"combine_groups takes a rule for groups, .* weightings of pairs are for combine_p"
    ):
        combine_groups(rule, 2)


def test_losses_may_be_plain_numbers():
    tx = transforms.chain_pair(combine_groups(adaptive_balance(), 2), optax.sgd(1.0))
    updates, _ = tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), group_losses=[3.0, 1.0])
    assert updates.tolist() == [-0.75, -0.25]


def test_settings_outside_of_their_range_are_refused():
    with pytest.raises(ValueError, match="groups: 0 is no whole number from 1 up"):
        combine_groups(group_mean(), 0)
    tx = combine_groups(lambda gram, losses: gram, 2)
    with pytest.raises(ValueError, match=r"combine_groups: the rule gave weights of shape \[2, 2\], not \[2\]"):
        tx.update(jnp.ones((2, 4)), tx.init(jnp.ones(4)))
    with pytest.raises(ValueError, match=r"temperature: 0 is not in \(0, inf\)"):
        soft_aggregation(0.0)
    with pytest.raises(ValueError, match="projected_on_last: a row besides the full target is needed"):
        _combined(projected_on_last(), np.ones((1, 1, WIDTH)), groups=1)


def test_settings_may_be_injected():
    tx = optax.inject_hyperparams(lambda temperature: combine_groups(transforms.soft_aggregation(temperature), 3))(1e-3)
    rows = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    state = tx.init(rows[0])
    np.testing.assert_allclose(tx.update(rows, state)[0], [1.5, 0.0], atol=1e-6)  # the two that agree, all weight
    state.hyperparams["temperature"] = jnp.float32(1e6)
    np.testing.assert_allclose(tx.update(rows, state)[0], [1.0, 1 / 3], atol=1e-5)  # the mean
