"""What a sweep over sizes shows: every measure against the number of parameters, from its run folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from entangle.training.run_folder import CONFIG, read_json
from experiments.reports import sweep_figures, sweep_report
from experiments.reports.claims import Verdict, judge
from experiments.reports.plotting import BLUE, ORANGE, STYLE, save, write_csv
from experiments.reports.run_tables import Curve, spread
from experiments.reports.sweep_figures import Rows
from experiments.reports.sweep_tables import Group, Sweep, read_sweep
from experiments.sweep.trials import TRIALS

NOTES = (
    "Under equal coefficients a pair is in the case both_fall where |g_w|^2 < <g_w, g_l> < |g_l|^2 (section 3): to first "
    "order, and alone. Whether a whole training goes the same way is judged where most pairs are in that case, on average "
    "over the evaluations of every seed, and else not. That a measure goes with size is a question of this project, not a "
    "claim of the paper. It is judged seed by seed, by the sign of the rank correlation over the sizes; seeds share each "
    "size's base model, so they say nothing of the spread over base models. The ratio of norms is that of the mean norms "
    "over held-out pairs, at the last evaluation."
)


MOST = 0.5
"""Share of pairs that is most of them."""


def redraw(out: Path) -> list[Path]:
    """Figures and report of a sweep's folder, from its run folders alone.

    Returns:
      The files that a reader wants.

    Raises:
      UserError: it holds no sweep, or no trial that is done.
    """
    sweep, sizes = read(out)
    pictures = [_figure(sweep, sizes, out / "figures"), *sweep_figures.draw(sweep, out / "figures")]
    title = "Entanglement against the size of the model"
    return [*pictures, sweep_report.write(out, sweep, title, verdicts(sweep, sizes), pictures, NOTES)]


def read(out: Path) -> tuple[Sweep, dict[str, int]]:
    """The sweep, its groups from the smallest model to the largest, and label -> number of parameters.

    Raises:
      UserError: see ``redraw``.
    """
    sweep = read_sweep(out)
    sizes = {label: parameters(out, group) for label, group in sweep.groups.items()}
    ordered = {label: sizes[label] for label in sorted(sizes, key=sizes.__getitem__)}
    return sweep._replace(groups={label: sweep.groups[label] for label in ordered}), ordered


def parameters(out: Path, group: Group) -> int:
    """Number of parameters of a group's model, as its trials tell it.

    Args:
      out: the sweep's folder.
      group: of its trials.
    """
    return int(read_json(out / TRIALS / group.names[0] / CONFIG)["parameters"])


def norm_ratio(group: Group) -> Curve:
    """Mean |g_l| over mean |g_w| at every evaluation."""
    chosen, rejected = (group.curve(f"eval/geometry/{side}_norm") for side in ("chosen", "rejected"))
    return Curve(chosen.steps, rejected.values / np.maximum(chosen.values, 1e-30))


MEASURES: Mapping[str, Callable[[Group], Curve]] = {
    "cosine": lambda group: group.curve("eval/geometry/cosine"),
    "|g_l| / |g_w|": norm_ratio,
    "share of ideal pairs": lambda group: group.curve("eval/case/ideal"),
    "chosen log-probability, change (nats)": lambda group: group.curve("eval/log_ratio/chosen"),
}


def verdicts(sweep: Sweep, sizes: Mapping[str, int]) -> list[Verdict]:
    """What the sweep says of size, and of the norms' part in the fall.

    Args:
      sweep: see ``read``.
      sizes: label -> number of parameters.
    """
    found = []
    for label, group in sweep.groups.items():
        share = group.curve("eval/case/both_fall").values.mean(1)
        chosen, rejected = (group.change(f"eval/log_prob/{side}") for side in ("chosen", "rejected"))
        meant = share > MOST
        holds = judge(((chosen < 0) & (rejected < 0))[meant]) if meant.all() else "not judged"
        numbers = (
            f"share of pairs in that case, mean over evaluations {spread(share, signed=False)}; chosen "
            f"{spread(chosen, 'nats')}, rejected {spread(rejected, 'nats')}"
        )
        text = f"{label}: where most pairs are in the case both_fall, both log-probabilities end lower"
        found.append(Verdict(text, "not in the paper", holds, numbers))
    if len({tuple(group.seeds) for group in sweep.groups.values()}) > 1:
        return [
            *found,
            Verdict("measures against size", "not in the paper", "not judged", "models differ in their seeds"),
        ]
    if len(set(sizes.values())) < 3:
        return found
    ranks = [sizes[label] for label in sweep.groups]
    for name, of in MEASURES.items():
        ends = np.stack([of(group).values[:, -1] for group in sweep.groups.values()])
        found.append(_with_size(name, ranks, ends))
    return found


def _with_size(name: str, ranks: list[int], ends: np.ndarray) -> Verdict:
    """ends: ``[sizes, seeds]``; a measure that is the same for all sizes goes with none."""
    flat = np.ptp(ends, axis=0) == 0
    found = np.array(
        [0.0 if still else spearmanr(ranks, column).statistic for still, column in zip(flat, ends.T, strict=True)]
    )
    means = ", ".join(f"{row.mean():.2f}" for row in ends)
    numbers = f"rank correlation {spread(found)}; means {means}"
    return Verdict(
        f"the larger the model, the larger at the end: {name}", "not in the paper", judge(found > 0), numbers
    )


def _figure(sweep: Sweep, sizes: Mapping[str, int], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    rows: Rows = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.5 * len(MEASURES), 2.9), layout="constrained")
        for axes, (name, of) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
            for when, place, colour, marker in (("after SFT", 0, ORANGE, "s"), ("at the end", -1, BLUE, "o")):
                values = [of(group).values[:, place] for group in sweep.groups.values()]
                counts = [sizes[label] for label in sweep.groups]
                for count, label, found in zip(counts, sweep.groups, values, strict=True):
                    axes.plot([count] * len(found), found, marker, color=colour, markersize=4)
                    seeds = sweep.groups[label].seeds
                    rows += [(label, count, name, when, s, v) for s, v in zip(seeds, found.tolist(), strict=True)]
                axes.plot(counts, [found.mean() for found in values], color=colour, linewidth=1.4, label=when)
            axes.set_xscale("log")
            axes.set_xticks([], minor=True)
            axes.set_xticks(
                counts,
                [f"{sizes[label] / 1e6:.3g} M\n{Path(label).name}" for label in sweep.groups],
                fontsize=7,
                parse_math=False,
            )
            axes.set_title(name, fontsize=8, parse_math=False)
            if name.startswith("share"):
                axes.set_ylim(-0.03, 1.03)
            axes.set_xlabel("parameters")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle("Held-out pairs; a mark is a seed, a line their mean", fontsize=9)
        write_csv(folder / "size.csv", ("model", "parameters", "measure", "when", "seed", "value"), rows)
        return save(figure, folder / "size")
