"""The ten objectives of arXiv 2410.13828 against their formulas, written out pair by pair: their meaning is fixed here."""

import inspect
import math

import jax.numpy as jnp
import numpy as np
import pytest

from entangle import losses
from tests.losses.batches import BATCHES, COUNT, as_jax, one


def _softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _sigmoid(x):
    return math.exp(-_softplus(-x))


def _step(x):
    return float(x > 0)


# Each takes (l_w, l_l, ref_w, ref_l, n_w, n_l) of one pair and the batch's KTO reference point, and returns
# (loss, d_w, d_l): the value from the paper's formula, d_w = -dL/dl_w and d_l = dL/dl_l differentiated by hand.


def _dpo(w, l, rw, rl, nw, nl, z, beta=0.1):
    h = (w - rw) - (l - rl)
    return _softplus(-beta * h), beta * _sigmoid(-beta * h), beta * _sigmoid(-beta * h)


def _r_dpo(w, l, rw, rl, nw, nl, z, beta=0.1, alpha=0.01):
    x = beta * ((w - rw) - (l - rl)) + alpha * (nw - nl)
    return _softplus(-x), beta * _sigmoid(-x), beta * _sigmoid(-x)


def _simpo(w, l, rw, rl, nw, nl, z, beta=2.0, gamma=0.5):
    nw, nl = max(nw, 1), max(nl, 1)
    x = beta * (w / nw - l / nl) - gamma
    return _softplus(-x), beta * _sigmoid(-x) / nw, beta * _sigmoid(-x) / nl


def _ipo(w, l, rw, rl, nw, nl, z, beta=0.1):
    c = (w - rw) - (l - rl) - 1 / (2 * beta)
    return c * c, -2 * c, -2 * c


def _rrhf(w, l, rw, rl, nw, nl, z, nll_weight=1.0):
    nw, nl = max(nw, 1), max(nl, 1)
    gap = l / nl - w / nw
    return max(0.0, gap) - nll_weight * w, _step(gap) / nw + nll_weight, _step(gap) / nl


def _slic_hf(w, l, rw, rl, nw, nl, z, delta=1.0, nll_weight=1.0):
    gap = delta - w + l
    return max(0.0, gap) - nll_weight * w, _step(gap) + nll_weight, _step(gap)


def _cpo(w, l, rw, rl, nw, nl, z, beta=0.1, nll_weight=1.0):
    s = _sigmoid(-beta * (w - l))
    return _softplus(-beta * (w - l)) - nll_weight * w, beta * s + nll_weight, beta * s


def _dpop(w, l, rw, rl, nw, nl, z, beta=0.1, penalty=50.0):
    x = beta * ((w - rw) - (l - rl) - penalty * max(0.0, rw - w))
    return _softplus(-x), beta * _sigmoid(-x) * (1 + penalty * _step(rw - w)), beta * _sigmoid(-x)


def _kto(w, l, rw, rl, nw, nl, z, beta=0.1, desirable=1.0, undesirable=1.0):
    a, b = beta * (w - rw - z), beta * (z - (l - rl))
    loss = desirable * _sigmoid(-a) + undesirable * _sigmoid(-b)
    return (
        loss,
        desirable * beta * _sigmoid(a) * _sigmoid(-a),
        undesirable * beta * _sigmoid(b) * _sigmoid(-b),
    )


def _sppo(w, l, rw, rl, nw, nl, z, beta=0.001):
    a, b = w - rw - 1 / (2 * beta), l - rl + 1 / (2 * beta)
    return a * a + b * b, -2 * a, 2 * b


NAIVE = {f.__name__[1:]: f for f in (_dpo, _r_dpo, _simpo, _ipo, _rrhf, _slic_hf, _cpo, _dpop, _kto, _sppo)}
OTHER = {  # hyperparameters away from the defaults, every one of them
    "dpo": {"beta": 0.7},
    "r_dpo": {"beta": 0.3, "alpha": 0.2},
    "simpo": {"beta": 10.0, "gamma": 3.0},
    "ipo": {"beta": 0.02},
    "rrhf": {"nll_weight": 0.3},
    "slic_hf": {"delta": 7.0, "nll_weight": 0.0},
    "cpo": {"beta": 0.5, "nll_weight": 0.1},
    "dpop": {"beta": 0.3, "penalty": 5.0},
    "kto": {"beta": 0.4, "desirable": 1.3, "undesirable": 0.6},
    "sppo": {"beta": 0.05},
}
CASES = [(name, hp) for name in sorted(NAIVE) for hp in ({}, OTHER[name])]
NAMES = sorted(NAIVE)


def _naive(name, lp, **hp):
    r_w, r_l = lp.chosen - lp.ref_chosen, lp.rejected - lp.ref_rejected
    z = max(0.0, math.fsum([*r_w, *r_l]) / (2 * len(r_w)))
    return np.array([NAIVE[name](*map(float, pair), z, **hp) for pair in zip(*lp, strict=True)]).T


def test_the_ten_are_in_the_table_and_their_naive_twins_have_the_same_defaults():
    assert set(losses.PAPER_OBJECTIVES) == set(NAIVE)
    for name in losses.PAPER_OBJECTIVES:
        objective = losses.OBJECTIVES[name]
        defaults = {k: p.default for k, p in list(inspect.signature(objective).parameters.items())[1:]}
        assert defaults == {k: p.default for k, p in list(inspect.signature(NAIVE[name]).parameters.items())[7:]}
        assert set(OTHER[name]) == set(defaults)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("name", "hp"), CASES)
@pytest.mark.usefixtures("x64")
def test_values_and_coefficients_equal_the_formulas(name, hp, batch):
    lp = as_jax(BATCHES[batch], jnp.float64)
    value, d_w, d_l = _naive(name, BATCHES[batch], **hp)
    loss, d = losses.loss_and_coefficients(losses.OBJECTIVES[name], lp, **hp)
    assert loss.dtype == d.chosen.dtype == d.rejected.dtype == jnp.float64
    np.testing.assert_allclose(loss, value, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(losses.get_objective(name, **hp)(lp), value, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(d.chosen, d_w, rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(d.rejected, d_l, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "expected"),
    # s(0) = 1/2: log 2, or two halves; the squares are (1 / (2 beta))^2 = 25 for beta 0.1, twice 250000 for beta 0.001
    [("dpo", math.log(2)), ("dpop", math.log(2)), ("r_dpo", math.log(2)), ("kto", 1.0), ("ipo", 25.0), ("sppo", 5e5)],
)
def test_policy_equal_to_reference(name, expected):
    lp = one(-7.0, -9.0, -7.0, -9.0, 4.0, 4.0)
    np.testing.assert_allclose(losses.OBJECTIVES[name](lp), [expected], rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_objectives_that_fall_together_at_special_hyperparameters():
    lp = as_jax(BATCHES["falling"], jnp.float64)
    free = lp._replace(ref_chosen=jnp.zeros(COUNT), ref_rejected=jnp.zeros(COUNT))
    unit = free._replace(chosen_length=jnp.ones(COUNT), rejected_length=jnp.ones(COUNT))
    for left, right in [
        (losses.r_dpo(lp, beta=0.3, alpha=0.0), losses.dpo(lp, beta=0.3)),
        (losses.dpop(lp, beta=0.3, penalty=0.0), losses.dpo(lp, beta=0.3)),
        (losses.cpo(lp, beta=0.3, nll_weight=0.0), losses.dpo(free, beta=0.3)),
        (losses.simpo(unit, beta=0.3, gamma=0.0), losses.dpo(unit, beta=0.3)),
        (losses.rrhf(unit, nll_weight=0.2), losses.slic_hf(unit, delta=0.0, nll_weight=0.2)),
        (losses.cpo(lp, nll_weight=0.7) - losses.cpo(lp, nll_weight=0.0), -0.7 * lp.chosen),
    ]:
        np.testing.assert_allclose(left, right, rtol=1e-12)


@pytest.mark.parametrize(
    ("objective", "fields", "expected"),
    [
        # averages -3/2 and -6/4 are equal: the hinge is off, only lambda = 0.5 is left
        (losses.get_objective("rrhf", nll_weight=0.5), (-3.0, -6.0, 0.0, 0.0, 2.0, 4.0), (0.5, 0.0)),
        # 1 - (-3) + (-4) = 0: off
        (losses.get_objective("slic_hf", nll_weight=0.5), (-3.0, -4.0, 0.0, 0.0, 2.0, 4.0), (0.5, 0.0)),
        # r_w = 0: no penalty, so d_w = d_l = 0.1 s(-0.1 * 2)
        (losses.dpop, (-4.0, -6.0, -4.0, -4.0, 2.0, 2.0), (0.1 / (1 + math.exp(0.2)),) * 2),
    ],
)
def test_kinks_follow_the_documented_side(objective, fields, expected):
    d = losses.coefficients(objective, one(*fields))
    np.testing.assert_allclose([d.chosen[0], d.rejected[0]], expected, rtol=1e-6)


def test_kto_reference_point_is_clipped_at_zero():
    assert float(losses.kto_reference_point(as_jax(BATCHES["falling"], jnp.float32))) == 0.0
