"""Chains of PairGradients: errors that name the fix, accumulation before the combination, and optax's wrappers around them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from entangle import losses, transforms
from entangle.training.gradients import PreferenceExamples, preference_gradients
from entangle.training.step import init_state, make_step
from entangle.transforms import AdamMetric, accumulate_pairs, chain_pair, combine_pair, combined, margin, pcgrad
from entangle.types import PairGradients
from tests.toy import MODELS, draw_pairs, draw_params, flatten

HEAD = combine_pair(margin())


@pytest.fixture
def standard_promotion():
    """For the parts of optax that mix counters and floats; nothing of this package needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def draw(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "body": {"w": jnp.asarray(rng.standard_normal((2, 3)), dtype)},
        "head": jnp.asarray(rng.standard_normal(4), dtype),
    }


def draw_pair(seed, dtype=jnp.float32):
    """Two gradients in conflict, of unequal length."""
    common, one, other = (draw(3 * seed + i, dtype) for i in range(3))
    add = lambda a, b: jax.tree.map(lambda a, b: a + b, a, b)  # noqa: E731
    return PairGradients(add(common, one), add(add(common, common), other))


def steps(tx, gradients, params=None, **extra):
    """Updates of every step, flat, and the last state."""
    params = draw(99) if params is None else params
    update = jax.jit(tx.update)
    found, state = [], tx.init(params)
    for g in gradients:
        updates, state = update(g, state, params, **extra)
        found.append(flatten(updates))
    return np.stack(found), state


def signature(tree):
    return jax.tree.structure(tree), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


# the same as optax.chain


@pytest.mark.usefixtures("standard_promotion")
def test_a_pair_chain_does_what_the_chain_does_with_the_same_state():
    parts = optax.clip_by_global_norm(1.0), combine_pair(pcgrad()), optax.adamw(0.1, weight_decay=0.1)
    gradients = [draw_pair(seed) for seed in range(3)]
    ours, theirs = (steps(chain(*parts), gradients, value=jnp.float32(1.0)) for chain in (chain_pair, optax.chain))
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert signature(ours[1]) == signature(theirs[1])
    np.testing.assert_array_equal(flatten(ours[1]), flatten(theirs[1]))
    params = draw(0)
    assert signature(chain_pair(*parts).init(params)) == signature(jax.eval_shape(optax.chain(*parts).init, params))


def test_clipping_before_the_head_is_by_one_factor_for_both_gradients():
    gradients = PairGradients(jnp.array([3.0, 0.0]), jnp.array([0.0, 4.0]))  # together of length 5
    updates, _ = steps(chain_pair(optax.clip_by_global_norm(1.0), HEAD), [gradients], jnp.zeros(2))
    np.testing.assert_allclose(updates[0], [-0.6, 0.8], rtol=1e-6)


def test_scaling_before_the_head_scales_both_gradients():
    gradients = PairGradients(jnp.array([3.0, 0.0]), jnp.array([0.0, 4.0]))
    chain = chain_pair(optax.scale(2.0), optax.zero_nans(), HEAD, optax.sgd(0.5))
    updates, _ = steps(chain, [gradients], jnp.zeros(2))
    np.testing.assert_allclose(updates[0], [3.0, -4.0])


def test_chains_may_be_nested():
    gradients = PairGradients(jnp.array([3.0, 0.0]), jnp.array([0.0, 4.0]))
    updates, _ = steps(chain_pair(chain_pair(optax.scale(2.0), HEAD), optax.sgd(0.5)), [gradients], jnp.zeros(2))
    np.testing.assert_allclose(updates[0], [3.0, -4.0])


def test_extra_arguments_reach_every_transform():
    by = optax.GradientTransformationExtraArgs(
        optax.init_empty_state, lambda u, s, p=None, *, factor, **_: (jax.tree.map(lambda x: factor * x, u), s)
    )
    gradients = PairGradients(jnp.ones(2), 2 * jnp.ones(2))
    updates, _ = steps(chain_pair(by, HEAD, by), [gradients], jnp.zeros(2), factor=jnp.float32(3.0))
    np.testing.assert_allclose(updates[0], [9.0, 9.0])


# wrong orders


def _labels(tree):
    return jax.tree.map(lambda x: "all", tree)


def _all(tree):
    return jax.tree.map(lambda x: True, tree)


def _wrong(params):
    """Name of the transform as it is said, and the chain in which it stands wrong."""
    whole = optax.chain(HEAD, optax.sgd(1.0))
    multi = functools.partial(optax.multi_transform, {"all": optax.trace(0.9)})
    return {
        "scale_by_adam": ("scale_by_adam", [optax.scale_by_adam(), HEAD]),
        "adamw": ("a chain itself, as optax.adam is", [optax.adamw(1e-3), HEAD]),
        "trace": ("trace", [optax.trace(0.9), HEAD]),
        "sgd with momentum": ("a chain itself, as optax.adam is", [optax.sgd(0.1, momentum=0.9), HEAD]),
        "add_decayed_weights": ("add_decayed_weights", [optax.add_decayed_weights(0.1), HEAD]),
        "MultiSteps": ("MultiSteps", [optax.MultiSteps(optax.identity(), 2).gradient_transformation(), HEAD]),
        "MultiSteps around": ("MultiSteps", [optax.MultiSteps(whole, 2).gradient_transformation()]),
        "MultiSteps itself": ("MultiSteps", [optax.MultiSteps(whole, 2)]),
        "masked": ("masked", [optax.masked(optax.trace(0.9), _all(params)), HEAD]),
        "masked by a function": ("masked", [optax.masked(optax.trace(0.9), _all), HEAD]),
        "masked around": ("masked", [optax.masked(whole, _all(params))]),
        "masked around, by a function": ("masked", [optax.masked(whole, _all)]),
        "multi_transform": ("partition", [multi(_labels(params)), HEAD]),
        "multi_transform by a function": ("partition", [multi(_labels), HEAD]),
        "multi_transform around": ("partition", [optax.multi_transform({"all": whole}, _labels(params))]),
        "multi_transform around, by a function": ("partition", [optax.multi_transform({"all": whole}, _labels)]),
        "apply_if_finite around": ("apply_if_finite", [optax.apply_if_finite(whole, 3)]),
    }


FIX = (
    r"takes one gradient tree, but was given PairGradients: put combine_pair .* before it; to mask or partition, give "
    r"combine_pair a group and put masked or multi_transform after it; to accumulate micro-batches, wrap the chain in "
    r"accumulate_pairs or put MultiSteps after combine_pair"
)


@pytest.mark.parametrize("order", _wrong(draw(0)))
@pytest.mark.usefixtures("standard_promotion")
def test_a_wrong_order_is_an_error_that_names_the_transform_and_the_fix(order):
    params, gradients = draw(0), draw_pair(1)
    name, parts = _wrong(params)[order]
    for before in ([], [optax.scale(1.0), optax.identity()]):
        tx = chain_pair(*before, *parts)
        with pytest.raises(TypeError, match=rf"^transform {len(before)} of the chain \({name}\) {FIX}") as found:
            jax.eval_shape(tx.update, gradients, tx.init(params), params)
        assert found.value.__cause__ is not None  # what JAX said is not lost


class TwoParams(NamedTuple):
    first: Any
    second: Any


PARAMS = {
    "an array": jnp.ones(3),
    "a list of one": [jnp.ones(3)],
    "a tuple of two": (jnp.ones(3), jnp.ones(3)),  # as PairGradients are
    "a named tuple of two": TwoParams(jnp.ones(3), jnp.ones(3)),
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize(
    "order", ["scale_by_adam", "trace", "add_decayed_weights", "MultiSteps", "masked by a function"]
)
@pytest.mark.usefixtures("standard_promotion")
def test_a_wrong_order_is_named_whatever_the_parameters_are(order, params):
    name, parts = _wrong(params)[order]
    tx = chain_pair(*parts)
    with pytest.raises(TypeError, match=rf"^transform 0 of the chain \({name}\) {FIX}"):
        jax.eval_shape(tx.update, PairGradients(params, params), tx.init(params), params)


@pytest.mark.parametrize("parts", [[optax.sgd(1.0)], [optax.clip_by_global_norm(1.0), optax.scale(2.0)]])
def test_a_chain_without_a_head_is_an_error(parts):
    tx = chain_pair(*parts)
    message = "the chain's updates are still PairGradients: no transform combines them; put combine_pair first"
    with pytest.raises(TypeError, match=message):
        tx.update(draw_pair(0), tx.init(draw(0)), draw(0))


def _raising(error):
    def update(updates, state, params=None):
        raise error

    return optax.GradientTransformation(optax.init_empty_state, update)


@pytest.mark.parametrize("error", [ValueError("mine"), TypeError("mine"), KeyError("PairGradients")], ids=repr)
def test_errors_about_something_else_are_left_as_they_are(error):
    tx = chain_pair(HEAD, _raising(error))
    with pytest.raises(type(error)) as found:
        tx.update(draw_pair(0), tx.init(draw(0)))
    assert found.value is error


def test_an_error_about_another_structure_is_left_as_it_is():
    tx = chain_pair(HEAD, optax.trace(0.9))
    state = tx.init({"other": jnp.ones(3)})  # the parameters' names do not fit
    with pytest.raises(ValueError, match="pytree structure error") as found:
        tx.update(draw_pair(0), state)
    assert "takes one gradient tree" not in str(found.value)


def test_updates_that_are_not_pair_gradients_and_states_of_other_chains_are_refused():
    tx = chain_pair(HEAD, optax.sgd(1.0))
    state = tx.init(draw(0))
    with pytest.raises(TypeError, match="combine_pair takes PairGradients, got dict"):
        tx.update(draw(0), state)
    with pytest.raises(ValueError, match="the state is of a chain of 1 transforms, this one has 2"):
        tx.update(draw_pair(0), state[:1])


@pytest.mark.parametrize("order", ["scale_by_adam", "adamw", "MultiSteps", "masked", "multi_transform by a function"])
@pytest.mark.usefixtures("standard_promotion")
def test_the_training_step_says_the_same_of_any_chain_of_optax(order):
    params, pairs = draw_params("mlp", 0, jnp.float32), draw_pairs(0)
    examples = PreferenceExamples(pairs, MODELS["mlp"](params, pairs))
    tx = optax.chain(*_wrong(params)[order][1])
    step = make_step(preference_gradients(MODELS["mlp"], losses.dpo), tx, optax.constant_schedule(0.1))
    with pytest.raises(TypeError, match=rf"^a transform of the optax chain {FIX}"):
        jax.eval_shape(step, init_state(params, tx), examples)


def test_the_training_step_refuses_a_chain_without_a_head():
    params, pairs = draw_params("mlp", 0, jnp.float32), draw_pairs(0)
    examples = PreferenceExamples(pairs, MODELS["mlp"](params, pairs))
    tx = optax.sgd(0.1)
    step = make_step(preference_gradients(MODELS["mlp"], losses.dpo), tx, optax.constant_schedule(0.1))
    with pytest.raises(TypeError, match="still PairGradients: no transform combines them; put combine_pair first"):
        jax.eval_shape(step, init_state(params, tx), examples)


# accumulation


def mean(gradients):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *gradients)


@pytest.mark.parametrize("rule", ["pcgrad", "normalized"])
@pytest.mark.usefixtures("standard_promotion")
def test_micro_batches_make_the_step_of_their_mean_which_multi_steps_after_the_head_does_not(rule):
    weighting = transforms.get_weighting(rule)
    optimizer = optax.sgd(0.5, momentum=0.9)
    gradients = [draw_pair(seed) for seed in range(6)]
    whole, whole_state = steps(
        optax.chain(combine_pair(weighting), optimizer), [mean(gradients[:3]), mean(gradients[3:])]
    )
    found, state = steps(accumulate_pairs(optax.chain(combine_pair(weighting), optimizer), 3), gradients)
    np.testing.assert_array_equal(found[[0, 1, 3, 4]], 0)
    np.testing.assert_allclose(found[[2, 5]], whole, rtol=1e-5, atol=1e-6)
    assert signature(state.inner) == signature(whole_state)
    np.testing.assert_allclose(flatten(state.inner), flatten(whole_state), rtol=1e-4, atol=1e-5)
    after = optax.chain(combine_pair(weighting), optax.MultiSteps(optimizer, 3).gradient_transformation())
    other, _ = steps(after, gradients)
    assert np.abs(other[[2, 5]] - whole).max() > 0.05
    singly = [np.mean([steps(combine_pair(weighting), [g])[0][0] for g in gradients[:3]], 0)]  # what it does instead
    np.testing.assert_allclose(other[2], -0.5 * singly[0], rtol=1e-4, atol=1e-5)


def test_for_the_margin_step_accumulation_before_and_after_the_head_are_the_same():
    gradients = [draw_pair(seed) for seed in range(2)]
    with jax.numpy_dtype_promotion("standard"):
        after, _ = steps(optax.chain(HEAD, optax.MultiSteps(optax.sgd(0.5), 2).gradient_transformation()), gradients)
    before, _ = steps(accumulate_pairs(optax.chain(HEAD, optax.sgd(0.5)), 2), gradients)
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-6)


def test_micro_batches_in_half_precision_are_averaged_in_float32():
    # 256 + 1 + 1 + 2 in bfloat16 is 258 or less; its mean in float32 is 65
    chosen = [jnp.full(3, value, jnp.bfloat16) for value in (256.0, 1.0, 1.0, 2.0)]
    tx = accumulate_pairs(optax.chain(HEAD, optax.scale(-1.0)), 4)
    params = jnp.zeros(3, jnp.bfloat16)
    state = tx.init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.mean)} == {jnp.dtype(jnp.float32)}
    for g in chosen:
        updates, state = jax.jit(tx.update)(PairGradients(g, jnp.zeros_like(g)), state, params)
        assert updates.dtype == jnp.bfloat16
    assert updates.tolist() == [65, 65, 65]


def test_one_micro_batch_a_step_is_the_chain_itself():
    gradients = [draw_pair(seed) for seed in range(2)]
    inner = optax.chain(combine_pair(pcgrad()), optax.sgd(0.5, momentum=0.9))
    np.testing.assert_allclose(steps(accumulate_pairs(inner, 1), gradients)[0], steps(inner, gradients)[0], rtol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_a_bad_micro_batch_spoils_its_own_step_alone():
    tx = accumulate_pairs(optax.chain(HEAD, optax.apply_if_finite(optax.sgd(1.0), 3)), 2)
    g = jnp.ones(2)
    values = [PairGradients(g, jnp.array([1.0, value])) for value in (jnp.nan, 2.0, 3.0, 5.0)]
    found, _ = steps(tx, values, jnp.zeros(2))
    np.testing.assert_allclose(found, [[0, 0], [0, 0], [0, 0], [0, -3]], atol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_laws_of_optax_for_accumulation():
    inner = optax.chain(combine_pair(transforms.reward_calibrated()), optax.adamw(0.1, weight_decay=0.1))
    tx = accumulate_pairs(inner, 2)
    params = {"a": draw(0)["body"], "b": draw(0, jnp.bfloat16)["head"], "frozen": None}
    gradients = [PairGradients(params, jax.tree.map(lambda x, k=k: k * x, params)) for k in range(1, 5)]
    state = tx.init(params)
    assert signature(jax.eval_shape(tx.init, params)) == signature(state)
    traces = []

    @functools.partial(jax.jit, donate_argnums=1)  # every array of the state has a buffer of its own
    def update(gradients, state):
        traces.append(None)
        return tx.update(gradients, state, params, value=1.0, unknown="swallowed")

    found, one = [], tx.init(params)
    for g in gradients:
        updates, one = update(g, one)
        assert signature(one) == signature(state)
        assert signature(updates) == signature(params)
        found.append(flatten(updates))
    assert len(traces) == 1
    scanned = lambda state, g: tx.update(g, state, params)[::-1]  # noqa: E731
    after, updates = jax.jit(lambda s, gs: jax.lax.scan(scanned, s, gs))(
        state, jax.tree.map(lambda *x: jnp.stack(x), *gradients)
    )
    rows = [np.asarray(leaf, np.float32).reshape(4, -1) for leaf in jax.tree.leaves(updates)]
    np.testing.assert_allclose(np.concatenate(rows, 1), np.float32(found), rtol=1e-2)
    assert signature(after) == signature(state)


@pytest.mark.parametrize(
    ("params", "gradients"),
    [("float64", "float32"), ("float32", "float64"), ("bfloat16", "float32"), ("float32", "bfloat16")],
)
@pytest.mark.usefixtures("standard_promotion", "x64")
def test_accumulation_keeps_the_dtypes_of_its_state_whatever_those_of_the_gradients(params, gradients):
    inner = optax.chain(combine_pair(transforms.reward_calibrated()), optax.adamw(0.1))
    tx, like = accumulate_pairs(inner, 2), jnp.ones(3, params)
    state = tx.init(like)
    pair = PairGradients(jnp.ones(3, gradients), 2 * jnp.ones(3, gradients))
    updates, after = jax.eval_shape(tx.update, pair, state, like)
    assert signature(after) == signature(state)
    alone = jax.eval_shape(inner.update, pair, inner.init(like), like)[0]
    assert updates.dtype == alone.dtype


def test_extra_arguments_reach_the_chain_inside_the_accumulation():
    by = optax.GradientTransformationExtraArgs(
        optax.init_empty_state, lambda u, s, p=None, *, factor, **_: (jax.tree.map(lambda x: factor * x, u), s)
    )
    gradients = PairGradients(jnp.ones(2), 2 * jnp.ones(2))
    updates, _ = steps(accumulate_pairs(optax.chain(HEAD, by), 1), [gradients], jnp.zeros(2), factor=jnp.float32(3.0))
    np.testing.assert_allclose(updates[0], [3.0, 3.0])


def test_accumulation_says_what_is_wrong():
    for every in (0, 1.5):
        with pytest.raises(ValueError, match=f"^every: {every} is no whole number from 1 up"):
            accumulate_pairs(HEAD, every)
    tx = accumulate_pairs(HEAD, 2)
    with pytest.raises(
        ValueError, match="accumulate_pairs: gradients and the state's mean of them are not trees of one"
    ):
        tx.update(draw_pair(0), tx.init({"other": jnp.ones(2)}))
    with pytest.raises(TypeError, match="accumulate_pairs takes PairGradients, got dict: put it first in the chain"):
        tx.update(draw(0), tx.init(draw(0)))
    tx = accumulate_pairs(optax.sgd(1.0), 2)
    with pytest.raises(TypeError, match="still PairGradients: no transform combines them; put combine_pair first"):
        tx.update(draw_pair(0), tx.init(draw(0)))
    tx = chain_pair(accumulate_pairs(optax.chain(optax.trace(0.9), HEAD), 2))
    with pytest.raises(TypeError, match=rf"^transform 0 of the chain \(accumulate_pairs\) {FIX}"):
        tx.update(draw_pair(0), tx.init(draw(0)))


# optax's wrappers


def test_in_a_named_chain():
    gradients = draw_pair(0)
    tx = optax.named_chain(("pair", combine_pair(pcgrad())), ("optimizer", optax.sgd(0.5, momentum=0.9)))
    found, state = steps(tx, [gradients])
    right, _ = steps(optax.chain(combine_pair(pcgrad()), optax.sgd(0.5, momentum=0.9)), [gradients])
    np.testing.assert_allclose(found, right, rtol=1e-6)
    assert combined(state) == [state["pair"]]


@pytest.mark.usefixtures("standard_promotion")
def test_partitioned_after_a_head_that_has_groups():
    block = lambda path: path.split("/")[0]  # noqa: E731
    labels = {"body": {"w": "body"}, "head": "head"}
    tx = chain_pair(
        combine_pair({"body": pcgrad(), "head": margin()}, group=block),
        optax.multi_transform({"body": optax.sgd(0.5, momentum=0.9), "head": optax.adam(0.1)}, labels),
    )
    gradients = [draw_pair(seed) for seed in range(2)]
    found, state = steps(tx, gradients)
    pick = lambda g, name: PairGradients(*({name: side[name]} for side in g))  # noqa: E731
    for name, columns, alone in (
        ("body", slice(0, 6), optax.chain(combine_pair(pcgrad()), optax.sgd(0.5, momentum=0.9))),
        ("head", slice(6, 10), optax.chain(combine_pair(margin()), optax.adam(0.1))),
    ):
        right, _ = steps(alone, [pick(g, name) for g in gradients], {name: draw(99)[name]})
        np.testing.assert_allclose(found[:, columns], right, rtol=1e-5, atol=1e-6)
    assert set(combined(state)[0].weights) == {"body", "head"}


def test_masked_after_the_head():
    mask = {"body": {"w": True}, "head": False}
    tx = chain_pair(HEAD, optax.masked(optax.add_decayed_weights(0.5), mask), optax.sgd(1.0))
    gradients, params = draw_pair(0), draw(99)
    found, _ = steps(tx, [gradients])
    w, l = map(flatten, gradients)
    decay = 0.5 * flatten(params) * (np.arange(10) < 6)
    np.testing.assert_allclose(found[0], w - l - decay, rtol=1e-5, atol=1e-6)


def test_hyperparameters_injected_into_the_whole_chain():
    def build(learning_rate, c):
        return chain_pair(combine_pair(transforms.cagrad(c)), optax.sgd(learning_rate))

    tx = optax.inject_hyperparams(build)(learning_rate=optax.linear_schedule(1.0, 0.0, 4), c=0.5)
    gradients = draw_pair(0)
    state, update = tx.init(draw(99)), jax.jit(tx.update)
    head = steps(combine_pair(transforms.cagrad(0.5)), [gradients])[0][0]
    for learning_rate in (1.0, 0.75):
        updates, state = update(gradients, state)
        np.testing.assert_allclose(flatten(updates), -learning_rate * head, rtol=1e-5, atol=1e-6)
    state.hyperparams["c"] = jnp.float32(0.1)
    updates, state = update(gradients, state)
    other = steps(combine_pair(transforms.cagrad(0.1)), [gradients])[0][0]
    np.testing.assert_allclose(flatten(updates), -0.5 * other, rtol=1e-5, atol=1e-6)
    assert np.abs(other - head).max() > 0.01
    assert len(combined(state)) == 1


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "head",
    [
        combine_pair(transforms.gradvac_ema()),
        combine_pair(transforms.reward_calibrated()),
        transforms.project_retain(2, metric=AdamMetric(), radius=1.0),
    ],
    ids=["gradvac_ema", "reward_calibrated", "project_retain"],
)
def test_a_bad_step_is_passed_over_by_apply_if_finite_after_the_head(head):
    tx = chain_pair(head, optax.apply_if_finite(optax.adam(0.1), 3))
    good = [draw_pair(seed) for seed in range(4)]
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), good[0])
    found, state = steps(tx, [*good[:2], bad, *good[2:]])
    right, right_state = steps(tx, good)
    np.testing.assert_array_equal(found[2], 0)
    np.testing.assert_allclose(np.delete(found, 2, 0), right, rtol=1e-5, atol=1e-6)
    assert int(state[1].total_notfinite) == 1 and int(right_state[1].total_notfinite) == 0


@pytest.mark.usefixtures("standard_promotion")
def test_a_bad_step_is_passed_over_by_apply_if_finite_after_retain_invariant():
    inner = optax.chain(HEAD, optax.apply_if_finite(optax.adam(0.1), 3))
    tx = chain_pair(transforms.retain_invariant(inner, 1), optax.apply_if_finite(optax.identity(), 3))
    good = [draw_pair(seed) for seed in range(4)]
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), good[0])
    found, _ = steps(tx, [*good[:2], bad, *good[2:]])
    np.testing.assert_array_equal(found[2], 0)
    np.testing.assert_allclose(np.delete(found, 2, 0), steps(tx, good)[0], rtol=1e-5, atol=1e-6)
