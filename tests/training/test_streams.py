import json

import jax
import numpy as np
import pytest

from entangle import data, sharding, training
from entangle.errors import UserError
from tests.training import resumable


def test_rows_of_processes_make_the_batches_of_one():
    pairs = resumable.encoded()
    whole = data.pair_batches(pairs, 6, seed=3)
    parts = [data.pair_batches(pairs, 6, 3, rows) for rows in (np.array([0, 1, 4]), np.array([2, 3, 5]))]
    parts[0].set_state(whole.get_state())  # a position says nothing of the rows
    for _ in range(7):  # past an epoch, of five batches
        batch, index = next(whole)
        (first, one), (second, two) = map(next, parts)
        assert index[[0, 1, 4, 2, 3, 5]].tolist() == [*one.tolist(), *two.tolist()]
        np.testing.assert_array_equal(batch.tokens[[0, 1, 4, 2, 3, 5]], np.concatenate([first.tokens, second.tokens]))
    assert json.dumps(whole.get_state()) == json.dumps(parts[1].get_state())


def test_pairs_that_the_devices_cannot_share_are_refused():
    mesh = sharding.make_mesh("data=4", jax.devices()[:1] * 4)
    with pytest.raises(UserError, match="batch size 6: cannot be divided over data=4"):
        training.process_rows(mesh, 6)
