"""Conditions 1 and 2 and the cases, for every sign of the coefficients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import geometry
from entangle.geometry import Case, PairGeometry

SIGNS = (-2.0, -1.0, 0.0, 1.0, 2.0)


def _random_geometry(count, width, seed=0):
    """Grams of real vectors, so that Cauchy-Schwarz holds; narrow vectors are nearly parallel often."""
    w, l = np.random.default_rng(seed).standard_normal((2, count, width))
    l = 0.7 * w + 0.6 * l
    return w, l, PairGeometry(*(jnp.asarray(np.sum(a * b, -1)) for a, b in ((w, w), (l, l), (w, l))))


@pytest.mark.parametrize("d_l", SIGNS)
@pytest.mark.parametrize("d_w", SIGNS)
@pytest.mark.usefixtures("x64")
def test_changes_conditions_and_cases_for_every_sign(d_w, d_l):
    w, l, s = _random_geometry(200, 2)
    step = d_w * w - d_l * l  # minus the loss gradient of one pair
    up, down = np.sum(w * step, -1), np.sum(l * step, -1)
    change = geometry.predicted_changes(s, jnp.full(200, d_w), jnp.full(200, d_l), 0.25)
    np.testing.assert_allclose(change.chosen, 0.25 * up, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(change.rejected, 0.25 * down, rtol=1e-12, atol=1e-13)

    chosen_holds, rejected_holds = geometry.condition_2(s, jnp.full(200, d_w), jnp.full(200, d_l))
    cases = np.asarray(geometry.case_of(s, jnp.full(200, d_w), jnp.full(200, d_l)))
    assert cases.dtype == np.int32
    if d_w == d_l == 0:
        assert set(cases) == {Case.INACTIVE}
        return
    assert min(np.min(np.abs(up)), np.min(np.abs(down))) > 1e-6  # no pair within rounding of a boundary
    np.testing.assert_array_equal(chosen_holds, up > 0)
    np.testing.assert_array_equal(rejected_holds, down < 0)
    names = {
        (True, True): Case.IDEAL,
        (False, True): Case.BOTH_FALL,
        (True, False): Case.BOTH_RISE,
        (False, False): Case.REVERSED,
    }
    assert [names[bool(a), bool(b)] for a, b in zip(up > 0, down < 0, strict=True)] == list(cases)


@pytest.mark.usefixtures("x64")
def test_equal_positive_coefficients_reach_three_cases_and_never_the_reversed_one():
    _, _, s = _random_geometry(500, 2)
    assert set(np.asarray(geometry.case_of(s, jnp.ones(500), jnp.ones(500)))) == {0, 1, 2}
    # the margin moves by d |g_w - g_l|^2 >= 0
    change = geometry.predicted_changes(s, jnp.ones(500), jnp.ones(500))
    assert bool(jnp.all(change.chosen - change.rejected >= 0))


@pytest.mark.parametrize(
    ("s", "d", "case"),
    [
        # up = d_w * 4 - d_l * 1, down = d_w * 1 - d_l * 9
        ((4.0, 9.0, 1.0), (1.0, 1.0), Case.IDEAL),  # 3, -8
        ((4.0, 9.0, 1.0), (0.1, 1.0), Case.BOTH_FALL),  # -0.6, -8.9
        ((4.0, 9.0, 1.0), (1.0, 0.1), Case.BOTH_RISE),  # 3.9, 0.1
        ((4.0, 9.0, 1.0), (-1.0, -1.0), Case.REVERSED),  # -3, 8
        ((4.0, 9.0, -1.0), (-1.0, 1.0), Case.BOTH_FALL),  # -3, -8: ipo and sppo past their targets look like this
        ((4.0, 9.0, 1.0), (1.0, 0.0), Case.BOTH_RISE),  # likelihood alone drags the other up
        ((4.0, 9.0, 1.0), (0.0, 0.0), Case.INACTIVE),
        ((4.0, 4.0, 4.0), (1.0, 1.0), Case.IDEAL),  # 0, 0: the conditions are not strict
        ((0.0, 9.0, 0.0), (1.0, 1.0), Case.IDEAL),  # an empty chosen completion: 0, -9
    ],
)
def test_cases_by_hand(s, d, case):
    fields = PairGeometry(*(jnp.array(x) for x in s))
    assert int(geometry.case_of(fields, *(jnp.array(x) for x in d))) == case


@pytest.mark.usefixtures("x64")
def test_condition_2_with_positive_coefficients_is_the_papers_divided_form():
    _, _, s = _random_geometry(300, 2, seed=1)
    d_w, d_l = (jnp.asarray(x) for x in np.random.default_rng(2).uniform(0.1, 2, (2, 300)))
    chosen_holds, rejected_holds = geometry.condition_2(s, d_w, d_l)
    np.testing.assert_array_equal(chosen_holds, s.inner_product <= d_w / d_l * s.chosen_sq_norm)
    np.testing.assert_array_equal(rejected_holds, s.inner_product <= d_l / d_w * s.rejected_sq_norm)
    ones = jnp.ones(300)
    np.testing.assert_array_equal(geometry.condition_1(s), jnp.logical_and(*geometry.condition_2(s, ones, ones)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.usefixtures("x64")
def test_condition_ratio_is_at_most_one_exactly_when_condition_1_holds(dtype):
    near = np.array(
        [[m, 2 * m, m * (1 + k * float(jnp.finfo(dtype).eps))] for m in (1.0, 1.9999, 3e-7, 5e9) for k in range(-4, 5)]
    )
    far = np.stack([np.asarray(field) for field in _random_geometry(500, 2)[2]], 1)
    s = PairGeometry(
        *(jnp.asarray(column, dtype) for column in np.concatenate([near, far, [[0, 4, 0], [4, 0, 0], [0, 0, 0]]]).T)
    )
    holds = np.asarray(geometry.condition_1(s))
    assert 0 < holds.sum() < len(holds)
    np.testing.assert_array_equal(geometry.condition_ratio(s) <= 1, holds)


@pytest.mark.usefixtures("x64")
def test_cosine_is_the_cosine_at_any_scale():
    w, l, _ = _random_geometry(50, 3)
    expected = np.sum(w * l, -1) / np.linalg.norm(w, axis=-1) / np.linalg.norm(l, axis=-1)
    for scale in (1e-100, 1.0, 1e100):
        s = PairGeometry(*(jnp.asarray(scale * np.sum(a * b, -1)) for a, b in ((w, w), (l, l), (w, l))))
        np.testing.assert_allclose(geometry.cosine(s), expected, rtol=1e-12)


def test_a_gradient_that_is_not_finite_is_not_reported_as_zero():
    s = PairGeometry(*(jnp.array([jnp.nan]) for _ in range(3)))
    assert bool(jnp.isnan(geometry.cosine(s))[0])
    assert bool(jnp.isnan(geometry.condition_ratio(s))[0])


def test_a_gradient_that_is_not_finite_has_no_case():
    s = PairGeometry(jnp.array([jnp.nan, 1.0]), jnp.array([1.0, 1.0]), jnp.array([0.0, 0.0]))
    assert geometry.case_of(s, jnp.ones(2), jnp.ones(2)).tolist() == [-1, geometry.Case.IDEAL]


def test_ratios_have_finite_derivatives_at_a_zero_gradient():
    zero = PairGeometry(*(jnp.zeros(()) for _ in range(3)))
    slopes = jax.grad(geometry.condition_ratio)(zero)
    assert all(bool(jnp.isfinite(x)) for x in slopes)


def test_coefficients_of_another_shape_are_refused():
    s = geometry.PairGeometry(*jnp.ones((3, 4)))
    for d in (jnp.ones((4, 1)), jnp.ones(3)):
        with pytest.raises(ValueError, match=r"d_w, d_l: the geometry has shape \(4,\)"):
            geometry.case_of(s, d, jnp.ones(4))
    assert geometry.case_of(s, jnp.array(1.0), jnp.ones(4)).shape == (4,)
