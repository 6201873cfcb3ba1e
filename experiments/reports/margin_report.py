"""Figures 1 and 2 and their claims, from the run folders of a sweep over margin objectives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from experiments.reports import sweep_figures, sweep_report
from experiments.reports.claims import Verdict, judge
from experiments.reports.run_tables import spread
from experiments.reports.sweep_tables import Group, Sweep, read_sweep

SOFTER = ("cpo", "dpop", "rrhf", "slic_hf", "sppo")
"""Objectives that, by the paper, soften the fall of the chosen log-probability."""
SYNCHRONISED = 0.5
"""Correlation over steps from which on moves are called synchronised here; the paper names no number."""
NOTES = (
    "The paper's findings are about two models of 7 and 8 billion parameters on TL;DR. Each claim is judged for every setting "
    "of its objective; objectives are compared seed by seed at the same learning rate. A ratio d_w / d_l is the mean over all "
    "evaluations and pairs of d_w over that of d_l."
)


def redraw(out: Path) -> list[Path]:
    """Figures and report of a sweep's folder, from its run folders alone.

    Returns:
      The files that a reader wants.

    Raises:
      UserError: it holds no sweep, or no trial that is done.
    """
    sweep = read_sweep(out)
    pictures = sweep_figures.draw(sweep, out / "figures")
    title = "Margin objectives: chosen and rejected log-probabilities"
    return [*pictures, sweep_report.write(out, sweep, title, verdicts(sweep), pictures, NOTES)]


def verdicts(sweep: Sweep) -> list[Verdict]:
    """What the sweep says of the paper's claims about Figures 1 and 2."""
    found: list[Verdict] = []
    for label, dpo in _of(sweep, "dpo").items():
        found += [_together(label, dpo), *_synchronised(label, dpo)]
        others = {name: group for name, group in sweep.groups.items() if _rates(group) == _rates(dpo)}
        found += [_softer(label, dpo, name, g) for name, g in others.items() if g.config["objective"] in SOFTER]
    return [*found, *_in_line(sweep)]


def _of(sweep: Sweep, objective: str) -> dict[str, Group]:
    return {label: group for label, group in sweep.groups.items() if group.config["objective"] == objective}


def _rates(group: Group) -> str:
    """What objectives are compared at: everything but the objective itself."""
    same = {name: value for name, value in group.config.items() if name not in ("objective", "objective_args", "seed")}
    return str(same)


def _moves(group: Group) -> tuple[np.ndarray, np.ndarray]:
    chosen, rejected = (group.change(f"eval/log_prob/{side}") for side in ("chosen", "rejected"))
    return chosen, rejected


def _together(label: str, group: Group) -> Verdict:
    chosen, rejected = _moves(group)
    numbers = f"chosen {spread(chosen, 'nats')}, rejected {spread(rejected, 'nats')}"
    text = f"{label}: chosen and rejected log-probability end on the same side of their start"
    return Verdict(text, "Figure 1", judge(np.sign(chosen) == np.sign(rejected)), numbers)


def _synchronised(label: str, group: Group) -> list[Verdict]:
    if not all(any("probe/realised/chosen" in record for record in records) for records in group.records):
        return []
    chosen, rejected = (group.curve(f"probe/realised/{side}").values for side in ("chosen", "rejected"))
    found = np.array([np.corrcoef(w, l)[0, 1] for w, l in zip(chosen, rejected, strict=True)])
    text = f"{label}: the moves of both sides are synchronised, step by step (here: correlation over {SYNCHRONISED:g})"
    numbers = f"correlation over steps, held-out probe pairs {spread(found)}"
    return [Verdict(text, "Figure 1", judge(found > SYNCHRONISED), numbers)]


def _softer(label: str, dpo: Group, name: str, group: Group) -> Verdict:
    if group.seeds != dpo.seeds:
        return Verdict(f"{name} against {label}", "Figure 2", "not judged", "their seeds differ")
    more = _moves(group)[0] - _moves(dpo)[0]
    text = f"{name}: the chosen log-probability ends higher than under {label}"
    return Verdict(text, "Figure 2", judge(more > 0), f"difference {spread(more, 'nats')}")


def _in_line(sweep: Sweep) -> list[Verdict]:
    """Across objectives: whether a larger share of d_w goes with a higher end of the chosen log-probability."""
    found = []
    for rates in dict.fromkeys(_rates(group) for group in sweep.groups.values()):
        groups = [group for group in sweep.groups.values() if _rates(group) == rates]
        if len({group.config["objective"] for group in groups}) < 3:
            continue
        seeds = sorted(set.intersection(*(set(group.seeds) for group in groups)))
        if not seeds:
            found.append(
                Verdict("d_w / d_l over settings", "Figure 2", "not judged", "no seed of all settings is done")
            )
            continue
        groups = [group.only(seeds) for group in groups]
        weights = np.stack([_share_of_chosen(group) for group in groups])
        ends = np.stack([_moves(group)[0] for group in groups])
        ranks = np.array([spearmanr(w, e).statistic for w, e in zip(weights.T, ends.T, strict=True)])
        text = f"over {len(groups)} settings: the larger d_w / d_l, the higher the chosen log-probability ends"
        found.append(
            Verdict(text, "Figure 2", judge(ranks > 0), f"rank correlation {spread(ranks)}; seeds {_listed(seeds)}")
        )
    return found


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _share_of_chosen(group: Group) -> np.ndarray:
    """d_w / (d_w + d_l), means over evaluations: in the order of d_w / d_l, and finite where d_l is 0. ``[seeds]``."""
    chosen, rejected = (group.curve(f"eval/coefficient/{side}").values.mean(1) for side in ("chosen", "rejected"))
    total = chosen + rejected
    return np.asarray(chosen / np.where(total == 0, 1.0, total))
