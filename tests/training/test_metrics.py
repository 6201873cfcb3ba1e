import jax.numpy as jnp
import numpy as np
import optax

from entangle import transforms
from entangle.losses import Coefficients
from entangle.training.metrics import combination_metrics, geometry_metrics, likelihood_metrics, means
from entangle.types import PairGeometry, PairGradients, PairLogProbs


def _array(*values):
    return jnp.array(values, jnp.float32)


def _check(metrics, expected):
    assert set(metrics) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name], values, rtol=1e-6, err_msg=name)


def test_likelihood_metrics_by_hand():
    lp = PairLogProbs(
        _array(-3, -9, -4), _array(-5, -6, -4), _array(-4, -8, -4), _array(-4, -8, -4), *[_array(1, 1, 1)] * 2
    )
    # r_w = 1, -1, 0 and r_l = -1, 2, 0; equal rewards count as wrong
    _check(
        likelihood_metrics(lp, _array(1, 2, 3), Coefficients(_array(4, 5, 6), _array(7, 8, 9)), 0.5),
        {
            "loss": [1, 2, 3],
            "log_prob/chosen": [-3, -9, -4],
            "log_prob/rejected": [-5, -6, -4],
            "log_ratio/chosen": [1, -1, 0],
            "log_ratio/rejected": [-1, 2, 0],
            "margin": [2, -3, 0],
            "reward/chosen": [0.5, -0.5, 0],
            "reward/rejected": [-0.5, 1, 0],
            "reward/margin": [1, -1.5, 0],
            "accuracy": [1, 0, 0],
            "coefficient/chosen": [4, 5, 6],
            "coefficient/rejected": [7, 8, 9],
        },
    )


def test_half_precision_log_probabilities_are_averaged_in_float32():
    # 256, 258 and 258 are neighbours in bfloat16; their mean 257.33 is not a bfloat16 number
    lp = PairLogProbs(*(jnp.array([-256.0, -258.0, -258.0], jnp.bfloat16) for _ in range(4)), *[_array(1, 1, 1)] * 2)
    zero = Coefficients(jnp.zeros(3), jnp.zeros(3))
    mean = means(likelihood_metrics(lp, jnp.zeros(3), zero, 0.1))
    np.testing.assert_allclose(mean["log_prob/chosen"], -772 / 3, rtol=1e-6)


def test_geometry_metrics_by_hand():
    s = PairGeometry(_array(1, 4, 4, 4, 4), _array(4, 9, 9, 9, 0), _array(1.5, 1, 1, 1, 0))
    d = Coefficients(_array(1, 1, -1, 0, 1), _array(1, 0, -1, 0, 1))
    # changes, twice d_w a - d_l e and d_w e - d_l b with a = |g_w|^2, b = |g_l|^2, e their product:
    # (1 - 1.5, 1.5 - 4), (4, 1), (-4 + 1, -1 + 9), (0, 0), (4, 0)
    cases = {"both_fall": 0, "both_rise": 1, "reversed": 2, "inactive": 3, "ideal": 4}
    _check(
        geometry_metrics(s, d, 2.0),
        {
            "geometry/chosen_norm": [1, 2, 2, 2, 2],
            "geometry/rejected_norm": [2, 3, 3, 3, 0],
            "geometry/inner_product": [1.5, 1, 1, 1, 0],
            "geometry/cosine": [0.75, 1 / 6, 1 / 6, 1 / 6, 0],
            "geometry/condition_ratio": [1.5, 0.25, 0.25, 0.25, 0],
            "predicted/chosen": [-1, 8, -6, 0, 8],
            "predicted/rejected": [-5, 2, 16, 0, 0],
            **{f"case/{name}": np.eye(5)[pair] for name, pair in cases.items()},
        },
    )


def test_means_of_case_indicators_are_shares_that_sum_to_one():
    s = PairGeometry(_array(1, 4, 4), _array(4, 9, 9), _array(1.5, 1, 1))
    mean = means(geometry_metrics(s, Coefficients(_array(1, 1, 1), _array(1, 1, 1)), 0.1))
    np.testing.assert_allclose(mean["case/both_fall"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(mean["case/ideal"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(sum(v for k, v in mean.items() if k.startswith("case/")), 1.0, rtol=1e-6)


def test_what_heads_and_projections_did_is_logged_by_name_and_group():
    gradients = PairGradients(
        {"a": jnp.array([3.0, 0.0]), "b": jnp.array([2.0])}, {"a": jnp.array([4.0, 3.0]), "b": jnp.ones(1)}
    )
    head = transforms.combine_pair(transforms.normalized(), group=lambda path: path)
    tx = optax.chain(head, optax.sgd(0.1))
    found = combination_metrics(tx.update(gradients, tx.init(gradients.chosen))[1])
    assert {name.split("/")[-1] for name in found} == {"a", "b"} and len(found) == 10
    np.testing.assert_allclose(found["weight/rejected/a"], 1 / 5, rtol=1e-6)
    np.testing.assert_allclose(found["combined/cosine/a"], 4 / 5, rtol=1e-6)
    projection = transforms.project_retain(0)
    removed = combination_metrics(projection.update(gradients, projection.init(gradients.chosen))[1])
    # <chosen, rejected> = 12 + 2, |chosen|^2 = 13, |rejected|^2 = 26: 14^2 / (13 * 26) of the squared length
    np.testing.assert_allclose(removed["retain/removed"], 196 / 338, rtol=1e-5)
    wrapped = transforms.protect_chosen(optax.chain(transforms.combine_pair(transforms.margin()), optax.scale(-1.0)))
    taken = combination_metrics(wrapped.update(gradients, wrapped.init(gradients.chosen))[1])
    # <chosen, chosen - rejected> = 13 - 14, |chosen - rejected|^2 = 11: 1 / (13 * 11) of the squared length
    np.testing.assert_allclose(taken["protect/removed"], 1 / 143, rtol=1e-5)
    assert combination_metrics(optax.adam(1e-3).init(gradients.chosen)) == {}
