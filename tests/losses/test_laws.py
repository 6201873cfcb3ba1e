"""Laws that hold for every pair: what falls together with what, what may be exchanged, and what stays finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from entangle import losses
from entangle.losses.log_ratios import log_ratios
from entangle.types import PairLogProbs, PairTokenLogProbs

B, T = 5, 7
NAMES = list(losses.OBJECTIVES)
LOG_PROBS = hnp.arrays(np.float64, (4, B), elements=st.floats(-1e4, 0.0))
LENGTHS = hnp.arrays(np.int64, (2, B), elements=st.integers(0, 60))


@st.composite
def pairs(draw):
    """Any log-probabilities down to -1e4, any lengths; an empty completion has log-probability 0, as it must."""
    log_probs, lengths = draw(LOG_PROBS), draw(LENGTHS)
    return PairLogProbs(*np.where(np.concatenate([lengths, lengths]) == 0, 0.0, log_probs), *lengths.astype(float))


@st.composite
def near_pairs(draw):
    """Log-probabilities within some nats of the reference, where losses bend."""
    lp = draw(pairs())
    change = draw(hnp.arrays(np.float64, (2, B), elements=st.floats(-30.0, 30.0)))
    return lp._replace(ref_chosen=lp.chosen + change[0], ref_rejected=lp.rejected + change[1])


def in_float64(test):
    """Run a test of hypothesis's in float64; a fixture would be shared by all examples."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        with jax.enable_x64(True):
            test(*args, **{k: _arrays(v) if isinstance(v, PairLogProbs) else v for k, v in kwargs.items()})

    return run


def _arrays(lp):
    return PairLogProbs(*(jnp.asarray(field, jnp.float64) for field in lp))


def equal(left, right, rtol=1e-10, atol=1e-12):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def same(one, other, lp, **tolerance):
    """Two objectives agree in value and in both coefficients."""
    equal(losses.loss_and_coefficients(one, lp), losses.loss_and_coefficients(other, lp), **tolerance)


def at(objective, **hyperparameters):
    return lambda lp: objective(lp, **hyperparameters)


FALL_TOGETHER = {
    "robust at 0 is DPO": (at(losses.robust_dpo, label_smoothing=0.0), losses.dpo),
    "cDPO at 0 is DPO": (at(losses.cdpo, label_smoothing=0.0), losses.dpo),
    "cDPO is smoothed DPO": (at(losses.cdpo, label_smoothing=0.2), losses.label_smoothed(losses.dpo, 0.2)),
    "robust DPO is robust of DPO": (at(losses.robust_dpo, label_smoothing=0.2), losses.robust(losses.dpo, 0.2)),
    "R-DPO at 0 is DPO": (at(losses.r_dpo, alpha=0.0), losses.dpo),
    "margin DPO at 0 is DPO": (at(losses.margin_dpo, margin=0.0), losses.dpo),
    "DPOP at 0 is DPO": (at(losses.dpop, penalty=0.0), losses.dpo),
    "DPOP outside at 0 is DPO": (at(losses.dpop_outside, penalty=0.0), losses.dpo),
    "DPO-Shift at 1 is DPO": (at(losses.dpo_shift, shift=1.0), losses.dpo),
    "BDPO at 1 is DPO": (at(losses.bdpo, mixture=1.0), losses.dpo),
    "f-DPO alpha at 1 is DPO": (at(losses.f_dpo_alpha, alpha=1.0), losses.dpo),
    "f-DPO alpha at 0 is the forward KL": (at(losses.f_dpo_alpha, alpha=0.0), losses.f_dpo_forward_kl),
    "beta-DPO without strength is DPO": (at(losses.beta_dpo, strength=0.0), losses.dpo),
    "AlphaPO at 0 is SimPO": (at(losses.alphapo, alpha=0.0), at(losses.simpo, beta=2.5, gamma=0.1)),
    "SimPO without target is CPO on averages": (
        at(losses.simpo, gamma=0.0),
        lambda lp: losses.cpo(losses.per_token(lp), beta=2.0, nll_weight=0.0),
    ),
    "DPO on averages": (at(losses.dpo_norm, beta=0.1), lambda lp: losses.dpo(losses.per_token(lp))),
    "averaging twice is averaging once": (
        lambda lp: losses.dpo(losses.per_token(losses.per_token(lp))),
        lambda lp: losses.dpo(losses.per_token(lp)),
    ),
    "RPO is a weighted sum": (losses.rpo, losses.weighted_sum((1.0, losses.dpo), (0.1 * 0.005, losses.nll))),
    "MPO is a weighted sum": (
        losses.mpo,
        losses.weighted_sum((0.8, losses.dpo), (0.2, at(losses.bco_pair, beta=0.1)), (1.0, losses.nll_averaged)),
    ),
    "MPO of common code is a weighted sum": (
        losses.mpo_token_mean,
        losses.weighted_sum((0.8, losses.dpo), (0.2, at(losses.bco_pair, beta=0.1)), (1.0, losses.nll_token_mean)),
    ),
    "CPO has its NLL": (losses.cpo, losses.weighted_sum((1.0, at(losses.cpo, nll_weight=0.0)), (1.0, losses.nll))),
    "exchanging twice": (lambda lp: losses.dpo(losses.exchanged(losses.exchanged(lp))), losses.dpo),
}


@pytest.mark.parametrize("law", FALL_TOGETHER)
@settings(max_examples=12)
@given(lp=pairs())
@in_float64
def test_what_falls_together(law, lp):
    same(*FALL_TOGETHER[law], lp)


@pytest.mark.parametrize(
    "name", ["dpo", "cdpo", "robust_dpo", "r_dpo", "dpop", "bdpo", "f_dpo_alpha", "f_dpo_forward_kl"]
)
@given(lp=pairs())
@in_float64
def test_a_policy_that_is_its_reference_has_loss_log_2(name, lp):
    lp = lp._replace(ref_chosen=lp.chosen, ref_rejected=lp.rejected, rejected_length=lp.chosen_length)
    equal(losses.OBJECTIVES[name](lp), jnp.full(B, np.log(2.0)))
    equal(log_ratios(lp), (jnp.zeros(B),) * 2)


@given(lp=near_pairs())
@in_float64
def test_alphapo_goes_to_simpo_and_the_alpha_divergence_to_dpo(lp):
    same(at(losses.alphapo, alpha=1e-9), at(losses.simpo, beta=2.5, gamma=0.1), lp, rtol=1e-4, atol=1e-4)
    same(at(losses.f_dpo_alpha, alpha=1.0 + 1e-9), losses.dpo, lp, rtol=1e-4, atol=1e-4)


@given(lp=pairs())
@in_float64
def test_one_token_each_needs_no_average(lp):
    lp = lp._replace(chosen_length=jnp.ones(B), rejected_length=jnp.ones(B))
    same(at(losses.dpo_norm, beta=0.1), losses.dpo, lp)
    same(losses.ipo_averaged, losses.ipo, lp)


@given(lp=pairs())
@in_float64
def test_in_a_batch_of_one_there_is_nothing_to_sort(lp):
    lp = PairLogProbs(*(field[:1] for field in lp))
    same(at(losses.aot, beta=0.1), losses.dpo, lp)
    same(at(losses.aot_unpaired, beta=0.1), losses.dpo, lp)
    same(losses.amapo, at(losses.simpo, beta=3.0, gamma=0.0), lp)


@given(lp=near_pairs())
@in_float64
def test_cal_dpo_in_its_two_forms(lp):
    """The paper's squares weigh twice the code's; both are DPO at beta 1 and SPPO's squares."""
    squares = at(losses.sppo, beta=0.001)
    same(losses.cal_dpo, losses.weighted_sum((1.0, at(losses.dpo, beta=1.0)), (1.0, squares)), lp)
    same(losses.cal_dpo_halved, losses.weighted_sum((1.0, at(losses.dpo, beta=1.0)), (0.5, squares)), lp)


@given(lp=near_pairs())
@in_float64
def test_asft_is_the_papers_sum_of_log_odds(lp):
    """``log s(LO_w) + log s(-LO_l)``, where ``1 - p`` is not lost in rounding."""
    w, l = (jnp.minimum(x, -1e-3) for x in losses.length_averages(lp))
    odds_w, odds_l = w - jnp.log1p(-jnp.exp(w)), l - jnp.log1p(-jnp.exp(l))
    paper = -w - jax.nn.log_sigmoid(odds_w) - jax.nn.log_sigmoid(-odds_l)
    ones = jnp.ones(B)
    equal(losses.asft(PairLogProbs(w, l, w, l, ones, ones)), paper)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8)
@given(lp=near_pairs(), data=st.data())
@in_float64
def test_pairs_in_another_order_give_the_same_in_that_order(name, lp, data):
    """The whole batch is seen by some, its order by none, but among margins that are equal."""
    if name in ("aot", "aot_unpaired"):
        apart = jnp.arange(B, dtype=jnp.float64)
        lp = lp._replace(chosen=lp.chosen - 0.0123 * apart, rejected=lp.rejected - 0.0317 * apart**2)
        margins = lp.chosen - lp.rejected, lp.chosen - lp.ref_chosen, lp.rejected - lp.ref_rejected
        assume(all(len(set(np.asarray(m).tolist())) == B for m in margins))
    order = np.array(data.draw(st.permutations(range(B))))
    left = losses.loss_and_coefficients(losses.OBJECTIVES[name], PairLogProbs(*(field[order] for field in lp)))
    right = losses.loss_and_coefficients(losses.OBJECTIVES[name], lp)
    equal(left, jax.tree.map(lambda x: x[order], right), rtol=1e-9, atol=1e-9)


def tokens_of(log_probs, reference, mask):
    zeros = jnp.zeros(mask.shape)
    return PairTokenLogProbs(jnp.asarray(log_probs), jnp.asarray(reference), jnp.asarray(mask), zeros, zeros)


@given(data=st.data())
def test_token_objectives_do_not_see_on_which_side_the_padding_is(data):
    draw = lambda: data.draw(hnp.arrays(np.float32, (2, 2, T), elements=st.floats(-8, 0, width=32)))  # noqa: E731
    lengths = data.draw(hnp.arrays(np.int64, (2, 2), elements=st.integers(0, T)))
    right = np.arange(T) < lengths[..., None]
    values, reference = draw(), draw()
    rolled = [
        np.stack([[np.roll(x[b, r], T - lengths[b, r]) for r in (0, 1)] for b in (0, 1)])
        for x in (values, reference, right)
    ]
    for name, objective in losses.TOKEN_OBJECTIVES.items():
        found = objective(tokens_of(*rolled)), objective(tokens_of(values, reference, right))
        np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6, err_msg=name)


@given(data=st.data())
def test_token_objectives_without_what_they_add_are_dpo(data):
    draw = lambda: data.draw(hnp.arrays(np.float32, (2, 2, T), elements=st.floats(-8, 0, width=32)))  # noqa: E731
    mask = data.draw(hnp.arrays(np.bool_, (2, 2, T)))
    tokens = tokens_of(draw(), draw(), mask)
    dpo = losses.dpo(losses.summed(tokens))
    np.testing.assert_allclose(losses.ld_dpo(tokens, alpha=1.0), dpo, rtol=1e-6)
    np.testing.assert_allclose(losses.tdpo1(tokens), dpo, rtol=1e-6)  # no KL
    np.testing.assert_allclose(losses.tdpo2(tokens, alpha=0.0), dpo, rtol=1e-6)
    np.testing.assert_allclose(losses.masked_dpo(tokens, jnp.ones(mask.shape), sparsity=0.0), dpo, rtol=1e-6)
