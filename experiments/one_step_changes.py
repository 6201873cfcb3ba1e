"""What the one-step study measures: changes of every pair's two log-probabilities, and what counts as a change."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PROTECT = "protect_chosen"
ALONE = "pair_sgd"
ON_BATCH = ("batch_sgd", "adam_first", "adam_warm", "adam_own")
SETTINGS = (ALONE, *ON_BATCH)


class Changes(NamedTuple):
    """What one remedy's step did to the pairs.

    Attributes:
      first_order: ``[N, 2]``, of chosen and rejected.
      realised: ``[N, 2]``.
      step: length of the update.
    """

    first_order: np.ndarray
    realised: np.ndarray
    step: float


class Measured(NamedTuple):
    """What was measured from one start point.

    Attributes:
      changes: setting -> remedy -> changes.
      coefficients: d_w and d_l of the objective itself, before any rule, ``[N, 2]``.
      norms: ``[N, 2]``, of the gradients of the log-probabilities.
      sum_norms: lengths of the means of d_w g_w and d_l g_l, and of their difference.
    """

    changes: dict[str, dict[str, Changes]]
    coefficients: np.ndarray
    norms: np.ndarray
    sum_norms: np.ndarray


STILL = 1e-5
"""Change over what the step could do at most, |g| |update|, below which a row stays put: what is left there is of second
order."""


def signs(values: np.ndarray, norms: np.ndarray, step: float) -> np.ndarray:
    """-1 where a row falls, 1 where it rises, 0 where it stays put.

    Example:
      >>> import numpy as np
      >>> from experiments.one_step_changes import signs
      >>> signs(np.array([1e-3, -1e-3, 1e-9]), np.ones(3), 1e-2).tolist()
      [1.0, -1.0, 0.0]
    """
    return np.where(np.abs(values) > STILL * norms * step, np.sign(values), 0.0)


def agreement(changes: Changes, norms: np.ndarray) -> float:
    """Share of rows whose realised change has the first-order change's sign, among those that first order moves."""
    moved = signs(changes.first_order, norms, changes.step)
    same = np.sign(changes.realised) == moved
    return float(same[moved != 0].mean()) if (moved != 0).any() else 1.0
