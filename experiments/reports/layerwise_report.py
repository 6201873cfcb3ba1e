"""Geometry layer by layer, from the run folders of a sweep: heat maps over steps, shares, and the table of both."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from entangle.errors import UserError
from experiments.reports import sweep_figures, sweep_report
from experiments.reports.plotting import SIDES, STYLE, save, write_csv
from experiments.reports.run_tables import spread
from experiments.reports.sweep_figures import Rows
from experiments.reports.sweep_tables import Group, Sweep, read_sweep

FIRST = ("token_embedding", "position_embedding")
MEASURES = ("cosine", "cosine_part", "chosen_share", "rejected_share")
"""What evaluations log of every layer, see ``training.metrics.layer_metrics``."""
NOTES = (
    "None is judged: the paper looks at whole gradients. A layer's part of the cosine is its inner product over |g_w| |g_l|; "
    "the parts of all layers add up to the cosine, pair by pair and so in the mean. The token embedding is also the head. "
    "What is told is where the entanglement sits, in models of this size and on these pairs."
)


def redraw(out: Path) -> list[Path]:
    """Figures and report of a sweep's folder, from its run folders alone.

    Returns:
      The files that a reader wants.

    Raises:
      UserError: it holds no sweep, no trial that is done, or trials without the geometry of layers.
    """
    sweep = read_sweep(out)
    pictures = [*_figures(sweep, out / "figures"), *sweep_figures.draw(sweep, out / "figures")]
    title = "Where the two gradients are entangled, layer by layer"
    return [*pictures, sweep_report.write(out, sweep, title, [], pictures, NOTES, [_section(sweep)])]


def layers(group: Group) -> list[str]:
    """Names of the layers, from the input to the output.

    Raises:
      UserError: no evaluation has any.
    """
    found = dict.fromkeys(
        match[1]
        for records in group.records
        for name in records[0]
        if (match := re.match(r"eval/layer/(.*)/cosine$", name))
    )
    if not found:
        raise UserError("the trials have no geometry of layers: run them with --trial.layers")
    depth = {name: int(name.split(".")[0]) for name in found if name[0].isdigit()}
    first = [name for name in FIRST if name in found]
    last = [name for name in found if name not in depth and name not in first]
    return [*first, *sorted(depth, key=lambda name: (depth[name], name)), *last]


def _figures(sweep: Sweep, folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        return [
            _heat(sweep, folder / "layer_cosine", "cosine", "Mean cosine of each layer's parts of g_w and g_l"),
            _heat(sweep, folder / "layer_cosine_part", "cosine_part", "Each layer's part of the cosine of g_w and g_l"),
            _shares(sweep, folder / "layer_shares"),
        ]


def _heat(sweep: Sweep, path: Path, measure: str, title: str) -> Path:
    """A panel a group: layers from below upwards, steps to the right; the mean over seeds."""
    found = {label: _table(group, measure) for label, group in sweep.groups.items()}
    whole = measure == "cosine"
    most = 1.0 if whole else max(float(np.abs(values.mean(1)).max()) for _, _, values in found.values())
    most_layers = max(len(names) for names, _, _ in found.values())
    figure = Figure(figsize=(1.9 + 2.7 * len(found), 1.1 + 0.3 * most_layers), layout="constrained")
    rows: Rows = []
    grid = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (label, (names, steps, values)) in zip(grid, found.items(), strict=True):
        image = axes.imshow(
            values.mean(1), cmap="RdBu_r", vmin=-most, vmax=most, origin="lower", aspect="auto", interpolation="nearest"
        )
        axes.set_yticks(range(len(names)), names if axes is grid[0] else [], parse_math=False)
        shown = range(0, len(steps), max(1, len(steps) // 4))
        axes.set_xticks(shown, [str(steps[place]) for place in shown])
        axes.set_title(label, fontsize=8, parse_math=False)
        axes.set_xlabel("step")
        axes.grid(visible=False)
        rows += _rows(label, sweep.groups[label], names, steps, values)
    figure.colorbar(image, ax=grid.tolist(), shrink=0.9)
    figure.suptitle(f"{title}, held-out pairs\n({sweep_figures.seeds_said(sweep).split(',')[0]})", fontsize=9)
    write_csv(path.with_suffix(".csv"), ("group", "layer", "seed", "step", measure), rows)
    return save(figure, path)


def _shares(sweep: Sweep, path: Path) -> Path:
    """Each layer's share of |g|^2, both sides, at the first and the last evaluation."""
    rows: Rows = []
    most = max(len(layers(group)) for group in sweep.groups.values())
    figure = Figure(figsize=(1.4 + 2.6 * len(sweep.groups), 1.2 + 0.33 * most), layout="constrained")
    grid = figure.subplots(1, len(sweep.groups), squeeze=False, sharex=True)[0]
    for axes, (label, group) in zip(grid, sweep.groups.items(), strict=True):
        for side, shift in (("chosen", 0.18), ("rejected", -0.18)):
            names, steps, values = _table(group, f"{side}_share")
            places = np.arange(len(names)) + shift
            colour = SIDES[side][0]
            last = f"{side}, last evaluation"
            axes.barh(places, values[:, :, -1].mean(1), height=0.32, color=colour, alpha=0.55, label=last)
            for mean, place in zip(values[:, :, 0].mean(1), places, strict=True):
                first = f"{side}, after SFT" if place == places[0] else None
                axes.plot([mean] * 2, [place - 0.16, place + 0.16], color=colour, linewidth=2, label=first)
            rows += [(side, *row) for row in _rows(label, group, names, steps, values)]
        axes.set_yticks(range(len(names)), names if axes is grid[0] else [], parse_math=False)
        axes.set_title(label, fontsize=8, parse_math=False)
        axes.set_xlabel("share of |g|^2", parse_math=False)
        axes.grid(axis="y", visible=False)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(
        f"Share of every layer in the squared norm, held-out pairs\n({sweep_figures.seeds_said(sweep).split(',')[0]})",
        fontsize=9,
    )
    write_csv(path.with_suffix(".csv"), ("side", "group", "layer", "seed", "step", "share"), rows)
    return save(figure, path)


def _table(group: Group, measure: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the layers, steps, and values ``[layers, seeds, steps]``."""
    names = layers(group)
    curves = [group.curve(f"eval/layer/{name}/{measure}") for name in names]
    return names, curves[0].steps, np.stack([curve.values for curve in curves])


def _rows(label: str, group: Group, names: list[str], steps: np.ndarray, values: np.ndarray) -> Rows:
    return [
        (label, name, seed, step.item(), float(value))
        for name, by_seed in zip(names, values, strict=True)
        for seed, over in zip(group.seeds, by_seed, strict=True)
        for step, value in zip(steps, over, strict=True)
    ]


def _section(sweep: Sweep) -> str:
    header = ["setting", "layer", *(f"{m.replace('_', ' ')}, {w}" for m in MEASURES[:3] for w in ("first", "last"))]
    rows: list[list[Any]] = []
    for label, group in sweep.groups.items():
        tables = [_table(group, measure)[2] for measure in MEASURES[:3]]
        for place, name in enumerate(layers(group)):
            cells = [spread(values[place, :, when]) for values in tables for when in (0, -1)]
            rows.append([label, name, *cells])
    text = "First and last evaluation, held-out pairs; shares are of |g_w|^2."
    return f"## Layers\n\n{text}\n\n{sweep_report.table(header, rows)}"
