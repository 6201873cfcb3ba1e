"""The geometry and the two batch gradients against naive loops of ``jax.grad``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import geometry
from entangle.types import PairBatch
from tests.toy import MODELS, draw_pairs, draw_params, flatten, row_gradients

_geometry = jax.jit(geometry.scan_geometry, static_argnums=0, static_argnames="batch_size")


@pytest.mark.parametrize(
    ("model", "batch_size"),
    [("bigram", None), ("mlp", None), ("mlp", 2), ("mlp", 16)],  # of 5 pairs: 2 leaves a remainder, 16 is more than all
)
@pytest.mark.usefixtures("x64")
def test_scan_geometry_equals_a_loop_of_gradients(model, batch_size):
    params, batch = draw_params(model, 0, jnp.float64), draw_pairs(0)
    s = _geometry(MODELS[model], params, batch, batch_size=batch_size)
    g = row_gradients(MODELS[model], params, batch)
    np.testing.assert_allclose(s.chosen_sq_norm, np.sum(g[:, 0] * g[:, 0], -1), rtol=1e-12)
    np.testing.assert_allclose(s.rejected_sq_norm, np.sum(g[:, 1] * g[:, 1], -1), rtol=1e-12)
    np.testing.assert_allclose(s.inner_product, np.sum(g[:, 0] * g[:, 1], -1), rtol=1e-12, atol=1e-12)
    assert s.inner_product.dtype == jnp.float64


def test_scan_geometry_in_float32():
    params, batch = draw_params("mlp", 1, jnp.float32), draw_pairs(1)
    s = _geometry(MODELS["mlp"], params, batch)
    g = row_gradients(MODELS["mlp"], params, batch).astype(np.float64)
    np.testing.assert_allclose(s.inner_product, np.sum(g[:, 0] * g[:, 1], -1), rtol=1e-5, atol=1e-5)
    assert all(field.shape == (5,) and field.dtype == jnp.float32 for field in s)


def test_equal_responses_and_empty_completions():
    pairs = draw_pairs(2)
    equal = PairBatch(
        pairs.tokens.at[0, 1].set(pairs.tokens[0, 0]),
        pairs.completion_mask.at[0, 1].set(pairs.completion_mask[0, 0]).at[1, 0].set(False),
    )
    s = _geometry(MODELS["mlp"], draw_params("mlp", 2, jnp.float32), equal)
    # one gradient twice: the three products are one number, and neither side moves
    assert float(s.chosen_sq_norm[0]) == float(s.rejected_sq_norm[0]) == float(s.inner_product[0]) > 0
    assert float(geometry.condition_ratio(s)[0]) == 1.0
    # no chosen token: no gradient, and the ratios are defined as zero
    assert float(s.chosen_sq_norm[1]) == float(s.inner_product[1]) == 0.0
    assert float(geometry.cosine(s)[1]) == float(geometry.condition_ratio(s)[1]) == 0.0
    assert bool(geometry.condition_1(s)[1])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.usefixtures("x64")
def test_pair_vjp_gives_the_weighted_means_of_the_row_gradients(model):
    params, batch = draw_params(model, 3, jnp.float64), draw_pairs(3)
    d_w, d_l = np.random.default_rng(3).standard_normal((2, 5))
    log_probs, pull_back = geometry.pair_vjp(MODELS[model], params, batch)
    gradients = pull_back(jnp.asarray(d_w), jnp.asarray(d_l))
    g = row_gradients(MODELS[model], params, batch)
    np.testing.assert_allclose(log_probs, MODELS[model](params, batch), rtol=1e-12)
    np.testing.assert_allclose(flatten(gradients.chosen), np.mean(d_w[:, None] * g[:, 0], 0), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(flatten(gradients.rejected), np.mean(d_l[:, None] * g[:, 1], 0), rtol=1e-11, atol=1e-13)
    assert jax.tree.structure(gradients.chosen) == jax.tree.structure(params)


@pytest.mark.usefixtures("x64")
def test_first_order_changes_are_inner_products_with_the_update():
    params, batch = draw_params("mlp", 5, jnp.float64), draw_pairs(5)
    update = draw_params("mlp", 6, jnp.float64)
    change = geometry.first_order_changes(MODELS["mlp"], params, update, batch)
    expected = row_gradients(MODELS["mlp"], params, batch) @ flatten(update)
    np.testing.assert_allclose(np.stack(change, 1), expected, rtol=1e-11, atol=1e-12)

    def moved(step):
        return MODELS["mlp"](jax.tree.map(lambda p, u: p + step * u, params, update), batch)

    # central difference at 1e-4: truncation is of order 1e-8, rounding 1e-15 / 1e-4
    np.testing.assert_allclose(np.stack(change, 1), (moved(1e-4) - moved(-1e-4)) / 2e-4, rtol=1e-6, atol=1e-6)


def test_take_side_of_a_pytree():
    batch = draw_pairs(0)
    for side in (0, 1):
        taken = geometry.take_side(batch, side)
        np.testing.assert_array_equal(taken.tokens, np.asarray(batch.tokens)[:, [side]])
        np.testing.assert_array_equal(taken.completion_mask, np.asarray(batch.completion_mask)[:, [side]])
