"""Tables, verdicts and the figure of the one-step study, from its rows alone."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from entangle.errors import UserError
from entangle.training.run_folder import CONFIG, DONE, read_json
from entangle.transforms import WEIGHTINGS
from entangle.transforms.table import Promises
from experiments.one_step_changes import ALONE, ON_BATCH, PROTECT, SETTINGS, STILL, Changes, Measured, agreement, signs
from experiments.reports.plotting import BLUE, STYLE, VERMILION

Row = dict[str, Any]
NAME = "one_step"
SIDES = ("chosen", "rejected", "margin")
PAIRWISE = "pairwise_"
TITLES = {
    "pair_sgd": "pair alone, SGD",
    "batch_sgd": "batch, SGD",
    "adam_first": "batch, Adam, first step",
    "adam_warm": "batch, Adam, margin's moments",
    "adam_own": "batch, Adam, own moments",
}
STYLES = {"SFT": (BLUE, "o", -0.16), "DPO": (VERMILION, "s", 0.16)}


def folder(out: Path, pair_set: str, seed: int, start: str) -> Path:
    """Where the rows of one start point are kept.

    Example:
      >>> from pathlib import Path
      >>> from experiments.reports.one_step_report import folder
      >>> folder(Path("out"), "long_suffix", 0, "SFT").name
      'one_step_after_sft'
    """
    return out / pair_set / f"seed{seed}" / f"one_step_after_{start.lower()}"


def redraw(out: Path) -> list[Path]:
    """Write table, Markdown and figure of the study from its folders alone.

    Args:
      out: the study's folder.

    Returns:
      The files.

    Raises:
      UserError: a start point has not been measured yet, or a file cannot be read; nothing has been overwritten.
    """
    config = read_json(out / CONFIG)
    found: list[Row] = []
    for pair_set in config["sets"]:
        for seed in range(config["seeds"]):
            for start in STYLES:
                done = folder(out, pair_set, seed, start) / DONE
                if not done.exists():
                    raise UserError(f"{done.parent}: not measured yet; run the study to its end first")
                key = {"set": pair_set, "seed": seed, "start": start}
                found += [key | row for row in read_json(done)["rows"]]
    return write(out, found)


def rows(found: Measured) -> list[Row]:
    """One start point's rows: a remedy in a setting each."""
    plain = _sums(found, found.changes["batch_sgd"]["margin"])[2] / found.changes["batch_sgd"]["margin"].step
    return [
        {"setting": setting, "remedy": name} | _row(found, changes, plain, with_sums=setting != ALONE)
        for setting, by_remedy in found.changes.items()
        for name, changes in by_remedy.items()
    ]


def _row(found: Measured, changes: Changes, plain: float, *, with_sums: bool) -> Row:
    chosen, rejected = signs(changes.realised, found.norms, changes.step).T
    d = found.coefficients
    margins = (d * changes.realised) @ np.array([1.0, -1.0])
    margin = signs(margins, (np.abs(d) * found.norms).sum(1), changes.step)
    off = np.abs(changes.realised - changes.first_order).max(initial=0, where=found.norms > 0)
    row = {
        "ideal": ((chosen >= 0) & (rejected <= 0)).mean(),
        "ideal_both_move": ((chosen > 0) & (rejected < 0)).mean(),
        "both_fall": ((chosen < 0) & (rejected <= 0)).mean(),
        "both_rise": ((chosen >= 0) & (rejected > 0)).mean(),
        "reversed": ((chosen < 0) & (rejected > 0)).mean(),
        "pairs_chosen_kept": (chosen >= 0).mean(),
        "pairs_rejected_kept": (rejected <= 0).mean(),
        "pairs_margin_kept": (margin >= 0).mean(),
        "agreement": agreement(changes, found.norms),
        "largest_error_nats": off,
        "step": changes.step,
    }
    if with_sums:
        sums = _sums(found, changes)
        kept = signs(sums * np.array([1.0, -1.0, 1.0]), found.sum_norms, changes.step) >= 0
        for side, value, holds in zip(SIDES, sums, kept, strict=True):
            row |= {f"sum_{side}_over_margins_gain": value / changes.step / plain, f"sum_{side}_kept": bool(holds)}
    return {name: float(v) if isinstance(v, np.floating) else v for name, v in row.items()}


def _sums(found: Measured, changes: Changes) -> np.ndarray:
    """Changes of the means of d_w log pi_w and d_l log pi_l, with d_w and d_l as before the step, and of their difference."""
    chosen, rejected = (found.coefficients * changes.realised).mean(0)
    return np.array([chosen, rejected, chosen - rejected])


def write(out: Path, found: list[Row]) -> list[Path]:
    """Write ``one_step.csv``, ``one_step.md`` and the figure.

    Args:
      out: the folder.
      found: rows of all start points.

    Returns:
      The files.
    """
    fields = list(dict.fromkeys(field for row in found for field in row))
    with (out / f"{NAME}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(found)
    parts = [_head(found), *(_main(found, start) for start in STYLES), *_verdicts(found), *_all(found)]
    (out / f"{NAME}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [out / f"{NAME}.csv", out / f"{NAME}.md", _draw(out, found)]


def _head(found: list[Row]) -> str:
    lowest = min(row["agreement"] for row in found)
    steps = sorted({row["step"] for row in found})
    lengths = ", ".join(f"{step:g}" for step in steps)
    return (
        "# One small step of every remedy\n\n"
        "Share of pairs in the ideal case after one step: chosen does not fall, rejected does not rise, realised. A row "
        f"whose change is below {STILL:g} of |g| |update| stays put and breaks nothing; a column of its own "
        "(`ideal_both_move` in the CSV) leaves out the pairs of which a side does. Length of the updates: "
        f"{lengths}. First order is right about the sign of {100 * lowest:.1f} % of the rows that it moves, at the least. "
        "Mean over pair sets; in brackets the smallest and the largest seed."
    )


def _names(found: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["remedy"] for row in found))


def _over_seeds(found: Iterable[Row], field: str) -> np.ndarray:
    """Mean over everything else, seed by seed."""
    by_seed: dict[int, list[float]] = {}
    for row in found:
        by_seed.setdefault(row["seed"], []).append(row[field])
    return np.array([np.mean(values) for values in by_seed.values()])


def _percent(values: np.ndarray) -> str:
    mean, low, high = (f"{100 * x:.0f}" for x in (values.mean(), values.min(), values.max()))
    return f"{mean} %" if low == high else f"{mean} % ({low} to {high})"


def _table(title: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = "|---" * len(header) + "|"
    return "\n".join(
        [title, "", *(f"| {' | '.join(line)} |" for line in [header]), rule] + [f"| {' | '.join(x)} |" for x in lines]
    )


def _by_setting(
    found: list[Row], cell: Callable[[list[Row]], str], settings: Sequence[str] = SETTINGS
) -> list[list[str]]:
    return [
        [f"`{name}`", *(cell([r for r in found if (r["remedy"], r["setting"]) == (name, s)]) for s in settings)]
        for name in _names(found)
    ]


def _main(found: list[Row], start: str) -> str:
    chosen = [row for row in found if row["start"] == start]
    lines = _by_setting(chosen, lambda r: _percent(_over_seeds(r, "ideal")))
    both = _by_setting(chosen, lambda r: _percent(_over_seeds(r, "ideal_both_move")), [ALONE])
    header = ["remedy", TITLES[ALONE], "the same, both sides moving", *(TITLES[s] for s in ON_BATCH)]
    table = [[*line[:2], other[1], *line[2:]] for line, other in zip(lines, both, strict=True)]
    return _table(f"## Ideal pairs, after {start}", header, table)


def promises(name: str) -> list[str]:
    """The sides of the batch sums, or of every pair under its own step, that a remedy promises to keep.

    Example:
      >>> from experiments.reports.one_step_report import promises
      >>> promises("pairwise_one_sided"), promises("cagrad")
      (['chosen'], ['margin'])
    """
    if name == PROTECT:
        return ["chosen"]
    entry = WEIGHTINGS.get(name.removeprefix(PAIRWISE))
    kept: Promises | None = entry and entry.promises
    return [side for side in SIDES if kept is not None and getattr(kept, side)]


def _verdicts(found: list[Row]) -> list[str]:
    judged = [row for row in found if promises(row["remedy"])]
    cells = len({(row["set"], row["start"], row["seed"]) for row in found})

    def sums(chosen: list[Row]) -> str:
        held = {side: sum(row[f"sum_{side}_kept"] for row in chosen) for side in promises(chosen[0]["remedy"])}
        broken = [f"{side} broken in {len(chosen) - n}" for side, n in held.items() if n < len(chosen)]
        return ", ".join(broken) or "kept"

    def shares(chosen: list[Row]) -> str:
        lows = {side: min(row[f"pairs_{side}_kept"] for row in chosen) for side in promises(chosen[0]["remedy"])}
        broken = [f"{side} {100 * low:.0f} %" for side, low in lows.items() if low < 1]
        return ", ".join(broken) or "kept"

    def promised(table: list[list[str]]) -> list[list[str]]:
        return [[line[0], ", ".join(promises(line[0].strip("`"))), *line[1:]] for line in table]

    return [
        _table(
            f"## Promises about the batch sums\n\nThe promise is for one plain step on the batch; of `{PROTECT}`, for every "
            f"column. Start points (set, seed, after SFT or DPO) in which a promised sum was broken, of {cells}:",
            ["remedy", "promised", *(TITLES[s] for s in ON_BATCH)],
            promised(_by_setting([row for row in judged if not row["remedy"].startswith(PAIRWISE)], sums, ON_BATCH)),
        ),
        _table(
            "## Promises about single pairs\n\nThe promise is for a plain step on the pair alone, where a rule on the batch's "
            "gradients and its `pairwise_` form are one. Share of pairs that kept the promised side, in the worst start "
            "point:",
            ["remedy", "promised", *TITLES.values()],
            promised(_by_setting([row for row in judged if row["remedy"].startswith(PAIRWISE)], shares)),
        ),
        _table(
            "The others, on the pair alone:",
            ["remedy", "promised", TITLES[ALONE]],
            promised(
                _by_setting(
                    [row for row in judged if not row["remedy"].startswith(PAIRWISE) and row["remedy"] != PROTECT],
                    shares,
                    [ALONE],
                )
            ),
        ),
    ]


def _all(found: list[Row]) -> Iterable[str]:
    def change(chosen: list[Row]) -> str:
        values = (_over_seeds(chosen, f"sum_{side}_over_margins_gain").mean() for side in SIDES[:2])
        return " / ".join(f"{v:+.2f}" for v in values)

    for start in STYLES:
        title = (
            f"## Changes of the batch sums, after {start}\n\nchosen / rejected, in units of what plain margin's SGD step of "
            "the same length adds to the batch's margin; mean over sets and seeds."
        )
        chosen = [row for row in found if row["start"] == start]
        yield _table(title, ["remedy", *(TITLES[s] for s in ON_BATCH)], _by_setting(chosen, change, ON_BATCH))
    for name in dict.fromkeys(row["set"] for row in found):
        for start in STYLES:
            chosen = [row for row in found if (row["set"], row["start"]) == (name, start)]
            title = f"## Ideal pairs of {name}, after {start}"
            lines = _by_setting(chosen, lambda r: _percent(_over_seeds(r, "ideal")))
            yield _table(title, ["remedy", *TITLES.values()], lines)


def _draw(out: Path, found: list[Row]) -> Path:
    names = _names(found)
    plotted = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 1.4 + 0.27 * len(names)), layout="constrained")
        for axes, (setting, title) in zip(figure.subplots(1, len(TITLES), sharey=True), TITLES.items(), strict=True):
            for start, (colour, marker, offset) in STYLES.items():
                shares = [
                    _over_seeds(
                        [r for r in found if (r["remedy"], r["setting"], r["start"]) == (n, setting, start)], "ideal"
                    )
                    for n in names
                ]
                mean = 100 * np.array([s.mean() for s in shares])
                reach = 100 * np.array([[s.mean() - s.min(), s.max() - s.mean()] for s in shares]).T
                places = np.arange(len(names)) + offset
                axes.errorbar(
                    mean, places, xerr=reach, fmt=marker, color=colour, ms=4.5, lw=1.3, label=f"after {start}"
                )
                plotted += [(setting, n, start, s.mean(), s.min(), s.max()) for n, s in zip(names, shares, strict=True)]
            axes.set(xlabel="ideal pairs (%)", xlim=(-3, 103))
            axes.set_title(title.replace(", ", ",\n", 1), fontsize=9)
            axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES))
        bars = "mean over pair sets and seeds, bars from the smallest to the largest seed"
        figure.suptitle(f"Pairs in the ideal case after one small step: {bars}", fontsize=9)
        for ending in ("pdf", "png"):
            figure.savefig(out / f"{NAME}.{ending}", bbox_inches="tight")
    with (out / f"{NAME}_figure.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("setting", "remedy", "start", "mean", "smallest_seed", "largest_seed"), *plotted])
    return out / f"{NAME}.png"
