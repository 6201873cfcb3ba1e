"""What the theorems say, in closed form, from next-token probabilities alone; changes are in units of the step C."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from experiments.theorems.theory_setups import Point, Problem

Numbers = dict[str, float]


class Seen(NamedTuple):
    """What the theorems look at.

    Attributes:
      probabilities: ``[2, T, V]``, of the next token in the chosen and in the rejected context.
      tokens: ``[2, T]``.
      kernel: ``[T, T]``, inner products of the positions' hidden states.
      differs: the position whose token differs.
    """

    probabilities: np.ndarray
    tokens: np.ndarray
    kernel: np.ndarray
    differs: int


class Table(NamedTuple):
    """Theorem 3's table, ``[T]`` each: what a position adds to the products, and to both changes under DPO."""

    chosen_sq_norm: np.ndarray
    rejected_sq_norm: np.ndarray
    inner_product: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def see(problem: Problem) -> Seen:
    """The probabilities of a pair's next tokens.

    Example:
      >>> from experiments.theorems.theory_predictions import see
      >>> from experiments.theorems.theory_setups import Point, problem
      >>> see(problem(Point("suffix", prefix=0))).probabilities[0, 0].round(3).tolist()[:3]  # e^3 / (2 e^3 + 6)
      [0.435, 0.435, 0.022]
    """
    logits = problem.pair.logits(problem.params)
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = raised / raised.sum(-1, keepdims=True)
    return Seen(probabilities, problem.pair.tokens, problem.pair.kernel(), problem.differs)


def theorem_1(tokens: int, sq_hidden: float) -> Numbers:
    """Theorem 1: single tokens, M of which share all the probability.

    Example:
      >>> from experiments.theorems.theory_predictions import theorem_1
      >>> theorem_1(5, 1.0)["cosine"]
      -0.25
    """
    sq_norm = sq_hidden * (1 - 1 / tokens)
    return {
        "chosen_sq_norm": sq_norm,
        "rejected_sq_norm": sq_norm,
        "inner_product": -sq_hidden / tokens,
        "cosine": -1 / (tokens - 1),
        "chosen": sq_hidden,
        "rejected": -sq_hidden,
    }


def any_softmax(s_w: float, s_l: float, sq_hidden: float) -> Numbers:
    """Single tokens under any softmax: ``|g_w|^2 - <g_w, g_l>`` and its mirror, which are both changes under DPO.

    Example:
      >>> from experiments.theorems.theory_predictions import any_softmax
      >>> any_softmax(0.75, 0.25, 1.0)
      {'chosen': 0.5, 'rejected': -1.5}
    """
    return {"chosen": sq_hidden * (1 - s_w + s_l), "rejected": -sq_hidden * (1 + s_w - s_l)}


def corollary(seen: Seen) -> tuple[Numbers, float]:
    """Responses equal but for their last token: what that token changes by, and what the prefix adds to both responses.

    ``g_w - g_l`` has the last position's part alone, so that the last token obeys ``any_softmax``. The prefix moves with it
    as far as its hidden states overlap and its model tells the two tokens apart: ``sum_i <h_i, h_m> ([y_i = w] - [y_i = l] -
    s_i[w] + s_i[l])``.
    """
    m, (w, l) = seen.differs, seen.tokens[:, seen.differs]
    s, before = seen.probabilities[0], slice(0, seen.differs)
    y = seen.tokens[0, before]
    apart = (y == w).astype(float) - (y == l) - s[before, w] + s[before, l]
    return any_softmax(s[m, w], s[m, l], seen.kernel[m, m]), float(seen.kernel[before, m] @ apart)


def theorem_3(seen: Seen) -> Table:
    """Theorem 3: logits per position are trained; one token differs, what comes after is the same.

    Example:
      >>> from experiments.theorems.theory_predictions import see, theorem_3
      >>> from experiments.theorems.theory_setups import Point, problem
      >>> theorem_3(see(problem(Point("suffix", suffix=1)))).chosen.round(2).tolist()
      [0.0, 0.0, 1.0, -0.13]
    """
    (s_w, s_l), (y_w, y_l), places = seen.probabilities, seen.tokens, np.arange(seen.tokens.shape[1])
    own_w, own_l = s_w[places, y_w], s_l[places, y_l]
    difference = s_l - s_w
    moved = difference[places, y_w]
    at, after = places == seen.differs, places > seen.differs
    contrast = (1 - own_w + own_l, -(1 + own_w - own_l))
    chosen, rejected = (
        np.where(at, here, np.where(after, moved - (s * difference).sum(-1), 0.0))
        for here, s in zip(contrast, (s_w, s_l), strict=True)
    )
    shared = 1 - own_w - own_l + (s_w * s_l).sum(-1)
    return Table(
        1 - 2 * own_w + (s_w**2).sum(-1),
        1 - 2 * own_l + (s_l**2).sum(-1),
        np.where(at, (s_w**2).sum(-1) - own_w - own_l, shared),
        chosen,
        rejected,
    )


def crossing(table: Table, differs: int) -> float:
    """Length at which the change of a side, 0 at no other, passes through zero: the chosen one's, or the rejected one's.

    The suffix positions are alike. Where their shares are negative the chosen change passes, where positive the rejected.

    Returns:
      A length, any positive number; infinity where the suffix moves neither side, NaN without a suffix.
    """
    if differs + 1 == len(table.chosen):
        return np.nan
    share = table.chosen[-1], table.rejected[-1]
    if share[0] < 0:
        return float(-table.chosen[differs] / share[0])
    return float(-table.rejected[differs] / share[1]) if share[1] > 0 else np.inf


def second_order(seen: Seen, weights: tuple[float, float] = (1.0, 1.0)) -> Numbers:
    """What a step changes beyond first order, in units of C squared: ``- 1/2 sum_i Var_i(u_i)``, never positive.

    A softmax that is moved by C u has ``log s[y]`` changed by ``C (u[y] - E u) - C^2 Var(u) / 2`` and terms of third order.

    Args:
      seen: the pair.
      weights: of the two gradients in the step, d_w and d_l over the larger one.
    """
    one_hot = np.eye(seen.probabilities.shape[-1])[seen.tokens] - seen.probabilities
    u = seen.kernel @ (weights[0] * one_hot[0] - weights[1] * one_hot[1])
    mean = (seen.probabilities * u).sum(-1, keepdims=True)
    variance = (seen.probabilities * (u - mean) ** 2).sum((-2, -1))
    return dict(zip(("second_chosen", "second_rejected"), (-variance / 2).tolist(), strict=True))


def predict(point: Point, problem: Problem, weights: tuple[float, float] = (1.0, 1.0)) -> Numbers:
    """All that the theory says of a point.

    Args:
      point: the point.
      problem: its pair.
      weights: see ``second_order``.

    Returns:
      Products, ``chosen`` and ``rejected`` changes in units of C, those of the point's position, and what goes with them.
    """
    seen = see(problem)
    found = PREDICTORS[point.setup](point, seen, weights) | second_order(seen, weights)
    return {name: float(value) for name, value in found.items()}


def _uniform(point: Point, seen: Seen, weights: tuple[float, float]) -> Numbers:
    return theorem_1(point.tokens, seen.kernel[0, 0])


def _last_token(point: Point, seen: Seen, weights: tuple[float, float]) -> Numbers:
    last, shared = corollary(seen)
    found = {side: change + shared for side, change in last.items()} | {"prefix": shared}
    return found | ({f"position_{side}": last[side] for side in last} if point.position == seen.differs else {})


def _suffix(point: Point, seen: Seen, weights: tuple[float, float]) -> Numbers:
    last = seen.probabilities[:, -1, seen.tokens[0, -1]]
    found = _random(point, seen, weights) | {"crossing": crossing(theorem_3(seen), seen.differs)}
    # contexts that differ in the suffix token's logit alone have parallel gradients there, whose lengths have this ratio
    return found | ({"limit_ratio": (1 - last[1]) / (1 - last[0])} if point.suffix else {})


def _random(point: Point, seen: Seen, weights: tuple[float, float]) -> Numbers:
    table = theorem_3(seen)
    chosen_sq_norm, rejected_sq_norm, inner_product, chosen, rejected = (float(column.sum()) for column in table)
    x, y = weights  # of DPO both are 1, and the changes those of the theorem; else they are Condition 2's
    found = {
        "chosen_sq_norm": chosen_sq_norm,
        "rejected_sq_norm": rejected_sq_norm,
        "inner_product": inner_product,
        "cosine": inner_product / np.sqrt(chosen_sq_norm * rejected_sq_norm),
        "chosen": x * chosen + (x - y) * inner_product,
        "rejected": y * rejected + (x - y) * inner_product,
        "needed_ratio": inner_product / chosen_sq_norm,
        "allowed_ratio": rejected_sq_norm / inner_product if inner_product > 0 else np.inf,
    }
    i = point.position
    if i >= 0:
        found |= {
            f"position_{name}": float(getattr(table, name)[i]) for name in ("inner_product", "chosen", "rejected")
        }
        apart = seen.probabilities[0, i] - seen.probabilities[1, i]
        found["likelier"] = float(apart[seen.tokens[0, i]] > 0)
        found["others_not"] = float(np.delete(apart, seen.tokens[0, i]).max() <= 0)
    return found


PREDICTORS: Mapping[str, Callable[[Point, Seen, tuple[float, float]], Numbers]] = MappingProxyType(
    {"uniform": _uniform, "last_token": _last_token, "suffix": _suffix, "random": _random}
)
"""What is said of a point, by the name of its set-up."""
