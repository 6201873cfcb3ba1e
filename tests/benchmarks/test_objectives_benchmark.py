"""The contenders of the objectives benchmark, at a small size: all the work is done, and what is checked of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import losses
from entangle.models import DecoderConfig
from scripts.benchmarks import objectives
from scripts.benchmarks.measuring import measure
from scripts.benchmarks.table import BENCHMARKS

CONFIG = DecoderConfig(vocab_size=101, max_positions=16, width=16, layers=2, heads=2)


@pytest.mark.slow
def test_both_sides_run_and_agree_with_themselves():
    sides = objectives.contenders(CONFIG, 32, 16)
    result = measure(BENCHMARKS["objectives"]._replace(runs=2), sides)
    assert [timing.name for timing in result.timings] == ["objectives", "forward"]
    for timing in result.timings:
        np.testing.assert_allclose(timing.losses, 1.0, rtol=1e-5)


def test_one_call_has_every_objective_with_its_coefficients():
    lp = objectives.draw_log_probs(32, 16)
    found = jax.jit(objectives.all_objectives)(lp)
    assert set(found) == set(losses.OBJECTIVES)
    for loss, d in found.values():
        for numbers in (loss, d.chosen, d.rejected):
            assert numbers.shape == (32,) and numbers.dtype == jnp.float32
            assert np.isfinite(numbers).all()
    right = losses.loss_and_coefficients(losses.ipo, lp)
    np.testing.assert_allclose(found["ipo"][0], right[0], rtol=1e-5)
    np.testing.assert_allclose(found["ipo"][1].rejected, right[1].rejected, rtol=1e-5)


def test_the_drawn_pairs_are_plausible():
    lp = objectives.draw_log_probs(500, 16)
    for policy, reference, length in ((lp[0], lp[2], lp[4]), (lp[1], lp[3], lp[5])):
        assert (policy < 0).all() and (reference <= -length).all() and (reference >= -4 * length).all()
        assert len(np.unique(length)) == 16 and length.min() == 1
        assert 1 < np.std(policy - reference) < 10


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: {"a": x, "b": x + 0.01 * isinstance(x, jax.core.Tracer)},  # compiled, it is another function
        lambda x: {"a": x, "b": x / (x - 1.0)},  # infinite
        lambda x: {"a": x, "b": jnp.log(-x)},  # not numbers
    ],
)
def test_wrong_numbers_are_noticed_before_anything_is_timed(wrong):
    with pytest.raises(AssertionError):
        objectives.contender("wrong", wrong, jnp.array([1.0, 2.0]))
