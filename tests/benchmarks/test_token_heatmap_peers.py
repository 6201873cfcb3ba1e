"""Both sides of the token benchmark find the same cosines, at a small size; needs the extra ``peers``."""

import pytest

from entangle.models import DecoderConfig

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.peers


def test_both_sides_find_the_same_cosines(tmp_path):
    from scripts.benchmarks.token_heatmap import contenders

    config = DecoderConfig(vocab_size=101, max_positions=32, width=16, layers=2, heads=2)
    ours, theirs = contenders(tmp_path, config, 3)
    assert abs(ours.run() - theirs.run()) < 1e-5
    assert ours.run() > 1e-2
    assert min(ours.memory, theirs.memory) > 2**25
