"""Condition 2 against what really happens: the sign of both changes after a tiny SGD step on one pair, every pair."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import geometry, losses
from entangle.geometry import Case
from tests.toy import MODELS, draw_pairs, draw_params, flatten, pair_log_probs

LENGTH = 1e-6
"""Euclidean length of a step: first-order changes are then near 1e-6, second-order ones near 1e-12, rounding near 1e-14."""
CLEAR = 1e-10
"""A predicted change beyond this cannot change sign; the tests assert that every one is."""
SEEDS = (0, 1, 3, 6)
"""Random draws without a change that is zero to first order (as when the longer response holds the shorter one's bigrams)."""

SETTINGS = [
    ("dpo", {}),
    ("r_dpo", {"alpha": 0.2}),
    ("simpo", {}),
    ("ipo", {}),
    ("ipo", {"beta": 5.0}),  # the target margin of 0.1 nats is passed by half of the pairs: negative coefficients
    ("rrhf", {}),
    ("rrhf", {"nll_weight": 0.0}),  # the hinge off: both coefficients zero
    ("slic_hf", {}),
    ("slic_hf", {"nll_weight": 0.0}),
    ("cpo", {}),
    ("dpop", {}),
    ("kto", {"desirable": 1.3, "undesirable": 0.6}),
    ("sppo", {}),
    ("sppo", {"beta": 5.0}),  # targets of +-0.1 nats: every combination of signs
]


_geometry = jax.jit(geometry.pair_geometry, static_argnums=0)


@functools.cache
def _draw(model, seed):
    """Parameters, reference log-probabilities ``[B, 2]``, pairs, and their exact geometry."""
    params, reference = (draw_params(model, 10 * seed + i, jnp.float64) for i in (0, 1))
    batch = draw_pairs(seed)
    return params, MODELS[model](reference, batch), batch, _geometry(MODELS[model], params, batch)


def _run(model, name, hyperparameters, seed, length=LENGTH):
    """Step on each pair alone: predicted and realised changes ``[B, 2]``, coefficients ``[B, 2]``, cases ``[B]``."""
    return _run_once(model, name, tuple(hyperparameters.items()), seed, length)


@functools.cache
def _run_once(model, name, hyperparameters, seed, length):
    log_prob_fn, objective = MODELS[model], losses.get_objective(name, **dict(hyperparameters))
    params, reference, batch, s = _draw(model, seed)
    singles = jax.tree.map(lambda leaf: leaf[:, None], (reference, batch))

    def gradient(single):  # of the loss itself: nothing here knows of coefficients or geometry
        ref, pair = single
        return jax.grad(lambda p: objective(pair_log_probs(log_prob_fn(p, pair), ref, pair))[0])(params)

    def coefficients(single):
        ref, pair = single
        return losses.coefficients(objective, pair_log_probs(log_prob_fn(params, pair), ref, pair))

    gradients = jax.vmap(gradient)(singles)
    d = jax.tree.map(lambda x: x[:, 0], jax.vmap(coefficients)(singles))
    norm = np.linalg.norm([flatten(jax.tree.map(lambda leaf, i=i: leaf[i], gradients)) for i in range(5)], axis=-1)
    rate = jnp.asarray(length / np.where(norm > 0, norm, 1.0))

    def after(grads, eta, single):
        return log_prob_fn(jax.tree.map(lambda p, g: p - eta * g, params, grads), single[1])[0]

    # both by one program, so that a step of length zero changes nothing, bit for bit
    realised = jax.vmap(after)(gradients, rate, singles) - jax.vmap(after)(gradients, jnp.zeros_like(rate), singles)
    predicted = geometry.predicted_changes(s, *d, rate)
    return [np.stack(predicted, -1), np.asarray(realised), np.stack(d, -1), np.asarray(geometry.case_of(s, *d))]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "hyperparameters"), SETTINGS)
@pytest.mark.usefixtures("x64")
def test_the_sign_of_both_realised_changes_is_condition_2s(name, hyperparameters, model):
    for seed in SEEDS:
        predicted, realised, d, case = _run(model, name, hyperparameters, seed)
        inactive = np.all(d == 0, axis=-1)
        assert np.all(np.abs(predicted[~inactive]) > CLEAR)
        np.testing.assert_array_equal(np.sign(realised), np.sign(predicted))
        np.testing.assert_array_equal(realised[inactive], 0.0)
        np.testing.assert_array_equal(case == Case.INACTIVE, inactive)
        active = case[~inactive]
        np.testing.assert_array_equal(realised[~inactive, 0] > 0, np.isin(active, [Case.IDEAL, Case.BOTH_RISE]))
        np.testing.assert_array_equal(realised[~inactive, 1] < 0, np.isin(active, [Case.IDEAL, Case.BOTH_FALL]))


@pytest.mark.usefixtures("x64")
def test_the_settings_above_reach_every_case_and_every_sign():
    runs = {i: [_run("mlp", *setting, seed) for seed in SEEDS] for i, setting in enumerate(SETTINGS)}
    d = {i: np.concatenate([run[2] for run in results]) for i, results in runs.items()}
    assert {case for results in runs.values() for run in results for case in run[3]} == set(Case)
    for i, (name, hyperparameters) in enumerate(SETTINGS):
        if "beta" in hyperparameters:
            assert {-1, 1} <= set(np.sign(d[i][:, 0])) and {-1, 1} <= set(np.sign(d[i][:, 1])), name
        if hyperparameters.get("nll_weight") == 0.0:
            assert {0, 1} == set(np.sign(d[i][:, 0])) == set(np.sign(d[i][:, 1])), name


@pytest.mark.parametrize("name", ["dpo", "sppo"])
@pytest.mark.usefixtures("x64")
def test_realised_over_predicted_goes_to_one_with_the_step(name):
    """The error of a first-order prediction is first order in the step: a tenth of the length, a tenth of the error."""
    errors = []
    for length in (1e-3, 1e-4, 1e-5):
        predicted, realised, _, _ = _run("mlp", name, {}, 1, length)
        errors.append(np.abs(realised / predicted - 1))
    np.testing.assert_allclose(errors[1] / errors[0], 0.1, rtol=0.05)
    np.testing.assert_allclose(errors[2] / errors[1], 0.1, rtol=0.05)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.usefixtures("x64")
def test_a_dpo_margin_never_falls(model):
    for seed in SEEDS:
        _, realised, _, _ = _run(model, "dpo", {}, seed)
        assert np.all(realised[:, 0] - realised[:, 1] > 0)
