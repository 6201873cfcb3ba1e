"""What every figure shares: style, colours, bands over seeds, and files: PNG, PDF and the plotted numbers as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reports.run_tables import Curve

# Okabe and Ito's colours keep apart for all common kinds of colour vision; line styles carry the same distinction.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SIDES = {"chosen": (BLUE, "-"), "rejected": (VERMILION, "--")}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # labels in full: next to a panel's title an offset is overlooked
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.dpi": 120,
    "savefig.dpi": 200,
    "legend.frameon": False,
    "pdf.fonttype": 42,
}


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PDF and PNG; returns the PNG."""
    figure.savefig(path.with_suffix(".pdf"), bbox_inches="tight")
    figure.savefig(path.with_suffix(".png"), bbox_inches="tight")
    return path.with_suffix(".png")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write the numbers that a figure shows."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def band(axes: Axes, found: Curve, colour: str, line: Any, label: str) -> None:
    """Draw the mean over seeds, and a band from the smallest to the largest."""
    axes.plot(found.steps, found.values.mean(0), linestyle=line, color=colour, label=label, linewidth=1.6)
    if len(found.values) > 1:
        axes.fill_between(found.steps, found.values.min(0), found.values.max(0), color=colour, alpha=0.2, linewidth=0)


def csv_rows(name: str, series: str, found: Curve) -> Iterable[tuple[Any, ...]]:
    """A curve's numbers, one row a seed and step."""
    for seed, values in enumerate(found.values):
        for step, value in zip(found.steps, values, strict=True):
            yield name, series, seed, step.item(), float(value)
