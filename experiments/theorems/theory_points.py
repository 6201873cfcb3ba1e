"""What of the measured points a figure, a table or a claim is about, and what is read off it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from experiments.theorems.theory_rows import Row, column, pick, values

SIDES = ("chosen", "rejected")
HEAD: Mapping[str, Any] = MappingProxyType({"setup": "last_token", "vocabulary": 16})
"""What all points of a drawn head share."""
RANDOM: Mapping[str, Any] = MappingProxyType({"setup": "random", "prefix": 1, "suffix": 3})
"""What all points of drawn logits share."""
STEPPED = 8
"""Suffix length at which the toy's step is swept."""


def uniform(rows: Sequence[Row], bits: int = 64) -> list[Row]:
    """Theorem 1's points."""
    made = [row for row in rows if row["setup"] == "uniform"]
    return pick(made, "tokens", "seed", setup="uniform", vocabulary=int(made[0]["vocabulary"]), bits=bits)


def single(rows: Sequence[Row]) -> list[Row]:
    """Single tokens under any head, steps of all sizes."""
    return pick(rows, "scale", "seed", "step", **HEAD, prefix=0)


def last_token(rows: Sequence[Row], scale: float) -> list[Row]:
    """The corollary's points at the small step; scale 0 is the uniform model."""
    found = pick(rows, "seed", "prefix", "overlap", "position", **HEAD, scale=scale)
    return [row for row in found if row["position"] == row["prefix"]]


def repeated(rows: Sequence[Row]) -> list[Row]:
    """The corollary's points whose prefix has the rejected token, too."""
    return [row for row in rows if row["repeats"] > 0]


def positions(rows: Sequence[Row]) -> list[Row]:
    """Theorem 3's points: one position each, of random logits."""
    found = pick(rows, "seed", "spread", "position", **RANDOM)
    return [row for row in found if row["position"] >= 0]


def toy(rows: Sequence[Row], gap: float = 1.0) -> list[Row]:
    """The toy by suffix length."""
    return sorted(pick(rows, "suffix", gap=gap), key=lambda row: row["suffix"])


def objectives(rows: Sequence[Row]) -> list[Row]:
    """The toy under the swept objectives, whose reference is that of ``fallen``."""
    found = pick(rows, "suffix", "objective", "fallen")
    fallen = next((row["fallen"] for row in found if row["fallen"] != 0), 0.0)
    return [row for row in found if row["fallen"] == fallen]


def with_objective(rows: Sequence[Row], objective: str) -> list[Row]:
    """The toy under one of them, by suffix length."""
    found = [row for row in objectives(rows) if row["objective"] == objective]
    return sorted(found, key=lambda row: row["suffix"])


def ratio(part: Sequence[Row]) -> np.ndarray:
    """``d_w / d_l``; infinite where the rejected side has no coefficient.

    Example:
      >>> from experiments.theorems.theory_points import ratio
      >>> ratio([{"d_w": 1.0, "d_l": 2.0}, {"d_w": 1.0, "d_l": 0.0}]).tolist()
      [0.5, inf]
    """
    d_w, d_l = column(part, "d_w"), column(part, "d_l")
    return np.where(d_l == 0, np.inf, d_w / np.where(d_l == 0, 1, d_l))


def first(holds: np.ndarray, rows: Sequence[Row]) -> int | None:
    """The first suffix length from which on something holds, if it does at the longest.

    Example:
      >>> import numpy as np
      >>> from experiments.theorems.theory_points import first
      >>> first(np.array([True, False, True]), [{"suffix": 0}, {"suffix": 1}, {"suffix": 2}])
      2
    """
    misses = np.flatnonzero(~holds)
    start = int(misses[-1]) + 1 if misses.size else 0
    return int(rows[start]["suffix"]) if start < len(rows) else None


def predicted_first(part: Sequence[Row]) -> int | None:
    """The first suffix length, of those measured, beyond the predicted crossing."""
    crossing = part[-1]["theory_crossing"]
    return int(crossing) + 1 if crossing < part[-1]["suffix"] else None


def measured_first(part: Sequence[Row]) -> int | None:
    """The first suffix length at which the chosen one falls, or with a negative gap the rejected one rises."""
    rise = part[-1]["gap"] < 0
    return first(column(part, "realised_rejected") > 0 if rise else column(part, "realised_chosen") < 0, part)


def step_errors(rows: Sequence[Row], order: int) -> dict[float, np.ndarray]:
    """Errors of the theory in nats, both sides, of every point: by size of the step.

    Args:
      rows: points that differ in step and seed.
      order: 1 or 2, that the prediction goes to.

    Example:
      >>> from experiments.theorems.theory_points import step_errors
      >>> row = {f"{kind}_{side}": 1.0 for kind in ("theory", "realised") for side in ("chosen", "rejected")}
      >>> {step: errors.tolist() for step, errors in step_errors([row | {"step": 0.1, "realised_chosen": 3.0}], 1).items()}
      {0.1: [0.2, 0.0]}
    """
    found = {}
    for step in values(rows, "step"):
        here = [row for row in rows if row["step"] == step]
        errors = []
        for side in SIDES:
            beyond = column(here, f"realised_{side}") - column(here, f"theory_{side}")
            if order == 2:
                beyond = beyond - step * column(here, f"theory_second_{side}")
            errors.append(step * np.abs(beyond))
        found[step] = np.concatenate(errors)
    return found


def stepped(rows: Sequence[Row], bits: int = 64) -> dict[str, list[Row]]:
    """Points whose step is swept, by what they are called."""
    found = {
        "one token, any head": pick(rows, "seed", "step", **HEAD, prefix=0, scale=2.0, bits=bits),
        "random logits, suffix 3": pick(rows, "seed", "step", **RANDOM, spread=0.5, bits=bits),
        f"toy, suffix {STEPPED}": pick(rows, "step", suffix=STEPPED, bits=bits),
    }
    return {name: [row for row in part if row["step"] > 1e-5] for name, part in found.items()}
