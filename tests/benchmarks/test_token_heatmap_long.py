"""This package's side alone, at a small size: checked against the pair's own geometry as it is made."""

import numpy as np
import pytest

from entangle.models import DecoderConfig
from scripts.benchmarks import token_heatmap


@pytest.mark.slow
def test_the_long_contender(tmp_path, monkeypatch):
    config = DecoderConfig(vocab_size=101, max_positions=32, width=16, layers=1, heads=2)
    side = token_heatmap.alone(tmp_path / "a", config, 5)
    assert side.memory > 2**25 and 0.01 < side.run() < 1
    # the check is not idle: products that do not add up to the pair's are caught
    monkeypatch.setattr(token_heatmap, "gram", lambda *arguments: lambda: np.ones((2, 5, 2, 5)))
    with pytest.raises(AssertionError):
        token_heatmap.alone(tmp_path / "b", config, 5)
