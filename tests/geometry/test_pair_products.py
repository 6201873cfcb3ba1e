"""The two forms of a dense layer's products against the rows' gradients themselves."""

import jax.numpy as jnp
import numpy as np
import pytest

from entangle.geometry import pair_products


@pytest.mark.parametrize("form", ["_gram_of_both", "_gram_on_tpu"])
@pytest.mark.parametrize(("side_by_side", "positions"), [(1, 7), (3, 4)])
def test_gram_forms_are_the_products_of_the_gradients(form, side_by_side, positions):
    draw = np.random.default_rng(0).standard_normal
    inputs, cotangents = (draw((5, 2, side_by_side, positions, width)) for width in (6, 3))
    gradients = np.einsum("breti,breto->breio", inputs, cotangents).reshape(5, 2, -1)
    expected = np.einsum("brp,bsp->brs", gradients, gradients)
    rounded = (jnp.asarray(array, jnp.float32) for array in (inputs, cotangents))
    found = getattr(pair_products, form)(*rounded, None)
    np.testing.assert_allclose(
        found, np.stack([expected[:, 0, 0], expected[:, 1, 1], expected[:, 0, 1]], 1), rtol=2e-5, atol=2e-4
    )
