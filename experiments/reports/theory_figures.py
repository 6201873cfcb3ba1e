"""The theory's figures from the table of measured points: PNG, PDF and the plotted numbers as CSV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reports import plotting
from experiments.reports.plotting import BLUE, GREEN, ORANGE, SIDES, VERMILION
from experiments.theorems.theory_points import (
    measured_first,
    objectives,
    positions,
    ratio,
    step_errors,
    stepped,
    toy,
    uniform,
    with_objective,
)
from experiments.theorems.theory_predictions import crossing, see, theorem_1, theorem_3
from experiments.theorems.theory_rows import Row, column, pick, values
from experiments.theorems.theory_setups import Point, problem

NAMES = ("cosine", "positions", "suffix", "crossing", "step_size", "objectives")
UNIT = "units of C = ηβc"
PLACES = {"before": "o", "at": "s", "after": "^"}
LINES: tuple[tuple[str, Any], ...] = (
    *((BLUE, "-"), (VERMILION, "--"), ("#CC79A7", "-."), (ORANGE, (0, (5, 1, 1, 1))), ("black", ":")),
    *(("#56B4E9", "--"), (GREEN, "-."), ("0.4", "-")),
)
"""Of objectives in their order, then from the start again."""


def draw(out: Path, rows: Sequence[Row]) -> list[Path]:
    """Draw all figures into ``out/figures``.

    Args:
      out: the study's folder.
      rows: of its table.

    Returns:
      The PNG files.
    """
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    makers = (_cosine, _positions, _suffix, _crossing, _step_size, _objectives)
    with matplotlib.rc_context(plotting.STYLE):
        return [make(rows, folder / name) for make, name in zip(makers, NAMES, strict=True)]


def _panels(count: int, width: float = 3.8, height: float = 3.4, *, sharey: bool = False) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, sharey=sharey)[0]


def _dots(axes: Axes, x: Any, y: Any, colour: str, label: str, marker: str = "o", size: float = 4.5) -> None:
    axes.plot(x, y, marker, color=colour, label=label, markersize=size, markerfacecolor="none")


def _below(figure: Figure, axes: Axes, columns: int) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def _cosine(rows: Sequence[Row], path: Path) -> Path:
    figure, (left, right) = _panels(2)
    tokens, table = np.array(values(uniform(rows), "tokens")), []
    left.plot(tokens, [theorem_1(int(m), 1.0)["cosine"] for m in tokens], color=BLUE, label="predicted: −1/(M − 1)")
    for bits, colour, marker in ((64, BLUE, "o"), (32, ORANGE, "s")):
        part = uniform(rows, bits)
        draws = [[row for row in part if row["tokens"] == m] for m in tokens]
        errors = [np.abs(column(some, "cosine") / column(some, "theory_cosine") - 1).max() for some in draws]
        _dots(right, tokens, np.maximum(errors, 1e-17), colour, f"float{bits}", marker)
        if bits == 64:
            means = [column(some, "cosine").mean() for some in draws]
            _dots(left, tokens, means, VERMILION, f"measured, {len(draws[0])} draws")
        table += [(bits, *(row[name] for name in ("tokens", "seed", "theory_cosine", "cosine"))) for row in part]
    left.set_ylabel("cosine of g_w and g_l")
    right.set(yscale="log", ylim=(1e-17, 1e-5), ylabel="its largest relative error")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="M, tokens that share all the probability")
        axes.set_xticks(tokens, [f"{m:g}" for m in tokens])
        axes.set_xticks([], minor=True)
        axes.legend(loc="lower right" if axes is left else "center right")
    figure.suptitle("Theorem 1: single tokens, the head trained", fontsize=9)
    plotting.write_csv(path.with_suffix(".csv"), ("bits", "tokens", "seed", "predicted", "measured"), table)
    return plotting.save(figure, path)


def _positions(rows: Sequence[Row], path: Path) -> Path:
    figure, (left, right) = _panels(2)
    fixed = sorted(pick(rows, "position", suffix=2), key=lambda row: row["position"])[1:]  # -1 is no position
    table = []
    for side, (colour, _) in SIDES.items():
        for order, (place, marker) in enumerate(PLACES.items()):
            some = [row for row in positions(rows) if np.sign(row["position"] - 1) == order - 1]
            x, y = (column(some, f"{kind}_{side}") for kind in ("theory_position", "position_realised"))
            _dots(left, x, y, colour, f"{side}, {place}", marker, 3.5)
            table += [("random", place, side, *both) for both in zip(x, y, strict=True)]
        x, y = (column(fixed, f"{kind}_{side}") for kind in ("theory_position", "position_realised"))
        places = column(fixed, "position") + (0.12 if side == "chosen" else -0.12)
        right.plot(places, x, "_", color=colour, markersize=14, label=f"{side}, predicted")
        _dots(right, places, y, colour, f"{side}, realised")
        table += [("toy", int(p), side, *both) for p, *both in zip(column(fixed, "position"), x, y, strict=True)]
    ends = left.get_xlim()
    left.plot(ends, ends, color="black", linewidth=0.6, zorder=0)
    left.set(xlabel=f"predicted change, {UNIT}", ylabel=f"realised change, {UNIT}", title="random logits")
    right.set(xlabel="position", ylabel=f"change, {UNIT}", title="toy, two suffix tokens")
    right.set_xticks(range(5), ["prefix", "prefix", "differs", "suffix", "suffix"])
    left.legend(fontsize=7, title_fontsize=7, loc="upper left", title="before, at or after the differing position")
    right.legend(fontsize=7)
    figure.suptitle("Theorem 3: what one DPO step changes at every position", fontsize=9)
    plotting.write_csv(path.with_suffix(".csv"), ("logits", "position", "side", "predicted", "realised"), table)
    return plotting.save(figure, path)


def _suffix(rows: Sequence[Row], path: Path) -> Path:
    figure, (left, right) = _panels(2, height=3.8)
    part = toy(rows)
    lengths = column(part, "suffix")
    left.plot(lengths, column(part, "theory_cosine"), color=BLUE, label="predicted")
    _dots(left, lengths, column(part, "cosine"), BLUE, "measured", size=3.5)
    left.set(xlabel="suffix tokens", ylabel="cosine of g_w and g_l", ylim=(0, 1.02))
    for side, (colour, line) in SIDES.items():
        right.plot(lengths, column(part, f"theory_{side}"), color=colour, linestyle=line, label=f"{side}, predicted")
        _dots(right, lengths, column(part, f"realised_{side}"), colour, f"{side}, realised", size=3.5)
    at = part[-1].get("theory_crossing", np.inf)
    right.axhline(0, color="black", linewidth=0.6)
    if at <= lengths[-1]:
        right.axvline(at, color="black", linewidth=0.8, linestyle=":", label=f"chosen falls: beyond {at:.2f} tokens")
    right.set(xlabel="suffix tokens", ylabel=f"change, {UNIT}")
    left.legend(loc="lower right")
    _below(figure, right, 3)
    figure.suptitle("Theorem 3, the toy: one differing token and a shared suffix", fontsize=9)
    names = ("suffix", "theory_cosine", "cosine", *(f"{k}_{s}" for s in SIDES for k in ("theory", "realised")))
    plotting.write_csv(path.with_suffix(".csv"), names, ([row[name] for name in names] for row in part))
    return plotting.save(figure, path)


def _crossing(rows: Sequence[Row], path: Path) -> Path:
    figure, (axes,) = _panels(1, 5.8, 3.8)
    longest = max(row["suffix"] for row in toy(rows))
    gaps, table = values(pick(rows, "suffix", "gap"), "gap"), []
    sides = ((1, *SIDES["chosen"], "o", "chosen falls"), (-1, *SIDES["rejected"], "s", "rejected rises"))
    for sign, colour, line, marker, text in sides:
        fine = sign * np.geomspace(0.02, max(1.0, *(sign * gap for gap in gaps)) * 1.1, 200)
        label = f"{text}: predicted beyond this line"
        axes.plot(fine, [_predicted(gap) for gap in fine], color=colour, linestyle=line, label=label)
        found = {gap: measured_first(toy(rows, gap)) for gap in gaps if np.sign(gap) == sign}
        seen = {gap: n for gap, n in found.items() if n is not None}
        _dots(axes, list(seen), list(seen.values()), colour, f"{text}: first length measured", marker)
        table += [(gap, text, _predicted(gap), n) for gap, n in found.items()]
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set(ylim=(0, max(1, longest) * 1.05), ylabel="suffix tokens")
    axes.set_xlabel("nats by which the suffix token's logit is higher in the chosen context")
    _below(figure, axes, 2)
    axes.set_title("The toy: from which suffix length on both sides move together", fontsize=9)
    plotting.write_csv(path.with_suffix(".csv"), ("gap", "what", "predicted", "first_measured"), table)
    return plotting.save(figure, path)


def _predicted(gap: float) -> float:
    made = problem(Point("suffix", suffix=1, gap=float(gap)))
    return crossing(theorem_3(see(made)), made.differs)


def _step_size(rows: Sequence[Row], path: Path) -> Path:
    figure, panels = _panels(3, 3.3, sharey=True)
    table: list[tuple[Any, ...]] = []
    kinds = ((64, 1, BLUE, "o", "first order"), (64, 2, GREEN, "s", "first and second order"))
    for axes, name in zip(panels, stepped(rows), strict=True):
        for bits, order, colour, marker, text in (*kinds, (32, 1, ORANGE, "^", "first order, float32")):
            errors = step_errors(stepped(rows, bits)[name], order)
            steps, means = np.array(list(errors)), np.array([each.mean() for each in errors.values()])
            _dots(axes, steps, means, colour, f"error of {text}", marker)
            guide = steps[steps <= 0.3]
            if bits == 64 and guide.size:
                near = int(np.argmin(np.abs(np.log(guide / 1e-3))))
                power = means[near] * (guide / guide[near]) ** (order + 1)
                line = ("-", "--")[order - 1]
                axes.plot(guide, power, color=colour, linestyle=line, linewidth=0.9, label=f"slope {order + 1}")
            table += [(name, bits, order, *both) for both in zip(steps, means, strict=True)]
        axes.set(xscale="log", yscale="log", xlabel="step, C = ηβc", title=name, ylim=(1e-16, 1e2))
    panels[0].set_ylabel("mean error of the change, nats")
    _below(figure, panels[0], 5)
    figure.suptitle("Realised minus predicted change of both log-probabilities, mean over sides and draws", fontsize=9)
    plotting.write_csv(path.with_suffix(".csv"), ("setup", "bits", "order", "step", "mean_error_nats"), table)
    return plotting.save(figure, path)


def _objectives(rows: Sequence[Row], path: Path) -> Path:
    figure, (axes,) = _panels(1, 6.6, 4.6)
    names = list(dict.fromkeys(row["objective"] for row in objectives(rows)))
    band = with_objective(rows, names[0])
    lengths = column(band, "suffix")
    low, high = (column(band, f"theory_{kind}_ratio") for kind in ("needed", "allowed"))
    axes.fill_between(
        lengths, low, high, color=GREEN, alpha=0.18, linewidth=0, label="ideal: chosen rises, rejected falls"
    )
    table: list[tuple[Any, ...]] = [("needed", *both) for both in zip(lengths, low, strict=True)]
    table += [("allowed", *both) for both in zip(lengths, high, strict=True)]
    for (ratios, together), (colour, line) in zip(_alike(rows, names), LINES * len(names), strict=False):
        axes.plot(lengths, ratios, color=colour, linestyle=line, label="; ".join(together) + _off(ratios))
        falls = column(with_objective(rows, together[0]), "realised_chosen") < 0
        axes.plot(lengths[falls][:1], ratios[falls][:1], "x", color=colour, markersize=7)
        table += [(name, *both) for name in together for both in zip(lengths, ratios, strict=True)]
    axes.plot([], [], "x", color="black", label="first length at which the chosen one falls, realised")
    axes.set(yscale="log", xlabel="suffix tokens", ylabel="d_w / d_l", ylim=(0.3, 300))
    _below(figure, axes, 2)
    title = "Condition 2 in the toy: above the band the rejected one rises, below it the chosen one falls"
    axes.set_title(title, fontsize=9)
    plotting.write_csv(path.with_suffix(".csv"), ("objective", "suffix", "ratio"), table)
    return plotting.save(figure, path)


def _off(ratios: np.ndarray) -> str:
    places = np.flatnonzero(np.isinf(ratios))
    return f": d_l = 0 from length {places[0]} on" if places.size else ""


def _alike(rows: Sequence[Row], names: Iterable[str]) -> list[tuple[np.ndarray, list[str]]]:
    """Objectives whose ratio of coefficients is the same, to 1e-3, at every suffix length."""
    found: list[tuple[np.ndarray, list[str]]] = []
    for name in names:
        mine = ratio(with_objective(rows, name))
        same = [together for other, together in found if np.allclose(other, mine, rtol=1e-3)]
        if same:
            same[0].append(name)
        else:
            found.append((mine, [name]))
    return found
