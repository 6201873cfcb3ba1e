"""Figures of a sweep from its run folders: one panel a group of trials, and where all of them end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reports.plotting import BLUE, GREEN, ORANGE, SIDES, STYLE, VERMILION, band, csv_rows, save, write_csv
from experiments.reports.run_tables import Curve
from experiments.reports.sweep_tables import Group, Sweep

CASES = {
    "ideal": GREEN,
    "both_fall": VERMILION,
    "both_rise": BLUE,
    "reversed": "#CC79A7",
    "inactive": "#999999",
}
SIDE_MARKS = {"chosen": (SIDES["chosen"][0], "o"), "rejected": (SIDES["rejected"][0], "s")}
COLUMNS = 5
Rows = list[tuple[Any, ...]]


def draw(sweep: Sweep, folder: Path) -> list[Path]:
    """Draw what every sweep over objectives, remedies or models shows.

    Args:
      sweep: see ``read_sweep``.
      folder: where the files go.

    Returns:
      The PNG files: log-probabilities, changes, margin, ratio of the coefficients, cosine, cases.
    """
    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        return [
            _grid(sweep, folder / "log_probs", "Change from the reference, held-out pairs", "nats", _log_ratios),
            changes(sweep, folder / "changes"),
            _grid(sweep, folder / "margin", "Margin, held-out pairs: change from the reference", "nats", _margin),
            _grid(
                sweep, folder / "coefficient_ratio", "Ratio of the mean coefficients, d_w / d_l", "d_w / d_l", _ratio
            ),
            _grid(sweep, folder / "cosine", "Mean cos(g_w, g_l), held-out pairs", "cosine", _cosine, share=True),
            _grid(
                sweep, folder / "cases", "Share of held-out pairs in each case", "share", _cases, share=True, means=True
            ),
        ]


def coefficient_ratio(group: Group, split: str = "eval") -> Curve:
    """Mean d_w over mean d_l at every evaluation; NaN where no pair has a d_l."""
    chosen, rejected = (group.curve(f"{split}/coefficient/{side}") for side in SIDES)
    known = np.abs(rejected.values) > 0
    return Curve(chosen.steps, np.where(known, chosen.values / np.where(known, rejected.values, 1.0), np.nan))


def seeds_said(sweep: Sweep, *, bands: bool = True) -> str:
    """How many seeds stand behind a line, in words."""
    counts = sorted({len(group.seeds) for group in sweep.groups.values()})
    if counts == [1]:
        return "one seed"
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean of {many} seeds{', band: smallest to largest' if bands else ''}"


def changes(sweep: Sweep, path: Path) -> Path:
    """Where every group's held-out log-probabilities end, a dot a seed, sorted by the chosen one."""
    ends = {
        label: {side: group.change(f"eval/log_prob/{side}") for side in SIDES} for label, group in sweep.groups.items()
    }
    order = sorted(ends, key=lambda label: float(ends[label]["chosen"].mean()))
    figure = Figure(figsize=(6.4, 1.3 + 0.27 * len(order)), layout="constrained")
    axes = figure.subplots()
    dots(axes, {label: ends[label] for label in order}, SIDE_MARKS)
    rows: Rows = [
        (label, side, seed, value)
        for label in order
        for side, values in ends[label].items()
        for seed, value in zip(sweep.groups[label].seeds, values.tolist(), strict=True)
    ]
    axes.set_xlabel("change of the mean held-out log-probability, first to last evaluation (nats)")
    axes.set_xscale("symlog", linthresh=1.0) if _wide(ends) else None
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle("Where chosen and rejected log-probabilities end; a mark is a seed", fontsize=9)
    write_csv(path.with_suffix(".csv"), ("group", "side", "seed", "change_nats"), rows)
    return save(figure, path)


def dots(
    axes: Axes, ends: Mapping[str, Mapping[str, np.ndarray]], marks: Mapping[str, tuple[str, str]], origin: float = 0.0
) -> None:
    """A line for every label, from below; on it a mark a seed of every series, and a bar from the origin to their mean.

    Args:
      axes: to draw on.
      ends: label -> series -> values, one a seed.
      marks: series -> colour and marker.
      origin: where bars begin.
    """
    shifts = dict(zip(marks, np.linspace(0.14, -0.14, len(marks)) if len(marks) > 1 else [0.0], strict=True))
    named: set[str] = set()
    for place, series in enumerate(ends.values()):
        for name, values in series.items():
            (colour, marker), height = marks[name], place + shifts[name]
            axes.plot([origin, values.mean()], [height] * 2, color=colour, linewidth=1.2, alpha=0.5)
            label = None if name in named else name
            axes.plot(values, np.full(len(values), height), marker, color=colour, markersize=4, label=label)
            named.add(name)
    axes.axvline(origin, color="black", linewidth=0.8)
    axes.set_yticks(range(len(ends)), list(ends), parse_math=False)
    axes.set_ylim(-0.5, len(ends) - 0.5)
    axes.grid(axis="y", visible=False)


def _wide(ends: dict[str, dict[str, np.ndarray]]) -> bool:
    """Whether some changes would not be seen beside the largest."""
    sizes = [float(np.abs(values).max()) for group in ends.values() for values in group.values()]
    return max(sizes) > 30 * max(float(np.median(sizes)), 1e-9)


def _grid(
    sweep: Sweep,
    path: Path,
    title: str,
    axis: str,
    panel: Callable[[Axes, Group], Iterator[tuple[str, Curve]]],
    *,
    share: bool = False,
    means: bool = False,
) -> Path:
    columns = min(COLUMNS, len(sweep.groups))
    count = math.ceil(len(sweep.groups) / columns)
    figure = Figure(figsize=(max(4.8, 2.3 * columns), 0.9 + 2.0 * count), layout="constrained")
    grid = np.ravel(figure.subplots(count, columns, squeeze=False, sharey=share, sharex=True))
    rows: Rows = []
    for axes, (label, group) in zip(grid, sweep.groups.items(), strict=False):
        for series, found in panel(axes, group):
            rows += [(label, *row) for row in _numbers(group, series, found)]
        axes.set_title(label, fontsize=8, parse_math=False)
    for axes in grid[len(sweep.groups) :]:
        axes.set_axis_off()
    for place, axes in enumerate(grid[: len(sweep.groups)]):
        if place % columns == 0:
            axes.set_ylabel(axis)
        if place + columns >= len(sweep.groups):
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)
    handles, names = grid[0].get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    scales = "" if share else "; each panel has its own scale" if len(sweep.groups) > 1 else ""
    figure.suptitle(f"{title}{scales}\n({seeds_said(sweep, bands=not means)})", fontsize=9)
    write_csv(path.with_suffix(".csv"), ("group", "series", "seed", "step", "value"), rows)
    return save(figure, path)


def _numbers(group: Group, series: str, found: Curve) -> Iterator[tuple[Any, ...]]:
    for _, called, place, step, value in csv_rows("", series, found):
        yield called, group.seeds[place], step, value


def _log_ratios(axes: Axes, group: Group) -> Iterator[tuple[str, Curve]]:
    for side, (colour, line) in SIDES.items():
        found = group.curve(f"eval/log_ratio/{side}")
        band(axes, found, colour, line, side)
        yield side, found
    axes.axhline(0.0, color="black", linewidth=0.6)


def _margin(axes: Axes, group: Group) -> Iterator[tuple[str, Curve]]:
    found = group.curve("eval/margin")
    found = Curve(found.steps, found.values - found.values[:, :1])
    band(axes, found, GREEN, "-", "margin")
    axes.axhline(0.0, color="black", linewidth=0.6)
    yield "margin", found


def _ratio(axes: Axes, group: Group) -> Iterator[tuple[str, Curve]]:
    found = coefficient_ratio(group)
    if np.isfinite(found.values).any():
        band(axes, found, ORANGE, "-", "d_w / d_l")
        axes.axhline(1.0, color="black", linewidth=0.6, linestyle=":")
        if np.nanmin(found.values) > 0 and np.nanmax(found.values) > 5 * np.nanmin(found.values):
            axes.set_yscale("log")
    else:
        axes.text(0.5, 0.5, "d_l is 0", transform=axes.transAxes, ha="center")
    yield "ratio", found


def _cosine(axes: Axes, group: Group) -> Iterator[tuple[str, Curve]]:
    found = group.curve("eval/geometry/cosine")
    band(axes, found, BLUE, "-", "cosine")
    axes.axhline(0.0, color="black", linewidth=0.6)
    yield "cosine", found


def _cases(axes: Axes, group: Group) -> Iterator[tuple[str, Curve]]:
    found = {case: group.curve(f"eval/case/{case}") for case in CASES}
    steps = next(iter(found.values())).steps
    shares = [curve.values.mean(0) for curve in found.values()]
    axes.stackplot(steps, shares, colors=list(CASES.values()), labels=[c.replace("_", " ") for c in CASES], alpha=0.85)
    axes.set_ylim(0, 1)
    yield from found.items()
