import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import losses, transforms
from entangle.training.evaluation import pair_diagnostics
from entangle.training.gradients import (
    PreferenceExamples,
    TokenBatch,
    likelihood_gradients,
    preference_gradients,
    reward_scale,
)
from entangle.training.metrics import means
from entangle.training.pair_chains import pair_chain
from tests.toy import MODELS, draw_pairs, draw_params, flatten, row_gradients

MLP = MODELS["mlp"]
RATE = jnp.asarray(0.25, jnp.float32)


def _examples(seed=0):
    """Parameters and pairs with reference log-probabilities of another random model, in float64."""
    params, reference = (draw_params("mlp", 10 * seed + i, jnp.float64) for i in (0, 1))
    pairs = draw_pairs(seed)
    return params, PreferenceExamples(pairs, MLP(reference, pairs))


def test_likelihood_is_the_mean_over_all_masked_tokens_of_the_batch():
    def unigram(params, tokens):
        return jax.nn.log_softmax(params)[tokens]

    params = jnp.array([0.3, -1.0, 0.5])
    batch = TokenBatch(
        jnp.array([[0, 1, 2, 1], [2, 2, 0, 0]]), jnp.array([[False, True, True, True], [False, True, False, False]])
    )
    # Masked tokens are 1, 2, 1 and 2, four of them: loss -(2 log p_1 + 2 log p_2) / 4 and gradient p - (0, 1/2, 1/2).
    # A mean of the rows' means would weigh the lone 2 of the second row by a half.
    p = np.exp(params) / np.sum(np.exp(params))
    result = likelihood_gradients(unigram)(params, batch, RATE)
    np.testing.assert_allclose(result.gradients, p - np.array([0, 0.5, 0.5]), rtol=1e-5)
    np.testing.assert_allclose(result.metrics["loss"], -(np.log(p[1]) + np.log(p[2])) / 2, rtol=1e-6)
    np.testing.assert_allclose(result.metrics["perplexity"], 1 / np.sqrt(p[1] * p[2]), rtol=1e-6)
    np.testing.assert_allclose(result.losses, [-np.log(p[1] * p[1] * p[2]), -np.log(p[2])], rtol=1e-6)
    assert float(result.metrics["learning_rate"]) == 0.25


def test_likelihood_of_a_batch_without_masked_tokens_is_zero_with_zero_gradient():
    batch = TokenBatch(jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3), bool))
    result = likelihood_gradients(lambda p, tokens: jax.nn.log_softmax(p)[tokens])(jnp.ones(2), batch, RATE)
    assert float(result.metrics["loss"]) == 0.0
    np.testing.assert_array_equal(result.gradients, np.zeros(2))


@pytest.mark.usefixtures("x64")
def test_preference_metrics_and_gradients_equal_a_naive_loop():
    params, examples = _examples()
    beta = 0.1
    result = jax.jit(
        preference_gradients(
            MLP,
            losses.cpo,
        )
    )(params, examples, RATE)

    g = row_gradients(MLP, params, examples.pairs)
    log_probs, reference = np.asarray(MLP(params, examples.pairs)), np.asarray(examples.reference)
    totals, chosen, rejected = {}, 0, 0
    for (l_w, l_l), (ref_w, ref_l), (g_w, g_l) in zip(log_probs, reference, g, strict=True):
        r_w, r_l = l_w - ref_w, l_l - ref_l
        x = beta * (l_w - l_l)  # cpo is -log s(x) - l_w
        d_w, d_l = beta / (1 + np.exp(x)) + 1, beta / (1 + np.exp(x))
        a, b, e = g_w @ g_w, g_l @ g_l, g_w @ g_l
        up, down = d_w * a - d_l * e, d_w * e - d_l * b
        pair = {
            "loss": np.log1p(np.exp(-x)) - l_w,
            "log_prob/chosen": l_w,
            "log_prob/rejected": l_l,
            "log_ratio/chosen": r_w,
            "log_ratio/rejected": r_l,
            "margin": l_w - l_l,
            "reward/chosen": beta * r_w,
            "reward/rejected": beta * r_l,
            "reward/margin": beta * (r_w - r_l),
            "accuracy": float(r_w > r_l),
            "coefficient/chosen": d_w,
            "coefficient/rejected": d_l,
            "geometry/chosen_norm": np.sqrt(a),
            "geometry/rejected_norm": np.sqrt(b),
            "geometry/inner_product": e,
            "geometry/cosine": e / np.sqrt(a * b),
            "geometry/condition_ratio": e / min(a, b),
            "case/ideal": up >= 0 and down <= 0,
            "case/both_fall": up < 0 and down <= 0,
            "case/both_rise": up >= 0 and down > 0,
            "case/reversed": up < 0 and down > 0,
            "case/inactive": 0,
            "predicted/chosen": 0.25 * up,
            "predicted/rejected": 0.25 * down,
            "learning_rate": 0.25,
        }
        totals = {key: totals.get(key, 0.0) + value / 5 for key, value in pair.items()}
        chosen, rejected = chosen + d_w * g_w / 5, rejected + d_l * g_l / 5

    assert {key for key, values in result.metrics.items() if values.shape == (5,)} == set(totals) - {"learning_rate"}
    mean = means(result.metrics)
    assert set(mean) == set(totals)
    for key, value in totals.items():
        np.testing.assert_allclose(mean[key], value, rtol=1e-10, atol=1e-13, err_msg=key)
    np.testing.assert_allclose(flatten(result.gradients.chosen), chosen, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(flatten(result.gradients.rejected), rejected, rtol=1e-10, atol=1e-13)
    assert result.losses.shape == (5,)
    np.testing.assert_allclose(np.mean(result.losses), totals["loss"], rtol=1e-12)


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ("margin", lambda d, g: np.mean(d * g[:, 1] - d * g[:, 0], 0)),
        ("normalized", lambda d, g: _unit(np.mean(d * g[:, 1], 0)) - _unit(np.mean(d * g[:, 0], 0))),
        ("pairwise_normalized", lambda d, g: np.mean(d * _unit(g[:, 1]) - d * _unit(g[:, 0]), 0)),
    ],
)
@pytest.mark.usefixtures("x64")
def test_pair_chains_give_the_descent_gradient_of_their_formula(chain, expected):
    params, examples = _examples(1)
    head, rule, _ = pair_chain(chain)
    gradient_fn = preference_gradients(MLP, losses.dpo, pair_rule=rule, with_geometry=rule is not None)
    result = jax.jit(gradient_fn)(params, examples, RATE)
    update, _ = head.update(result.gradients, head.init(params))
    margin = np.asarray(MLP(params, examples.pairs) - examples.reference) @ np.array([1.0, -1.0])
    d = (0.1 / (1 + np.exp(0.1 * margin)))[:, None]
    np.testing.assert_allclose(
        flatten(update), expected(d, row_gradients(MLP, params, examples.pairs)), rtol=1e-9, atol=1e-12
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chain", ["margin", "pairwise_normalized", "pairwise_pcgrad"])
def test_evaluation_gives_the_same_diagnostics_as_the_step(chain):
    params, examples = _examples()
    rule = pair_chain(chain).rule
    step = preference_gradients(MLP, losses.cpo, pair_rule=rule)(params, examples, RATE).metrics
    found = pair_diagnostics(MLP, losses.cpo, pair_rule=rule)(params, examples, RATE)
    assert set(step) - set(found) == {"learning_rate"}
    for name, value in found.items():
        np.testing.assert_allclose(value, step[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_a_pair_rule_without_geometry_is_refused():
    with pytest.raises(ValueError, match="needs the geometry"):
        preference_gradients(MLP, losses.dpo, with_geometry=False, pair_rule=transforms.normalize_coefficients)


@pytest.mark.usefixtures("x64")
def test_the_losses_name_the_pair_that_is_not_finite():
    params, examples = _examples()
    bad = examples._replace(reference=examples.reference.at[3, 1].set(jnp.nan))
    result = jax.jit(preference_gradients(MLP, losses.dpo, with_geometry=False))(params, bad, RATE)
    np.testing.assert_array_equal(np.isfinite(result.losses), [True, True, True, False, True])


@pytest.mark.parametrize(
    ("objective", "scale"),
    [
        (losses.dpo, 0.1),
        (losses.sppo, 0.001),
        (losses.slic_hf, 1.0),
        (losses.get_objective("kto", beta=0.7), 0.7),
        (lambda lp: lp.chosen, 1.0),
        (lambda lp, beta: lp.chosen, 1.0),
    ],
)
def test_reward_scale(objective, scale):
    assert reward_scale(objective) == scale
