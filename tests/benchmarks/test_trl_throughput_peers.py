"""TRL's trainer and this package's step compute the same training, at a small size; needs the extra ``peers``."""

import jax
import numpy as np
import pytest

from entangle.models import DecoderConfig
from scripts.benchmarks.measuring import Benchmark, measure

pytest.importorskip("torch")
pytest.importorskip("trl")

# TRL uses names of transformers that are deprecated.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")]


def test_both_sides_make_the_same_training(tmp_path):
    from scripts.benchmarks.trl_throughput import contenders

    config = DecoderConfig(vocab_size=101, max_positions=16, width=16, layers=2, heads=2)
    # after two batches both begin again with the first
    rounds = Benchmark("", "peers", (), (), lambda folder: None, warm_up=4, runs=1, tolerance=1e-5)
    # optax's AdamW relies on implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        result = measure(rounds, contenders(tmp_path, config, 3, 5, 7, batches=2))
    ours, theirs = (np.array(timing.losses) for timing in result.timings)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    # Batches differ, training moves the loss by more than the sides differ, and it is not the log 2 of equal log-ratios.
    assert abs(ours[0] - ours[1]) > 1e-3
    assert ours[0] - ours[2] > 1e-5 and ours[1] - ours[3] > 1e-5
    assert abs(ours[0] - np.log(2)) > 1e-3
