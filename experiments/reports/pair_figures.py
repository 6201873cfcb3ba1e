"""Figures 3, 4a and 4b of arXiv 2410.13828 from run folders: PNG, PDF and the plotted numbers as CSV."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from entangle.training.run_folder import read_json
from experiments.reports import token_heatmap
from experiments.reports.plotting import BLUE, GREEN, ORANGE, SIDES, STYLE, band, csv_rows, save, write_csv
from experiments.reports.run_tables import PREDICTIONS, Runs, all_predictions, curve, method_label, read_runs

SET_STYLES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."))


def draw(out: Path) -> list[Path]:
    """Draw all figures of an experiment's folder into ``out/figures``.

    Args:
      out: the experiment's folder.

    Returns:
      The PNG files.

    Raises:
      UserError: the folder has no finished runs.
    """
    runs = read_runs(out)
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        drawn = [_log_probs(runs, folder), _cosine(runs, folder), *_agreement(runs, folder)]
        drawn += _figures_4b(runs, out, folder)
    return drawn


class Titled(NamedTuple):
    """A figure of curves.

    Attributes:
      file: its name, without ending.
      title: what stands above it.
      metric: what is drawn.
      axis: label of the vertical axis.
    """

    file: str
    title: str
    metric: str
    axis: str


COSINE, COSINE_AXIS = "eval/geometry/cosine", "mean cos(g_w, g_l), held-out pairs"
PAPER = (
    Titled(
        "figure_3",
        "Figure 3: chosen and rejected log-probability",
        "eval/log_prob",
        "held-out log-probability (nats)",
    ),
    Titled("figure_4a", "Figure 4a: gradient cosine", COSINE, COSINE_AXIS),
)
# Responses of many tokens lie tens of nats apart: there the change is drawn, which the eye would not see beside that.
GENERAL = (
    Titled(
        "log_ratios",
        "Chosen and rejected log-probability, change from the reference",
        "eval/log_ratio",
        "log-ratio, held-out pairs (nats)",
    ),
    Titled("cosine", "Gradient cosine", COSINE, COSINE_AXIS),
)


AGREEMENT = "agreement"
PREDICTION_STYLES = {"first_order": (GREEN, "-"), "predicted_batch": (BLUE, "-."), "predicted": (ORANGE, "--")}
# A batch has few rows, so that single steps are noise: an average over a twentieth of the run each.
WINDOWS = 20


def titled(runs: Runs) -> tuple[Titled, Titled]:
    """The two figures of curves; the paper's own experiment has the paper's numbers."""
    return PAPER if runs.config["kind"] == "sentiment" else GENERAL


def names(runs: Runs) -> list[str]:
    """Names of the figures, in the order in which a report shows them."""
    return [*(figure.file for figure in titled(runs)), AGREEMENT, *(f"figure_4b_{name}" for name in runs.records)]


def _subtitle(runs: Runs) -> str:
    seeds = runs.config["seeds"]
    band = f"one base model, mean of {seeds} seeds, band: smallest to largest" if seeds > 1 else "one seed"
    return f"{method_label(runs.config)}, data: {Path(runs.config['data']).name}, {band}"


def _log_probs(runs: Runs, folder: Path) -> Path:
    drawn = titled(runs)[0]
    figure = Figure(figsize=(max(4.8, 3.2 * len(runs.records)), 3.1), layout="constrained")
    rows: list[tuple[Any, ...]] = []
    for axes, (name, seeds) in zip(np.ravel(figure.subplots(1, len(runs.records))), runs.records.items(), strict=True):
        for side, (colour, line) in SIDES.items():
            found = curve(seeds, f"{drawn.metric}/{side}")
            band(axes, found, colour, line, side)
            rows += csv_rows(name, side, found)
        axes.set(title=name, xlabel="step", ylabel=drawn.axis)
        axes.legend(loc="best")
    scales = "; each panel has its own scale" if len(runs.records) > 1 else ""
    figure.suptitle(f"{drawn.title}{scales}\n({_subtitle(runs)})", fontsize=9)
    write_csv(
        folder / f"{drawn.file}.csv",
        ("set", "side", "seed", "step", "log_prob_nats" if drawn is PAPER[0] else "log_ratio_nats"),
        rows,
    )
    return save(figure, folder / drawn.file)


def _cosine(runs: Runs, folder: Path) -> Path:
    drawn = titled(runs)[1]
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    axes = figure.subplots()
    rows: list[tuple[Any, ...]] = []
    for (name, seeds), (colour, line) in zip(runs.records.items(), itertools.cycle(SET_STYLES), strict=False):
        found = curve(seeds, drawn.metric)
        band(axes, found, colour, line, name)
        rows += csv_rows(name, "cosine", found)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set(xlabel="step", ylabel=drawn.axis)
    if len(runs.records) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{drawn.title}\n({_subtitle(runs)})", fontsize=9)
    write_csv(folder / f"{drawn.file}.csv", ("set", "metric", "seed", "step", "value"), rows)
    return save(figure, folder / drawn.file)


def _agreement(runs: Runs, folder: Path) -> list[Path]:
    if not all_predictions(runs):
        return []
    figure = Figure(figsize=(max(4.8, 3.2 * len(runs.records)), 3.1), layout="constrained")
    rows: list[tuple[Any, ...]] = []
    grid = np.ravel(figure.subplots(1, len(runs.records), sharey=True))
    for axes, (name, seeds) in zip(grid, runs.records.items(), strict=True):
        for kind, label in PREDICTIONS.items():
            found = curve(seeds, f"agreement/{kind}").averaged(WINDOWS)
            band(axes, found, *PREDICTION_STYLES[kind], label)
            rows += csv_rows(name, label, found)
        axes.set(title=name, xlabel="step", ylim=(0, 1.02))
    grid[0].set_ylabel("share of rows (two a pair), training")
    grid[0].legend(loc="lower left")
    figure.supxlabel(f"points are means over equal parts of the run, at most {WINDOWS}", fontsize=8)
    figure.suptitle(f"Rows that move in the predicted direction, by what predicts\n({_subtitle(runs)})", fontsize=9)
    write_csv(folder / f"{AGREEMENT}.csv", ("set", "prediction", "seed", "step", "share_of_rows"), rows)
    return [save(figure, folder / AGREEMENT)]


def _figures_4b(runs: Runs, out: Path, folder: Path) -> list[Path]:
    drawn = []
    for name in runs.records:
        file = out / name / "seed0" / token_heatmap.FILE
        if file.exists():
            drawn.append(_figure_4b(read_json(file), name, folder))
    return drawn


def _figure_4b(record: dict[str, Any], name: str, folder: Path) -> Path:
    panels = list(record["cosines"].items())
    digits = 1 if len(record["chosen"]) > 4 else 2
    width = max(2.4, 1.6 + 0.42 * len(record["rejected"]))
    height = max(2.8, 1.6 + 0.36 * len(record["chosen"]))
    figure = Figure(figsize=(width * len(panels) + 0.8, height), layout="constrained")
    grid = np.ravel(figure.subplots(1, len(panels), squeeze=False))
    for axes, (when, block) in zip(grid, panels, strict=True):
        values = np.asarray(block)
        image = axes.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
        for (row, column), value in np.ndenumerate(values):
            axes.text(
                column,
                row,
                f"{round(value, digits) + 0.0:.{digits}f}",
                ha="center",
                va="center",
                fontsize=6 if digits == 1 else 8,
                color="white" if abs(value) > 0.6 else "black",
            )
        axes.set_xticks(range(values.shape[1]), record["rejected"], rotation=90, parse_math=False)
        axes.set_yticks(range(values.shape[0]), record["chosen"], parse_math=False)
        axes.set_title(when.replace(" optimisation", "\noptimisation"), fontsize=9)
        axes.set_xlabel("rejected tokens")
        axes.grid(False)
    grid[0].set_ylabel("chosen tokens")
    figure.colorbar(image, ax=list(grid), label="cosine of token gradients", shrink=0.9)
    figure.suptitle(f"Figure 4b: {name}, one held-out pair, seed 0", fontsize=9)
    rows = (
        (when, i, chosen, j, rejected, block[i][j])
        for when, block in panels
        for i, chosen in enumerate(record["chosen"])
        for j, rejected in enumerate(record["rejected"])
    )
    header = ("when", "chosen_position", "chosen_token", "rejected_position", "rejected_token", "cosine")
    write_csv(folder / f"figure_4b_{name}.csv", header, rows)
    return save(figure, folder / f"figure_4b_{name}")
