"""Pair log-probabilities to try objectives on, in NumPy float64; batches of one size, so that operations compile once."""

import jax.numpy as jnp
import numpy as np

from entangle.types import PairLogProbs

COUNT = 324


def drawn(chosen, rejected=None):
    """Pairs around 100 nats; both sides' policy is moved from the reference, and points of reference with it."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, size=(2, COUNT)).astype(float)
    reference = -3 * lengths * rng.uniform(0.5, 1.5, size=(2, COUNT))
    shift = np.array([[chosen], [chosen if rejected is None else rejected]])
    policy = np.minimum(reference + shift + 8 * rng.standard_normal((2, COUNT)), -0.01)
    return PairLogProbs(*policy, *reference, *lengths)


def extreme():
    """All combinations of tiny to huge log-probabilities; with them come equal responses and empty completions."""
    values = [0.0, -1e-6, -1.5, -300.0, -1e4, -1e5]
    grid = np.array(np.meshgrid(values, values, [0.0, -2.0, -1e5], [0.0, -2.0, -1e5])).reshape(4, -1)
    empty = grid[:2] == 0.0
    return PairLogProbs(*grid, *np.where(empty, 0.0, np.array([[3.0], [500.0]])))


def kinks():
    """Numbers on which hinges are just met, penalties just due, targets reached: all sums are exact in binary."""
    grid = np.array(
        np.meshgrid(
            [0.0, -2.5, -5.0, -10.0, -50.0, -80.0],
            [0.0, -2.5, -5.0, -10.0, -50.0, -80.0],
            [0.0, -2.5, -10.0],
            [0.0, -2.5, -10.0],
        )
    )
    return PairLogProbs(*grid.reshape(4, -1), np.ones(COUNT), np.full(COUNT, 2.0))


BATCHES = {
    "rising": drawn(5.0),
    "falling": drawn(-5.0),
    "apart": drawn(40.0, -40.0),
    "extreme": extreme(),
    "kinks": kinks(),
}


def as_jax(lp, dtype):
    return PairLogProbs(*(jnp.asarray(field, dtype) for field in lp))


def one(*fields):
    return PairLogProbs(*(jnp.array([x], jnp.float32) for x in fields))
