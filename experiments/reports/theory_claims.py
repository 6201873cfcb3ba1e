"""The theory's claims, each judged over the measured points by the tolerances that are named here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.reports.claims import Verdict, judge
from experiments.theorems.theory_points import (
    SIDES,
    last_token,
    measured_first,
    objectives,
    positions,
    predicted_first,
    repeated,
    single,
    step_errors,
    stepped,
    toy,
    uniform,
)
from experiments.theorems.theory_rows import Row, column, pick, values

EXACT = 1e-10
"""Largest relative error, in float64, of a product or a first-order change that counts as equal to its prediction."""
REALISED = 1e-6
"""Largest error of a realised change, in units of C, against first and second order together; sums of logarithms are
rounded to about 1e-14 nats, and C is 1e-6."""
SLOPE = 0.1
"""Largest distance of a slope on the log-log plot from its order."""
SMALL = (3e-4, 3e-3)
"""Steps from which the slopes are read: below, rounding shows; above, orders beyond the third."""


class Part(NamedTuple):
    """Points that one figure, table or claim is about."""

    rows: list[Row]

    def off(self, measured: str, predicted: str) -> np.ndarray:
        """Relative errors, over the prediction or, where that is below 1e-3, over that."""
        theory = column(self.rows, f"theory_{predicted}")
        return np.abs(column(self.rows, measured) - theory) / np.maximum(np.abs(theory), 1e-3)

    def missed(self, side: str, head: str = "") -> np.ndarray:
        """Errors of the realised change against first and second order, in units of C."""
        second = column(self.rows, "step") * column(self.rows, f"theory_second_{side}") if not head else 0.0
        return np.abs(column(self.rows, f"{head}realised_{side}") - column(self.rows, f"theory_{head}{side}") - second)


def ideal(rows: Sequence[Row], head: str = "") -> np.ndarray:
    """Whether the step raised the chosen and lowered the rejected log-probability."""
    return (column(rows, f"{head}realised_chosen") > 0) & (column(rows, f"{head}realised_rejected") < 0)


def judged(rows: Sequence[Row]) -> list[Verdict]:
    """Every claim with its verdict.

    Args:
      rows: of ``theory.csv``.
    """
    parts: tuple[Callable[[Sequence[Row]], list[Verdict]], ...] = (_theorem_1, _corollary, _theorem_3, _toy, _orders)
    return [verdict for part in parts for verdict in part(rows)]


def _theorem_1(rows: Sequence[Row]) -> list[Verdict]:
    exact, rounded, any_head = Part(uniform(rows)), Part(uniform(rows, 32)), Part(single(rows))
    names = ("inner_product", "chosen_sq_norm", "rejected_sq_norm", "cosine")
    errors, narrow = (np.max([part.off(name, name) for name in names], 0) for part in (exact, rounded))
    small = Part([row for row in any_head.rows if row["step"] < 1e-5])
    gaps = np.max([small.off(f"{kind}_{side}", side) for kind in ("predicted", "first_order") for side in SIDES], 0)
    steps, sizes = values(any_head.rows, "step"), len(any_head.rows)
    return [
        Verdict(
            "M tokens share all the probability: <g_w, g_l> = -|h|^2 / M, |g|^2 = |h|^2 (1 - 1/M), cos = -1 / (M - 1)",
            "Theorem 1",
            judge(errors < EXACT, "point"),
            f"{len(errors)} points; largest relative error {errors.max():.0e}, in float32 {narrow.max():.0e}",
        ),
        Verdict(
            "the same: the ideal case, and a small step raises the chosen and lowers the rejected one",
            "Theorem 1",
            judge((column(exact.rows, "case") == 0) & ideal(exact.rows), "point"),
            _share((column(exact.rows, "case") == 0) & ideal(exact.rows)),
        ),
        Verdict(
            "single tokens, any softmax: the changes are |h|^2 (1 - s_w + s_l) and -|h|^2 (1 + s_w - s_l)",
            "derived",
            judge(gaps < EXACT, "point"),
            f"{len(gaps)} heads; largest relative error {gaps.max():.0e}",
        ),
        Verdict(
            "the same: ideal under a step of any size, not to first order only",
            "derived",
            judge(ideal(any_head.rows), "point"),
            f"{sizes} points, C from {steps[0]:g} to {steps[-1]:g}: {_share(ideal(any_head.rows))}",
        ),
    ]


def _corollary(rows: Sequence[Row]) -> list[Verdict]:
    even, any_head = last_token(rows, 0.0), last_token(rows, 2.0)
    both = Part([*even, *any_head])
    moved = [row for row in rows if row["setup"] == "last_token" and row["position"] >= 0]
    whole = np.max([both.off(f"first_order_{side}", side) for side in SIDES], 0)
    return [
        Verdict(
            "responses equal but for their last token, any head: that token's own log-probability rises if chosen and falls "
            "if rejected, under a step of any size",
            "Corollary",
            judge(ideal(moved, "position_"), "point"),
            _share(ideal(moved, "position_")),
        ),
        Verdict(
            "the whole responses, uniform model, neither token in the prefix: ideal under a small step",
            "Corollary",
            judge(ideal(even), "point"),
            _share(ideal(even)),
        ),
        Verdict(
            "the whole responses, any head: ideal under a small step (does not follow: the prefix moves, too)",
            "Corollary, taken further",
            judge(ideal(any_head), "point"),
            f"chosen rises in {(column(any_head, 'realised_chosen') > 0).mean():.0%}, rejected falls in "
            f"{(column(any_head, 'realised_rejected') < 0).mean():.0%}",
        ),
        Verdict(
            "the whole responses, uniform model, the rejected token also in the prefix: ideal (does not follow either)",
            "Corollary, taken further",
            judge(ideal(repeated(rows)), "point"),
            f"chosen rises in {(column(repeated(rows), 'realised_chosen') > 0).mean():.0%}",
        ),
        Verdict(
            "the whole responses, any head: both move by the last token's change and sum_i <h_i, h_m> ([y_i = w] - [y_i = l] "
            "- s_i[w] + s_i[l])",
            "derived",
            judge(whole < EXACT, "point"),
            f"{len(whole)} points; largest relative error {whole.max():.0e}",
        ),
    ]


def _theorem_3(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    place = column(positions(rows), "position")
    for name, here in (("before", place < 1), ("at", place == 1), ("after", place > 1)):
        part = Part([row for row, holds in zip(positions(rows), here, strict=True) if holds])
        kinds = [("position_inner_product", "position_inner_product")]
        kinds += [(f"position_first_order_{side}", f"position_{side}") for side in SIDES]
        errors = np.max([part.off(*kind) for kind in kinds], 0)
        realised = np.max([part.missed(side, "position_") for side in SIDES], 0)
        found.append(
            Verdict(
                f"the table's row {name} the differing position: inner product and both changes, to first order and realised",
                "Theorem 3",
                judge((errors < EXACT) & (realised < REALISED), "point"),
                f"{len(errors)} points; largest relative error {errors.max():.0e}, realised within {realised.max():.0e} C",
            )
        )
    after = [row for row in positions(rows) if row["position"] > 1 and row["theory_likelier"]]
    strict = [row for row in after if row["theory_others_not"]]
    claims = (
        ("and no other token is: both changes of the suffix position are negative", "derived", strict),
        ("whatever the others: the same (does not follow)", "Theorem 3, taken further", after),
    )
    for text, where, those in claims:
        if those:
            chosen, rejected = (column(those, f"position_realised_{side}") <= 0 for side in SIDES)
            numbers = (
                f"{len(those)} positions; chosen negative in {chosen.mean():.0%}, rejected in {rejected.mean():.0%}"
            )
            text = f"the suffix token is likelier in the chosen context, {text}"
            found.append(Verdict(text, where, judge(chosen & rejected, "position"), numbers))
    return found


def _toy(rows: Sequence[Row]) -> list[Verdict]:
    lengths = Part(toy(rows))
    errors = np.max([lengths.off(name, name) for name in ("cosine", "inner_product")], 0)
    realised = np.max([lengths.missed(side) for side in SIDES], 0)
    found = [
        Verdict(
            "the toy: cosine and both changes at every suffix length, the changes linear in it",
            "Theorem 3",
            judge((errors < EXACT) & (realised < REALISED), "length"),
            f"{len(errors)} lengths; largest relative error {errors.max():.0e}, realised within {realised.max():.0e} C",
        )
    ]
    sweep = {gap: toy(rows, gap) for gap in values(pick(rows, "suffix", "gap"), "gap") if gap != 0}
    sweep = {gap: found for gap, found in sweep.items() if len(found) > 1}
    for text, where, those in (
        ("likelier in the chosen context: the chosen one falls from the predicted length on", "Theorem 3", 1),
        ("less likely there (the condition fails): the rejected one rises from the predicted length on", "derived", -1),
    ):
        agree = [measured_first(part) == predicted_first(part) for gap, part in sweep.items() if np.sign(gap) == those]
        if agree:
            numbers = _share(np.array(agree), "gaps")
            found.append(Verdict(f"suffix token {text}", where, judge(np.array(agree), "gap"), numbers))
    swept = objectives(rows)
    signs = np.all([np.sign(column(swept, f"realised_{s}")) == np.sign(column(swept, f"theory_{s}")) for s in SIDES], 0)
    names = values(swept, "objective")
    holds = np.array([signs[[row["objective"] == name for row in swept]].all() for name in names])
    text = "unequal coefficients: at every suffix length both changes have the sign that Condition 2 says"
    return [*found, Verdict(text, "Condition 2", judge(holds, "objective"), _share(signs))]


def slope(rows: Sequence[Row], order: int) -> float | None:
    """Slope of the mean error over the step on the log-log plot, read from small steps; None with fewer than two."""
    means = {step: errors.mean() for step, errors in step_errors(rows, order).items() if SMALL[0] <= step <= SMALL[1]}
    if len(means) < 2:
        return None
    return float(np.polyfit(np.log(list(means)), np.log(list(means.values())), 1)[0])


def _orders(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    for order, text in ((1, "first order"), (2, "first and second order")):
        slopes = {name: slope(part, order) for name, part in stepped(rows).items()}
        known = {name: value for name, value in slopes.items() if value is not None}
        if known:
            holds = np.abs(np.array(list(known.values())) - order - 1) < SLOPE
            numbers = ", ".join(f"{value:.2f} ({name})" for name, value in known.items())
            text = f"the error of {text} goes with the step to the power {order + 1}"
            found.append(Verdict(text, "derived", judge(holds, "set-up"), numbers))
    small = [row for part in stepped(rows).values() for row in part if SMALL[0] <= row["step"] <= SMALL[1]]
    if small:
        beyond = [column(small, f"realised_{side}") - column(small, f"theory_{side}") for side in SIDES]
        text = "beyond first order a small step lowers both sides"
        found.append(
            Verdict(
                text,
                "derived",
                judge(np.concatenate(beyond) < 0, "change"),
                _share(np.concatenate(beyond) < 0, "changes"),
            )
        )
    return found


def _share(holds: np.ndarray, what: str = "points") -> str:
    return f"{int(holds.sum())} of {len(holds)} {what}"
