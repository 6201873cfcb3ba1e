"""Figures of a sweep over remedies: a panel for every objective and optimizer, a line for every remedy."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entangle import training
from experiments.reports.plotting import BLUE, ORANGE, STYLE, save, write_csv
from experiments.reports.run_tables import pair_chain_label, recorded
from experiments.reports.sweep_figures import SIDE_MARKS, SIDES, Rows, dots, seeds_said
from experiments.reports.sweep_tables import Group, Sweep

MARGIN = "margin"
Panels = dict[str, dict[str, dict[str, Group]]]
"""Objective -> optimizer -> remedy -> its trials."""
Ends = Mapping[str, Mapping[str, np.ndarray]]
OPTIMIZER_MARKS = {"sgd": (BLUE, "o"), "adamw": (ORANGE, "s")}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--")


def panels(sweep: Sweep) -> Panels:
    """The sweep's groups by objective, optimizer and remedy.

    Objectives that were run by plain margin alone, beside others with remedies, are remedies of the first objective. SGD
    comes first, plain margin first, those beside last. A remedy that was run in several ways, at several learning rates say,
    is called what the sweep calls each of them.
    """
    chains: dict[str, set[str]] = {}
    for group in sweep.groups.values():
        chains.setdefault(group.config["objective"], set()).add(remedy_label(group.config))
    mended = [objective for objective, names in chains.items() if names != {MARGIN}] or list(chains)[:1]
    found: Panels = {objective: {} for objective in mended}
    labels = {id(group): label for label, group in sweep.groups.items()}

    def order(group: Group) -> tuple[Any, ...]:
        optimizer = group.config["preference"]["optimizer"]["name"]
        rule = training.pair_chains().index(group.config["pair_chain"])
        masks = group.config["masks"]
        return optimizer != "sgd", optimizer, group.config["objective"] not in mended, masks != "none", masks, rule

    def place(group: Group) -> tuple[str, str, str]:
        objective, optimizer = group.config["objective"], group.config["preference"]["optimizer"]["name"]
        return (
            (objective, optimizer, remedy_label(group.config))
            if objective in mended
            else (mended[0], optimizer, objective)
        )

    groups = sorted(sweep.groups.values(), key=order)
    times = Counter(map(place, groups))
    for group in groups:
        objective, optimizer, name = place(group)
        name = name if times[place(group)] == 1 else labels[id(group)]
        found[objective].setdefault(optimizer, {})[name] = group
    return found


def remedy_label(config: Mapping[str, Any]) -> str:
    """How the two gradients are combined, or the masks that are trained with.

    Example:
      >>> from experiments.reports.remedies_figures import remedy_label
      >>> remedy_label({"pair_chain": "margin", "masks": "oracle"}), remedy_label({"pair_chain": "pcgrad", "masks": "none"})
      ('oracle masks', 'pcgrad')
    """
    return pair_chain_label(config) if config["masks"] == "none" else f"{config['masks']} masks"


def kept(group: Group) -> np.ndarray:
    """Share of steps that do not lower the mean chosen log-probability of the probe pairs, one a seed."""
    return np.asarray((group.curve("probe/realised/chosen").values >= 0).mean(1))


def draw(sweep: Sweep, folder: Path) -> list[Path]:
    """Draw where the sides end, what a nat of margin costs, and the shares of steps and pairs.

    Args:
      sweep: see ``read_sweep``.
      folder: where the files go.

    Returns:
      The PNG files.
    """
    folder.mkdir(exist_ok=True)
    found = panels(sweep)
    with matplotlib.rc_context(STYLE):
        return [
            _changes(found, sweep, folder / "changes"),
            _trade_off(found, sweep, folder / "trade_off"),
            _shares(found, sweep, folder / "shares"),
        ]


def _changes(found: Panels, sweep: Sweep, path: Path) -> Path:
    """A row of panels an optimizer, a column an objective."""
    optimizers = list(dict.fromkeys(optimizer for by_optimizer in found.values() for optimizer in by_optimizer))
    figure, grid = _grid(found, len(optimizers))
    rows: Rows = []
    for (place, optimizer), (column, objective) in itertools.product(enumerate(optimizers), enumerate(found)):
        methods = found[objective].get(optimizer, {})
        ends = {
            name: {side: group.change(f"eval/log_prob/{side}") for side in SIDES} for name, group in methods.items()
        }
        axes = grid[place, column]
        _dots(axes, ends, SIDE_MARKS, f"{objective}, {optimizer}")
        rows += _rows((objective, optimizer), ends, methods)
    for axes in grid[-1]:
        axes.set_xlabel("change, first to last evaluation (nats)")
    return _end(figure, grid, path, "Held-out log-probabilities; a mark is a seed", ("objective", "optimizer"), rows)


def _shares(found: Panels, sweep: Sweep, path: Path) -> Path:
    """A row of panels a share, a column an objective."""
    shares: dict[str, Callable[[Group], np.ndarray]] = {
        "ideal held-out pairs at the end": lambda group: group.last("eval/case/ideal"),
        "reward accuracy at the end": lambda group: group.last("eval/accuracy"),
    }
    if all(recorded(group.records, "probe/realised/chosen") for group in sweep.groups.values()):
        shares = {"steps that do not lower the probe's chosen side": kept} | shares
    figure, grid = _grid(found, len(shares))
    rows: Rows = []
    for (place, (title, share)), (column, objective) in itertools.product(enumerate(shares.items()), enumerate(found)):
        names = dict.fromkeys(name for methods in found[objective].values() for name in methods)
        ends = {
            name: {o: share(methods[name]) for o, methods in found[objective].items() if name in methods}
            for name in names
        }
        axes = grid[place, column]
        _dots(axes, ends, {o: OPTIMIZER_MARKS[o] for o in OPTIMIZER_MARKS if o in found[objective]}, objective)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel(f"share of {title}" if "accuracy" not in title else title)
        for optimizer, methods in found[objective].items():
            mine = {name: {title: ends[name][optimizer]} for name in methods}
            rows += _rows((objective, optimizer), mine, methods)
    return _end(figure, grid, path, "What the remedies keep; a mark is a seed", ("objective", "optimizer"), rows)


def _trade_off(found: Panels, sweep: Sweep, path: Path) -> Path:
    """Chosen log-probability against the margin, over the evaluations."""
    optimizers = list(dict.fromkeys(optimizer for by_optimizer in found.values() for optimizer in by_optimizer))
    names = list(dict.fromkeys(n for by_optimizer in found.values() for ms in by_optimizer.values() for n in ms))
    styles = dict(zip(names, itertools.cycle(itertools.product(LINES, COLOURS)), strict=False))
    styles |= {MARGIN: ("-", "black")}
    figure, grid = _grid(found, len(optimizers), height=2.6)
    rows: Rows = []
    for (place, optimizer), (column, objective) in itertools.product(enumerate(optimizers), enumerate(found)):
        axes = grid[place, column]
        for name, group in found[objective].get(optimizer, {}).items():
            margin, chosen = (group.curve(f"eval/{metric}") for metric in ("margin", "log_prob/chosen"))
            moved = [(curve.values - curve.values[:, :1]) for curve in (margin, chosen)]
            line, colour = styles[name]
            top = 3 if name == MARGIN else 2
            axes.plot(*(values.mean(0) for values in moved), line, color=colour, label=name, linewidth=1.4, zorder=top)
            axes.plot(*(values.mean(0)[-1:] for values in moved), "o", color=colour, markersize=3.5)
            rows += [
                (objective, optimizer, name, seed, step.item(), float(x), float(y))
                for seed, xs, ys in zip(group.seeds, *moved, strict=True)
                for step, x, y in zip(margin.steps, xs, ys, strict=True)
            ]
        axes.axhline(0.0, color="black", linewidth=0.6)
        axes.set_title(f"{objective}, {optimizer}", fontsize=8)
        axes.set_ylabel("chosen (nats)") if column == 0 else None
    for axes in grid[-1]:
        axes.set_xlabel("margin (nats)")
    title = f"Held-out chosen log-probability against the margin, changes\n({_mean_said(sweep)}; a dot is the end)"
    figure.suptitle(title, fontsize=9)
    _legend(figure, grid)
    header = ("objective", "optimizer", "remedy", "seed", "step", "margin_change_nats", "chosen_change_nats")
    write_csv(path.with_suffix(".csv"), header, rows)
    return save(figure, path)


def _mean_said(sweep: Sweep) -> str:
    return seeds_said(sweep).split(",")[0]


def _grid(found: Panels, rows: int, height: float = 0.0) -> tuple[Figure, np.ndarray]:
    most = max(len(methods) for by_optimizer in found.values() for methods in by_optimizer.values())
    each = height or 0.7 + 0.24 * most
    figure = Figure(figsize=(1.2 + 3.2 * len(found), 0.9 + each * rows), layout="constrained")
    return figure, np.asarray(figure.subplots(rows, len(found), squeeze=False))


def _dots(axes: Axes, ends: Ends, marks: Mapping[str, tuple[str, str]], title: str) -> None:
    dots(axes, dict(reversed(list(ends.items()))), marks)  # the first on top
    axes.set_title(title, fontsize=8)


def _rows(where: tuple[str, str], ends: Ends, methods: Mapping[str, Group]) -> Rows:
    return [
        (*where, name, series, seed, value)
        for name, found in ends.items()
        for series, values in found.items()
        for seed, value in zip(methods[name].seeds, values.tolist(), strict=True)
    ]


def _end(figure: Figure, grid: np.ndarray, path: Path, title: str, where: tuple[str, str], rows: Rows) -> Path:
    figure.suptitle(title, fontsize=9)
    _legend(figure, grid)
    write_csv(path.with_suffix(".csv"), (*where, "remedy", "series", "seed", "value"), rows)
    return save(figure, path)


def _legend(figure: Figure, grid: np.ndarray) -> None:
    """One for all panels, of what any of them shows."""
    shown: dict[str, Any] = {}
    for axes in grid.flat:
        handles, names = axes.get_legend_handles_labels()
        shown = dict(zip(names, handles, strict=True)) | shown
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=min(5, len(shown)))
