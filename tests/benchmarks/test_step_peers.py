"""The step benchmark's two sides compute the same training, at a small size; needs the extra ``peers``."""

import jax
import numpy as np
import pytest

from entangle.models import DecoderConfig
from scripts.benchmarks.measuring import Benchmark, measure

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.peers


def test_both_sides_make_the_same_training(tmp_path):
    from scripts.benchmarks.step import contenders

    config = DecoderConfig(vocab_size=101, max_positions=16, width=16, layers=2, heads=2)
    rounds = Benchmark("", "peers", (), (), lambda folder: None, warm_up=3, runs=1, tolerance=1e-5)
    # optax's AdamW relies on implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        result = measure(rounds, contenders(tmp_path, config, 3, 16))
    np.testing.assert_allclose(result.timings[0].losses, result.timings[1].losses, rtol=0, atol=1e-6)
    # Training moves the loss by far more than they differ, and it is not the log 2 of equal log-ratios.
    assert result.timings[0].losses[0] - result.timings[0].losses[-1] > 1e-4
    assert abs(result.timings[0].losses[0] - np.log(2)) > 1e-2
