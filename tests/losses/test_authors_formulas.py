"""Objectives that no other library has, from their papers or authors' code, typed in again: pair by pair, in plain Python."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from entangle import losses
from tests.losses.batches import BATCHES, as_jax


def log_s(x):
    return -(max(-x, 0.0) + math.log1p(math.exp(-abs(x))))


# Each takes l_w, l_l, ref_w, ref_l, n_w, n_l of one pair.


def dpo_shift(w, l, rw, rl, nw, nl):
    return -log_s(0.1 * (w - rw) - 0.95 * 0.1 * (l - rl))


def bdpo(w, l, rw, rl, nw, nl):
    """log of (0.5 pi_l + 0.5 pi_ref) / pi_ref, by the larger of the two."""
    top = max(l, rl)
    mixed = top + math.log(0.5 * math.exp(l - top) + 0.5 * math.exp(rl - top))
    return -log_s(0.1 * (w - rw) - 0.1 * (mixed - rl))


def lpo(w, l, rw, rl, nw, nl):
    x1, x2, beta, r1, r2, gamma = w - rw, l - rl, 0.2, 1.0, 0.8, 5.0
    return 2 * beta / ((r1 + r2) / 2) * (r1 * abs(x1 - x2 - 0.5 / beta) + r2 * abs(x1 - x2 - 0.5 / beta)) + gamma * max(
        0, -x1
    )


def cal_dpo(w, l, rw, rl, nw, nl, weight=1.0):
    reward_w, reward_l, target = w - rw, l - rl, 0.5 / 0.001
    return -log_s(reward_w - reward_l) + weight * ((reward_w - target) ** 2 + (reward_l - (-target)) ** 2)


def cal_dpo_halved(*pair):
    return cal_dpo(*pair, weight=0.5)


def asft(w, l, rw, rl, nw, nl):
    """NLL a token, and the two log odds."""
    w, l = w / nw, l / nl
    odds_w, odds_l = w - math.log(-math.expm1(w)), l - math.log(-math.expm1(l))
    return -w - (log_s(odds_w) + log_s(-odds_l))


def dpop_outside(w, l, rw, rl, nw, nl):
    return -log_s(0.1 * ((w - rw) - (l - rl))) + 5.0 * max(0.0, rw - w)


def margin_dpo(w, l, rw, rl, nw, nl):
    return -log_s(0.1 * (w - rw) - 0.1 * (l - rl) - 1.0)


def rpo(w, l, rw, rl, nw, nl):
    """The authors subtract beta eta times the chosen sum from the DPO loss."""
    return -log_s(0.1 * ((w - rw) - (l - rl))) - 0.1 * 0.005 * w


def mpo(w, l, rw, rl, nw, nl):
    a, b = 0.1 * (w - rw), 0.1 * (l - rl)
    return 0.8 * -log_s(a - b) + 0.2 * (-log_s(a) - log_s(-b)) + 1.0 * -w / nw


TWINS = (dpo_shift, bdpo, lpo, cal_dpo, cal_dpo_halved, asft, dpop_outside, margin_dpo, rpo, mpo)


@pytest.mark.parametrize("batch", ["rising", "falling", "apart"])
@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.usefixtures("x64")
def test_values_are_those_of_the_papers(twin, batch):
    expected = [twin(*map(float, pair)) for pair in zip(*BATCHES[batch], strict=True)]
    found = losses.OBJECTIVES[twin.__name__](as_jax(BATCHES[batch], jnp.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-11)


@pytest.mark.parametrize("batch", ["rising", "falling"])
@pytest.mark.usefixtures("x64")
def test_amapo_as_its_authors_code_has_it(batch):
    lp = BATCHES[batch]
    margins = [w / nw - l / nl for w, l, _, _, nw, nl in zip(*lp, strict=True)]
    mean = math.fsum(margins) / len(margins)
    spread = math.sqrt(math.fsum((m - mean) ** 2 for m in margins) / (len(margins) - 1))
    targets = [3.0 * math.exp((mean - m) / spread * mean) if m < mean else 0.0 for m in margins]
    expected = [-log_s(3.0 * m - target) for m, target in zip(margins, targets, strict=True)]
    np.testing.assert_allclose(losses.amapo(as_jax(lp, jnp.float64)), expected, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_beta_dpo_as_its_authors_code_has_it_over_three_batches_without_the_selection():
    gap_mean, memory = 0.0, losses.beta_dpo.init()
    for name in ("rising", "falling", "apart"):
        lp = as_jax(BATCHES[name], jnp.float64)
        gaps = [w - rw - l + rl for w, l, rw, rl, _, _ in zip(*BATCHES[name], strict=True)]
        average = math.fsum(gaps) / len(gaps)
        gap_mean = 0.9 * gap_mean + 0.1 * average
        beta = max(0.1 * (1 + 0.6 * (average - gap_mean)), 1e-3)
        memory = losses.beta_dpo.update(memory, lp)
        found = losses.beta_dpo.given(memory)(lp)
        np.testing.assert_allclose(found, [-log_s(beta * gap) for gap in gaps], rtol=1e-10)
