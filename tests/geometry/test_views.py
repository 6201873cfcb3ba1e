"""Where a table's rows lie in a view, against the same operations on their numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle.geometry.views import TableView

ROWS, WIDTH = 12, 5
CHAINS = {
    "transposed": lambda t: t.T,
    "shards of slices": lambda t: jnp.swapaxes(t.reshape(2, 3, 2, WIDTH), 0, 1).reshape(3, 4, WIDTH),
    "strided": lambda t: jax.lax.slice(t, (1, 0), (12, WIDTH), (3, 1)),
    "columns in parts": lambda t: t.T[:, 3:9].reshape(WIDTH, 2, 3)[:, :, None].astype(jnp.bfloat16),
    "squeezed": lambda t: t.reshape(1, ROWS, 1, WIDTH)[0, 2:, 0],
}
LOST = {
    "width in parts": lambda t: t.reshape(ROWS, WIDTH, 1)[:, 1:3],
    "width and rows mixed": lambda t: t.reshape(WIDTH, ROWS),
    "not moved alone": lambda t: 2 * t,
}


def followed(chain):
    view = TableView.of(ROWS)
    for eqn in jax.make_jaxpr(chain)(jnp.zeros((ROWS, WIDTH))).jaxpr.eqns:
        view = None if view is None else view.through(eqn)
    return view


@pytest.mark.parametrize("name", CHAINS)
def test_rows_are_followed(name):
    numbers = CHAINS[name](jnp.broadcast_to(jnp.arange(ROWS, dtype=jnp.float32)[:, None], (ROWS, WIDTH)))
    view = followed(CHAINS[name])
    rows = np.reshape(view.rows, view.shape)
    np.testing.assert_array_equal(np.broadcast_to(rows, numbers.shape), np.asarray(numbers, np.int32))
    assert view.shape[view.width] == 1 and numbers.shape[view.width] == WIDTH


@pytest.mark.parametrize("name", LOST)
def test_rows_that_are_torn_apart_are_lost(name):
    assert followed(LOST[name]) is None
