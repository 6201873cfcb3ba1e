"""Rank correlations over held-out pairs, from the run folders of a sweep: what predicts the cosine and the displacement."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import rankdata, spearmanr

from entangle.errors import UserError
from experiments.reports import sweep_figures, sweep_report
from experiments.reports.claims import Verdict, judge
from experiments.reports.plotting import BLUE, GREEN, ORANGE, STYLE, save, write_csv
from experiments.reports.run_tables import spread
from experiments.reports.sweep_figures import Rows, dots
from experiments.reports.sweep_tables import Sweep, read_sweep
from experiments.sweep.trials import TRIALS

FILE = "pairs.csv"
PREDICTORS = {
    "edit_share": ("edit distance / length", BLUE),
    "ches": ("CHES", ORANGE),
    "ches_per_token": ("CHES, length-normalised", GREEN),
}
OUTCOMES = {
    "cosine": "cosine of g_w and g_l, after SFT",
    "chosen_change": "change of the chosen log-probability (nats)",
}
Columns = dict[str, np.ndarray]
Pairs = Mapping[str, Mapping[int, Columns]]
"""Setting -> seed -> the columns of ``pairs.csv``."""
CLAIMS = (
    ("the fewer tokens differ, the larger the cosine", "edit_share", "cosine", -1, "section 4.2"),
    (
        "the fewer tokens differ, the lower the chosen log-probability ends",
        "edit_share",
        "chosen_change",
        1,
        "section 4.2",
    ),
    ("the higher CHES, the lower the chosen log-probability ends", "ches", "chosen_change", -1, "2410.08847"),
    (
        "the higher length-normalised CHES, the lower the chosen log-probability ends",
        *("ches_per_token", "chosen_change", -1, "2410.08847"),
    ),
    ("the higher length-normalised CHES, the larger the cosine", "ches_per_token", "cosine", 1, "no paper"),
)
NOTES = (
    "Rank correlations over held-out pairs, one a seed; seeds share pairs and base model. Displacement is the change of a "
    "held-out pair's own chosen log-probability by training on other pairs, in nats; it grows with the response's length, "
    "and so do the sums in CHES: correlations with the length of both held fixed (ranks, linearly) are in the table below. "
    "What is judged is the sign, in every seed. arXiv 2410.08847 has its evidence between sets of pairs, with a model "
    "trained on each, which is not repeated here."
)


def redraw(out: Path) -> list[Path]:
    """Figures and report of a sweep's folder, from its run folders alone.

    Returns:
      The files that a reader wants.

    Raises:
      UserError: it holds no sweep, no trial that is done, or trials whose pairs were not looked at.
    """
    sweep = read_sweep(out)
    pairs = read_pairs(out, sweep)
    (out / "figures").mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        pictures = [
            _correlations(pairs, out / "figures" / "correlations"),
            *(_scatter(label, found, out / "figures" / f"pairs_{_slug(label)}") for label, found in pairs.items()),
        ]
    pictures += sweep_figures.draw(sweep, out / "figures")
    title = "Overlap of the responses, CHES, entanglement and displacement"
    return [*pictures, sweep_report.write(out, sweep, title, verdicts(pairs), pictures, NOTES, [_section(pairs)])]


def read_pairs(out: Path, sweep: Sweep) -> Pairs:
    """The held-out pairs of every trial.

    Raises:
      UserError: a trial's pairs were not looked at.
    """
    return {
        label: {seed: _read(out / TRIALS / name / FILE) for seed, name in zip(group.seeds, group.names, strict=True)}
        for label, group in sweep.groups.items()
    }


def correlation(one: np.ndarray, other: np.ndarray, *fixed: np.ndarray) -> float:
    """Spearman's, of the ranks' remainders where others are held fixed; NaN where one of the two is the same for all pairs.

    Example:
      >>> import numpy as np
      >>> from experiments.reports.token_overlap_report import correlation
      >>> round(correlation(np.array([1.0, 2.0, 9.0]), np.array([0.0, 1.0, 2.0])), 6)
      1.0
    """
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    if not fixed:
        return float(spearmanr(one, other).statistic)
    design = np.stack([np.ones(len(one)), *(rankdata(column) for column in fixed)], 1)
    ranks = np.stack([rankdata(one), rankdata(other)], 1)
    left = ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0]
    size = float(np.linalg.norm(left[:, 0]) * np.linalg.norm(left[:, 1]))
    return float(left[:, 0] @ left[:, 1]) / size if size > 1e-9 * len(one) else float("nan")


def verdicts(pairs: Pairs) -> list[Verdict]:
    """What the held-out pairs say of the claims; settings whose pairs are all alike in a predictor say nothing of it."""
    found = []
    for label, by_seed in pairs.items():
        for text, predictor, outcome, sign, where in CLAIMS:
            ranks = _over_seeds(by_seed, predictor, outcome)
            if np.isfinite(ranks).all():
                numbers = f"rank correlation {spread(ranks)}; {_count(by_seed)} pairs"
                found.append(Verdict(f"{label}: {text}", where, judge(sign * ranks > 0), numbers))
        for predictor in ("ches", "ches_per_token"):
            theirs, edits = (_over_seeds(by_seed, name, "chosen_change") for name in (predictor, "edit_share"))
            if np.isfinite(theirs).all() and np.isfinite(edits).all():
                text = f"{label}: {PREDICTORS[predictor][0]} tells the displacement better than the edit distance"
                numbers = (
                    f"sizes of the correlations in their claimed directions: {spread(-theirs)} against {spread(edits)}"
                )
                found.append(Verdict(text, "2410.08847", judge((-theirs > edits) & (-theirs > 0)), numbers))
    return found


def _over_seeds(by_seed: Mapping[int, Columns], predictor: str, outcome: str, *fixed: str) -> np.ndarray:
    return np.array(
        [correlation(c[predictor], c[outcome], *(c[name] for name in fixed)) for c in by_seed.values()], np.float64
    )


def _count(by_seed: Mapping[int, Columns]) -> int:
    return len(next(iter(by_seed.values()))["cosine"])


def _section(pairs: Pairs) -> str:
    header = ["setting", "predictor", "outcome", "rank correlation", "with both lengths fixed"]
    rows = []
    for label, by_seed in pairs.items():
        for predictor, (said, _) in PREDICTORS.items():
            for outcome, what in OUTCOMES.items():
                found = [
                    _over_seeds(by_seed, predictor, outcome, *fixed)
                    for fixed in ((), ("chosen_length", "rejected_length"))
                ]
                cells = [spread(ranks) if np.isfinite(ranks).all() else "all pairs alike" for ranks in found]
                rows.append([label, said, what, *cells])
    return f"## Correlations over pairs\n\n{sweep_report.table(header, rows)}"


def _correlations(pairs: Pairs, path: Path) -> Path:
    """A panel an outcome, a line a setting, a mark a seed of every predictor."""
    figure = Figure(figsize=(7.2, 1.5 + 0.5 * len(pairs)), layout="constrained")
    marks = {said: (colour, marker) for (said, colour), marker in zip(PREDICTORS.values(), "os^", strict=True)}
    rows: Rows = []
    grid = figure.subplots(1, len(OUTCOMES), sharey=True)
    for axes, (outcome, what) in zip(grid, OUTCOMES.items(), strict=True):
        ends: dict[str, dict[str, np.ndarray]] = {}
        for label, by_seed in pairs.items():
            found = {said: _over_seeds(by_seed, name, outcome) for name, (said, _) in PREDICTORS.items()}
            ends[label] = {said: ranks for said, ranks in found.items() if np.isfinite(ranks).all()}
            rows += [
                (label, said, outcome, seed, rank)
                for said, ranks in ends[label].items()
                for seed, rank in zip(by_seed, ranks.tolist(), strict=True)
            ]
        dots(axes, ends, marks)
        axes.set_xlim(-1.05, 1.05)
        axes.set_title(f"with the {what}", fontsize=8)
        axes.set_xlabel("rank correlation")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("Over held-out pairs; a mark is a seed", fontsize=9)
    write_csv(path.with_suffix(".csv"), ("setting", "predictor", "outcome", "seed", "rank_correlation"), rows)
    return save(figure, path)


def _scatter(label: str, by_seed: Mapping[int, Columns], path: Path) -> Path:
    """Predictors to the right, outcomes downwards; the first seed's pairs, all seeds' in the CSV."""
    figure = Figure(figsize=(8.4, 4.8), layout="constrained")
    grid = figure.subplots(len(OUTCOMES), len(PREDICTORS), sharex="col", sharey="row")
    first = next(iter(by_seed.values()))
    for axes, (said, _) in zip(grid[-1], PREDICTORS.values(), strict=True):
        axes.set_xlabel(said)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    for line, (outcome, what) in zip(grid, OUTCOMES.items(), strict=True):
        line[0].set_ylabel(what.replace(", ", ",\n").replace(" (", "\n("), fontsize=8)
        for axes, (predictor, (_, colour)) in zip(line, PREDICTORS.items(), strict=True):
            axes.plot(first[predictor], first[outcome], "o", color=colour, markersize=3, alpha=0.6)
            rank = correlation(first[predictor], first[outcome])
            axes.set_title(f"rank correlation {rank:+.2f}" if np.isfinite(rank) else "all alike", fontsize=8)
    figure.suptitle(f"{label}: a dot is a held-out pair of seed {next(iter(by_seed))}", fontsize=9, parse_math=False)
    columns = list(first)
    rows = [
        (seed, *row) for seed, c in by_seed.items() for row in zip(*(c[name].tolist() for name in columns), strict=True)
    ]
    write_csv(path.with_suffix(".csv"), ("seed", *columns), rows)
    return save(figure, path)


def _slug(label: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in label)


def _read(file: Path) -> Columns:
    if not file.exists():
        raise UserError(
            f"{file.parent}: its pairs were not looked at ({FILE} is missing); run the experiment to its end"
        )
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0] if name != "pair"}
