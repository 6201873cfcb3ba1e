"""Weightings of the two gradients, and what each one promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entangle import geometry, transforms
from entangle.losses import Coefficients
from entangle.types import PairGeometry, PairGradients
from tests.toy import MODELS, draw_pairs, draw_params, flatten, row_gradients

SCALES = st.floats(-15.0, 15.0)  # norms from 1e-15 to 1e15: squares stay inside float32


def _two_gradients(log_w, log_l, angle):
    """Two plane vectors of given norms and angle, as float32 pytrees."""
    w = 10.0**log_w * np.array([1.0, 0.0])
    l = 10.0**log_l * np.array([np.cos(angle), np.sin(angle)])
    return PairGradients(
        *({"a": jnp.asarray(v[:1], jnp.float32), "b": jnp.asarray(v[1:], jnp.float32)} for v in (w, l))
    )


@jax.jit
def _normalized_update(gradients):
    tx = transforms.combine_pair(transforms.normalized())
    return tx.update(gradients, tx.init(gradients.chosen))[0]


@settings(max_examples=200)
@given(SCALES, SCALES, st.floats(0.0, np.pi))
def test_normalized_moves_both_batch_sums_in_the_ideal_direction_for_every_cosine(log_w, log_l, angle):
    gradients = _two_gradients(log_w, log_l, angle)
    step = -flatten(_normalized_update(gradients)).astype(np.float64)
    w, l = (flatten(g).astype(np.float64) for g in gradients)
    # <w, step> = |w| (1 - rho) and <l, step> = -|l| (1 - rho); unit vectors in float32 are good to a few 1e-7
    expected = 1 - np.cos(angle)
    assert w @ step / np.linalg.norm(w) == pytest.approx(expected, abs=1e-6)
    assert l @ step / np.linalg.norm(l) == pytest.approx(-expected, abs=1e-6)
    assert np.linalg.norm(step) <= 2 + 1e-6


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    # weights (1/3, 1/4), the weight of a zero gradient 0: the update is y rejected - x chosen
    [(3.0, 4.0, 0.0), (3.0, 0.0, -1.0), (0.0, 4.0, 1.0), (0.0, 0.0, 0.0), (-3.0, 4.0, 2.0)],
)
def test_normalized_with_zero_and_opposite_gradients(chosen, rejected, expected):
    update = _normalized_update(PairGradients(jnp.array([chosen]), jnp.array([rejected])))
    np.testing.assert_allclose(update, [expected], atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.usefixtures("x64")
def test_normalized_coefficients_are_ideal_pair_by_pair(model):
    params, batch = draw_params(model, 6, jnp.float64), draw_pairs(6)
    s = jax.jit(geometry.pair_geometry, static_argnums=0)(MODELS[model], params, batch)
    d = jnp.asarray(np.random.default_rng(0).uniform(0.1, 2.0, 5))
    scaled = transforms.normalize_coefficients(Coefficients(d, d), s)
    g = row_gradients(MODELS[model], params, batch)
    unit = g / np.linalg.norm(g, axis=-1, keepdims=True)
    step = np.asarray(d)[:, None] * (unit[:, 0] - unit[:, 1])  # of each pair alone
    change = geometry.predicted_changes(s, *scaled)
    np.testing.assert_allclose(change.chosen, np.sum(g[:, 0] * step, -1), rtol=1e-9)
    np.testing.assert_allclose(change.rejected, np.sum(g[:, 1] * step, -1), rtol=1e-9)
    assert bool(jnp.all(change.chosen > 0)) and bool(jnp.all(change.rejected < 0))
    # without it some pair of the same batch is not ideal, so that the promise above says something
    assert not bool(jnp.all(geometry.condition_1(s)))


@pytest.mark.usefixtures("x64")
def test_normalized_coefficients_keep_signs_are_zero_for_a_zero_gradient_and_do_not_hide_a_nan():
    s = PairGeometry(jnp.array([0.0, 4.0, jnp.nan]), jnp.array([9.0, 0.0, 1.0]), jnp.zeros(3))
    d = transforms.normalize_coefficients(Coefficients(jnp.array([1.0, -1.0, 1.0]), jnp.array([3.0, 5.0, 2.0])), s)
    # of the third pair one norm is known, but a step along one side of it alone would look plausible
    np.testing.assert_allclose(np.stack(d), [[0.0, -0.5, np.nan], [1.0, 0.0, np.nan]], rtol=1e-12)
