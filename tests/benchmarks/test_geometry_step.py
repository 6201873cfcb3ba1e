"""The contenders of the geometry benchmark do the same work, at a small size."""

import numpy as np

from entangle.models import DecoderConfig
from scripts.benchmarks.geometry_step import contenders


def test_the_sides_agree_and_their_memory_is_known():
    sides = contenders(DecoderConfig(vocab_size=101, max_positions=16, width=16, layers=2, heads=2), 3, 16)
    assert [side.name for side in sides] == ["geometry", "plain", "apart", "scan"]
    losses = [side.run() for side in sides]
    np.testing.assert_allclose(losses, losses[1], rtol=1e-5)
    assert abs(losses[1] - np.log(2)) > 1e-3  # not the loss of equal log-ratios
    assert all(side.memory > 0 for side in sides)
