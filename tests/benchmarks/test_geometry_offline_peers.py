"""Both sides of the off-line benchmark find the same geometry, at a small size; needs the extra ``peers``."""

import numpy as np
import pytest

from entangle.models import DecoderConfig

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.peers


def test_both_sides_find_the_same_geometry(tmp_path):
    from scripts.benchmarks.geometry_offline import contenders, draw_pairs

    config = DecoderConfig(vocab_size=101, max_positions=64, width=16, layers=2, heads=2)
    ours, theirs = contenders(tmp_path, config, 11)  # a group of 8 and one of 3; compares every number of every pair
    assert abs(ours.run() - theirs.run()) < 1e-5
    assert abs(ours.run()) > 1e-3
    lengths = draw_pairs(101, 11).completion_mask.sum(-1)
    assert len(np.unique(lengths)) > 5
