"""Objectives of tokens against their formulas, written out token by token in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import losses
from entangle.types import PairBatch, PairTokenLogProbs

B, T = 6, 9


def drawn(scale=1.0):
    """Tokens with completions of many lengths, one of them empty; off the completions stands nonsense."""
    rng = np.random.default_rng(0)
    start, lengths = rng.integers(1, 4, size=(B, 1)), rng.integers(1, 6, size=(B, 2))
    lengths[0, 1] = 0
    place = np.arange(T)
    mask = (place >= start[..., None]) & (place < (start + lengths)[..., None])
    policy, reference, squares = -scale * rng.exponential(size=(3, B, 2, T))
    kl = scale * rng.exponential(size=(B, 2, T))
    return PairTokenLogProbs(policy, reference, mask, squares, kl)


def as_jax(tokens, dtype):
    wide = (jnp.asarray(field, dtype) for field in tokens)
    return PairTokenLogProbs(*wide)._replace(completion_mask=jnp.asarray(tokens.completion_mask))


def log_s(x):
    return -np.logaddexp(0.0, -x)


# Each takes the tokens of one pair, fields [2, T], and returns its loss.


def ld_dpo(policy, reference, mask, squares, kl, beta=0.1, alpha=0.5):
    shorter = min(mask[0].sum(), mask[1].sum())
    total = [0.0, 0.0]
    for side in (0, 1):
        for rank, t in enumerate(np.flatnonzero(mask[side])):
            total[side] += (1.0 if rank < shorter else alpha) * (policy[side, t] - reference[side, t])
    return -log_s(beta * (total[0] - total[1]))


def wpo(policy, reference, mask, squares, kl, beta=0.01):
    aligned = sum((policy[r] - squares[r])[mask[r]].mean() if mask[r].any() else 0.0 for r in (0, 1))
    ratio = [(policy[r] - reference[r])[mask[r]].sum() for r in (0, 1)]
    return -min(np.exp(aligned), 1.0) * log_s(beta * (ratio[0] - ratio[1]))


def tdpo1(policy, reference, mask, squares, kl, beta=0.1):
    ratio, divergence = ([x[r][mask[r]].sum() for r in (0, 1)] for x in (policy - reference, kl))
    return -log_s(beta * (ratio[0] - ratio[1] + divergence[0] - divergence[1]))


def tdpo2(policy, reference, mask, squares, kl, beta=0.1, alpha=0.5):
    ratio, divergence = ([x[r][mask[r]].sum() for r in (0, 1)] for x in (policy - reference, kl))
    return -log_s(beta * (ratio[0] - ratio[1] + alpha * (divergence[0] - divergence[1])))


NAIVE = {"ld_dpo": ld_dpo, "wpo": wpo, "tdpo1": tdpo1, "tdpo2": tdpo2}
OTHER = {
    "ld_dpo": {"beta": 0.7, "alpha": 0.2},
    "wpo": {"beta": 0.7},
    "tdpo1": {"beta": 0.7},
    "tdpo2": {"beta": 0.7, "alpha": 1.3},
}
CASES = [(name, hp) for name in NAIVE for hp in ({}, OTHER[name])]


def test_every_objective_of_tokens_is_tested():
    assert set(NAIVE) == set(losses.TOKEN_OBJECTIVES)


@pytest.mark.parametrize(("name", "hp"), CASES)
@pytest.mark.usefixtures("x64")
def test_values_equal_the_formulas(name, hp):
    tokens = drawn()
    expected = [NAIVE[name](*pair, **hp) for pair in zip(*tokens, strict=True)]
    found = losses.TOKEN_OBJECTIVES[name](as_jax(tokens, jnp.float64), **hp)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(("name", "hp"), CASES)
@pytest.mark.usefixtures("x64")
def test_coefficients_are_those_of_the_page(name, hp):
    """d_t as the docstrings have it: DPO's at the objective's own margin, times the token's weight."""
    tokens = as_jax(drawn(), jnp.float64)
    loss, c = losses.row_loss_and_coefficients(losses.TOKEN_OBJECTIVES[name], tokens, **hp)
    beta = hp.get("beta", {"wpo": 0.01}.get(name, 0.1))
    mask = np.asarray(tokens.completion_mask)
    weight = np.ones(B) if name != "wpo" else np.minimum(losses.wpo_weights(tokens), 1.0)
    slope = weight * beta * -np.expm1(-np.asarray(loss) / weight)  # beta s(-x), from the loss -log s(x)
    by_token = np.asarray(losses.ld_weights(mask, hp.get("alpha", 0.5))) if name == "ld_dpo" else np.ones(mask.shape)
    np.testing.assert_allclose(
        c.log_probs, np.where(mask, slope[:, None, None] * by_token, 0.0), rtol=1e-10, atol=1e-15
    )
    at_kl = {"tdpo1": np.array([1.0, 1.0]), "tdpo2": np.array([0.0, hp.get("alpha", 0.5)])}.get(name, np.zeros(2))
    # + K_w raises the margin as log pi_w does, - K_l lowers it as log pi_l does: the same signs
    expected = np.where(mask, slope[:, None, None] * at_kl[None, :, None], 0.0)
    np.testing.assert_allclose(c.kl, expected, rtol=1e-10, atol=1e-15)
    np.testing.assert_array_equal(c.log_sum_squares, 0.0)


@pytest.mark.parametrize("name", NAIVE)
def test_extreme_numbers_and_empty_completions_stay_finite_in_float32(name):
    tokens = as_jax(drawn(2e4), jnp.float32)
    for array in jax.tree.leaves(losses.row_loss_and_coefficients(losses.TOKEN_OBJECTIVES[name], tokens)):
        assert bool(jnp.all(jnp.isfinite(array)))


@pytest.mark.parametrize("name", NAIVE)
def test_nonsense_off_the_completions_does_not_count(name):
    tokens = as_jax(drawn(), jnp.float32)
    bad = tokens._replace(
        **{
            field: jnp.where(tokens.completion_mask, getattr(tokens, field), jnp.nan)
            for field in ("log_probs", "ref_log_probs", "log_sum_squares", "kl")
        }
    )
    left, right = (losses.row_loss_and_coefficients(losses.TOKEN_OBJECTIVES[name], x) for x in (tokens, bad))
    np.testing.assert_array_equal(left[0], right[0])
    np.testing.assert_array_equal(left[1].log_probs, right[1].log_probs)


@pytest.mark.parametrize("name", NAIVE)
def test_half_precision_is_widened_first(name):
    half = as_jax(drawn(), jnp.bfloat16)
    wide = as_jax(PairTokenLogProbs(*half), jnp.float32)
    left, right = (losses.row_loss_and_coefficients(losses.TOKEN_OBJECTIVES[name], x) for x in (half, wide))
    assert left[0].dtype == left[1].log_probs.dtype == jnp.float32
    np.testing.assert_array_equal(left[0], right[0])


@pytest.mark.usefixtures("x64")
def test_summed_tokens_are_what_objectives_of_pairs_take():
    tokens = as_jax(drawn(), jnp.float64)
    lp = losses.summed(tokens)
    sides = (lp.chosen, lp.ref_chosen, lp.chosen_length), (lp.rejected, lp.ref_rejected, lp.rejected_length)
    for side, (policy, ref, length) in enumerate(sides):
        mask = np.asarray(tokens.completion_mask[:, side])
        np.testing.assert_allclose(policy, np.where(mask, tokens.log_probs[:, side], 0).sum(-1), rtol=1e-12)
        np.testing.assert_allclose(ref, np.where(mask, tokens.ref_log_probs[:, side], 0).sum(-1), rtol=1e-12)
        np.testing.assert_array_equal(length, mask.sum(-1))
    loss, c = losses.row_loss_and_coefficients(lambda x: losses.dpo(losses.summed(x)), tokens)
    d = losses.coefficients(losses.dpo, lp)
    np.testing.assert_allclose(loss, losses.dpo(lp), rtol=1e-12)
    np.testing.assert_allclose(
        c.log_probs[1, 0, np.flatnonzero(tokens.completion_mask[1, 0])[0]], d.chosen[1], rtol=1e-12
    )


def test_a_token_objective_of_another_shape_is_refused_by_name():
    def crooked(tokens):
        return jnp.mean(losses.ld_dpo(tokens))

    with pytest.raises(ValueError, match=r"crooked returned shape \(\): one loss a pair is needed, \(6,\)"):
        losses.row_loss_and_coefficients(crooked, as_jax(drawn(), jnp.float32))


# Masks.


@pytest.mark.usefixtures("x64")
def test_masked_dpo_is_the_formula():
    tokens, masks = drawn(), np.random.default_rng(1).uniform(size=(B, 2, T))
    expected = []
    for policy, reference, inside, m in zip(*tokens[:3], masks, strict=True):
        ratio = [(m[r] * (policy[r] - reference[r]))[inside[r]].sum() for r in (0, 1)]
        excess = [max(0.0, m[r][inside[r]].sum() - 0.4 * inside[r].sum()) for r in (0, 1)]
        expected.append(-log_s(0.3 * (ratio[0] - ratio[1])) + 0.7 * sum(excess))
    found = losses.masked_dpo(as_jax(tokens, jnp.float64), jnp.asarray(masks), beta=0.3, sparsity=0.7, least_share=0.4)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_oracle_mask_knows_which_tokens_differ():
    tokens = jnp.array([[[9, 1, 5, 6, 0], [9, 2, 5, 7, 8]]])
    mask = jnp.array([[[False, True, True, True, False], [False, True, True, True, True]]])
    assert losses.oracle_masks(PairBatch(tokens, mask)).tolist() == [[[0, 1, 0, 1, 0], [0, 1, 0, 1, 1]]]


def test_under_the_oracle_shared_tokens_have_coefficient_zero_and_the_others_dpos():
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(3, size=(B, 2, T)))
    tokens = as_jax(drawn(), jnp.float32)
    oracle = losses.oracle_masks(PairBatch(ids, tokens.completion_mask))
    _, c = losses.row_loss_and_coefficients(lambda x: losses.masked_dpo(*x, sparsity=0.0), (tokens, oracle))
    weights = np.asarray(c[0].log_probs)
    assert (weights[np.asarray(oracle) == 0] == 0).all() and (weights[np.asarray(oracle) == 1] > 0).all()


@functools.partial(jax.jit, static_argnames=("least_share",))
def pull_on_masks(level, least_share):
    """Slope of the loss along the masks, all at one level, for a policy that is its reference."""
    tokens = as_jax(drawn(), jnp.float32)
    tokens = tokens._replace(ref_log_probs=tokens.log_probs)
    full = jnp.ones((B, 2, T))
    return jax.grad(lambda m: jnp.sum(losses.masked_dpo(tokens, m, sparsity=1.0, least_share=least_share)))(
        level * full
    )


def test_without_the_guard_the_l1_term_pulls_every_mask_to_zero_and_with_it_stops_at_the_least_share():
    inside = np.asarray(drawn().completion_mask)
    for level in (0.9, 0.3, 0.01):
        np.testing.assert_allclose(np.asarray(pull_on_masks(level, 0.0))[inside], 1.0, atol=1e-6)
    np.testing.assert_allclose(np.asarray(pull_on_masks(0.9, 0.5))[inside], 1.0, atol=1e-6)
    assert (np.abs(np.asarray(pull_on_masks(0.3, 0.5))) < 1e-6).all()
    assert (np.asarray(pull_on_masks(0.9, 0.5))[~inside] == 0.0).all()


def test_masks_come_from_hidden_states_which_get_no_gradient():
    params = losses.MaskParams(jnp.array([1.0, -2.0]), jnp.asarray(0.5))
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 3, 2)), jnp.bfloat16)
    found = losses.token_masks(params, hidden)
    expected = 1 / (1 + np.exp(-(np.asarray(hidden, np.float32) @ np.array([1.0, -2.0]) + 0.5)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    slopes = jax.grad(lambda h: jnp.sum(losses.token_masks(params, h)))(hidden)
    assert not np.any(np.asarray(slopes, np.float32))
    assert float(losses.token_masks(losses.init_mask(2, bias=0.0), hidden)[0, 0, 0]) == 0.5


# Objectives of single responses.


@pytest.mark.usefixtures("x64")
def test_unpaired_objectives_are_the_formulas_and_pairs_are_two_of_them():
    rng = np.random.default_rng(0)
    policy, reference, desirable = -rng.exponential(20, 50), -rng.exponential(20, 50), rng.integers(2, size=50) == 1
    examples = losses.UnpairedLogProbs(jnp.asarray(policy), jnp.asarray(reference), jnp.asarray(desirable))
    r, sign = policy - reference, np.where(desirable, 1.0, -1.0)
    kto = np.where(desirable, 1.3, 0.6) / (1 + np.exp(0.2 * sign * (r - 1.5)))
    np.testing.assert_allclose(losses.kto_unpaired(examples, 1.5, 0.2, 1.3, 0.6), kto, rtol=1e-12)
    np.testing.assert_allclose(losses.apo_zero_unpaired(examples, 0.2), 1 / (1 + np.exp(0.2 * sign * r)), rtol=1e-12)
    weights = rng.uniform(size=50)
    bco = -weights * log_s(sign * (0.2 * r - 0.4))
    np.testing.assert_allclose(losses.bco_unpaired(examples, 0.4, 0.2, jnp.asarray(weights)), bco, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_a_pair_is_a_desirable_and_an_undesirable_response():
    tokens = as_jax(drawn(), jnp.float64)
    lp = losses.summed(tokens)
    both = [(lp.chosen, lp.ref_chosen, True), (lp.rejected, lp.ref_rejected, False)]
    sides = [losses.UnpairedLogProbs(p, ref, jnp.full(B, good)) for p, ref, good in both]
    for paired, single in (
        (losses.kto(lp), lambda x: losses.kto_unpaired(x, losses.kto_reference_point(lp))),
        (losses.apo_zero(lp), losses.apo_zero_unpaired),
        (losses.bco_pair(lp), lambda x: losses.bco_unpaired(x, 0.0)),
    ):
        np.testing.assert_allclose(paired, single(sides[0]) + single(sides[1]), rtol=1e-12)


def test_labels_that_are_not_bool_are_refused():
    examples = losses.UnpairedLogProbs(jnp.array([-3.0]), jnp.array([-4.0]), jnp.array([-1]))
    with pytest.raises(ValueError, match="desirable has to be bool, not int32"):
        losses.kto_unpaired(examples, 0.0)


def test_points_of_reference_carry_no_gradient():
    examples = losses.UnpairedLogProbs(jnp.array([-3.0]), jnp.array([-4.0]), jnp.array([True]))
    assert float(jax.grad(lambda z: jnp.sum(losses.kto_unpaired(examples, z)))(1.0)) == 0.0
    assert float(jax.grad(lambda z: jnp.sum(losses.bco_unpaired(examples, z)))(1.0)) == 0.0
