"""The unlearning experiment's figures from its run folders: PNG, PDF and the plotted numbers as CSV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.reports import plotting
from experiments.reports.plotting import BLUE, GREEN, ORANGE, VERMILION
from experiments.reports.run_tables import Curve, Runs, curve, read_runs
from experiments.unlearning_config import METHODS, OPTIMIZERS, VARIANTS

METHOD_STYLES: dict[str, tuple[str, Any]] = {
    "plain": (VERMILION, "-"),
    "difference": (ORANGE, "--"),
    "project": ("#56B4E9", "-"),
    "project_memory": (BLUE, "--"),
    "joint": ("#CC79A7", "-."),
    "metric": (GREEN, (0, (5, 1, 1, 1))),
    "invariant": ("black", ":"),
}
SIDES = {"chosen": "retain", "rejected": "forget"}
FLOOR = 1e-9
"""Below it a share is drawn at it: a logarithmic axis has no zero."""
FAR_ENOUGH = 0.1
"""Share of what a variant forgets from which on its cost is drawn."""


def read(out: Path) -> Runs:
    """Read the forget runs under an experiment's folder: variant -> one list of metrics records a seed.

    Raises:
      UserError: the folder has no experiment, or a variant has no run.
    """
    return read_runs(out, names="variants", stage="")


def share(seeds: list[list[dict[str, Any]]]) -> Curve:
    """First-order change of the batch's retain sum at every step, in nats for a nat by which the forget sum changes."""
    retain, forget = (curve(seeds, f"first_order/{side}") for side in SIDES)
    return Curve(retain.steps, np.abs(retain.values) / np.maximum(np.abs(forget.values), 1e-30))


def moved(seeds: list[list[dict[str, Any]]], side: str, split: str = "eval") -> Curve:
    """Change of a side's log-probability since the first evaluation, in nats a token."""
    found = curve(seeds, f"{split}/per_token/{side}")
    return Curve(found.steps, found.values - found.values[:, :1])


def draw(out: Path) -> list[Path]:
    """Draw all figures into ``out/figures``.

    Args:
      out: the experiment's folder.

    Returns:
      The PNG files.

    Raises:
      UserError: the folder has no finished runs.
    """
    runs = read(out)
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context(plotting.STYLE):
        return [_log_probs(runs, folder), _trade_off(runs, folder), _first_order(runs, folder)]


def _panels(runs: Runs) -> dict[str, list[str]]:
    """Optimizer -> the variants that were run under it."""
    found = {o: [name for name in runs.records if VARIANTS[name].optimizer == o] for o in OPTIMIZERS}
    return {optimizer: names for optimizer, names in found.items() if names}


def _styled(names: list[str]) -> Iterator[tuple[str, str, str, Any]]:
    for name in names:
        method = VARIANTS[name].method
        yield name, METHODS[method], *METHOD_STYLES[method]


def _finish(figure: Figure, title: str, runs: Runs, *, bands: bool = True) -> None:
    handles: dict[str, Artist] = {}
    for each in figure.axes:
        handles |= {
            label: handle
            for handle, label in zip(*each.get_legend_handles_labels(), strict=True)
            if label not in handles
        }
    order = [label for label in METHODS.values() if label in handles]
    order += [label for label in handles if label not in order]
    figure.legend(
        [handles[label] for label in order], order, loc="outside lower center", **{"ncols": min(4, len(order))}
    )
    for each in figure.axes:
        each.xaxis.set_major_locator(MaxNLocator(6, integer=bands))
    seeds = runs.config["seeds"]
    band = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    if bands and seeds > 1:
        band += ", band: smallest to largest"
    figure.suptitle(f"{title}\n(data: {Path(runs.config['data']).name}, {band})", fontsize=9)


def _grid(runs: Runs, rows: int, height: float, **shared: Any) -> tuple[Figure, np.ndarray]:
    count = len(_panels(runs))
    figure = Figure(figsize=(max(5.6, 3.1 * count), height), layout="constrained")
    return figure, figure.subplots(rows, count, squeeze=False, **shared)


def _log_probs(runs: Runs, folder: Path) -> Path:
    figure, grid = _grid(runs, 2, 5.2, sharex=True, sharey="row")
    rows: list[tuple[Any, ...]] = []
    for column, (optimizer, names) in enumerate(_panels(runs).items()):
        for axes, (side, called) in zip(grid[:, column], SIDES.items(), strict=True):
            for name, label, colour, line in _styled(names):
                found = moved(runs.records[name], side)
                plotting.band(axes, found, colour, line, label)
                rows += plotting.csv_rows(name, called, found)
            axes.axhline(0.0, color="black", linewidth=0.6)
        grid[0, column].set_title(OPTIMIZERS[optimizer])
        grid[1, column].set_xlabel("step")
    for axes, called in zip(grid[:, 0], SIDES.values(), strict=True):
        axes.set_ylabel(f"{called}: change, nats a token")
    _finish(figure, "Held-out log-probability of what is kept and what is forgotten", runs)
    header = ("variant", "side", "seed", "step", "change_nats_per_token")
    plotting.write_csv(folder / "log_probs.csv", header, rows)
    return plotting.save(figure, folder / "log_probs")


def _trade_off(runs: Runs, folder: Path) -> Path:
    figure, grid = _grid(runs, 1, 3.5, sharey=True)
    rows: list[tuple[Any, ...]] = []
    for axes, (optimizer, names) in zip(grid[0], _panels(runs).items(), strict=True):
        for name, label, colour, line in _styled(names):
            forget, retain = (moved(runs.records[name], side) for side in ("rejected", "chosen"))
            f, r = -forget.values.mean(0), -retain.values.mean(0)
            drawn = f > max(FAR_ENOUGH * float(np.max(f)), 0.0)  # before, the ratio is one of noise
            axes.plot(f[drawn], r[drawn] / f[drawn], linestyle=line, color=colour, label=label, linewidth=1.6)
            ends = [-found.values[:, -1] for found in (forget, retain)]
            forgot = ends[0] > 0
            axes.plot(ends[0][forgot], ends[1][forgot] / ends[0][forgot], "o", color=colour, markersize=3)
            for seed, both in enumerate(zip(-forget.values, retain.values, strict=True)):
                rows += [
                    (name, seed, s.item(), float(x), float(y)) for s, x, y in zip(forget.steps, *both, strict=True)
                ]
        axes.axhline(1.0, color="grey", linewidth=0.8, label="retain falls as much")
        axes.set(title=OPTIMIZERS[optimizer], xlabel="forgotten, nats a token")
    grid[0, 0].set_ylabel("retain nats lost a nat forgotten")
    title = "What forgetting costs on held-out pairs: a variant's path from a tenth of its forgetting on, dots where seeds end"
    _finish(figure, title, runs, bands=False)
    header = ("variant", "seed", "step", "forgotten_nats_per_token", "retain_change_nats_per_token")
    plotting.write_csv(folder / "trade_off.csv", header, rows)
    return plotting.save(figure, folder / "trade_off")


def _first_order(runs: Runs, folder: Path) -> Path:
    figure, grid = _grid(runs, 1, 3.5, sharex=True, sharey=True)
    rows: list[tuple[Any, ...]] = []
    for axes, (optimizer, names) in zip(grid[0], _panels(runs).items(), strict=True):
        for name, label, colour, line in _styled(names):
            found = share(runs.records[name])
            rows += plotting.csv_rows(name, "share", found)
            plotting.band(axes, Curve(found.steps, np.maximum(found.values, FLOOR)), colour, line, label)
        axes.set(title=OPTIMIZERS[optimizer], xlabel="step", yscale="log")
    grid[0, 0].set_ylabel("retain nats a forget nat,\nfirst order")
    title = "First-order change of the batch's retain sum at each step, for a nat by which its forget sum changes"
    _finish(figure, title, runs)
    plotting.write_csv(folder / "first_order.csv", ("variant", "metric", "seed", "step", "value"), rows)
    return plotting.save(figure, folder / "first_order")
