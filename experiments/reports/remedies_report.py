"""What a sweep over remedies shows of their promises, from its run folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.reports import remedies_figures, sweep_report
from experiments.reports.claims import Verdict, judge
from experiments.reports.remedies_figures import MARGIN, Panels
from experiments.reports.run_tables import recorded, spread
from experiments.reports.sweep_tables import Group, read_sweep

CLAIMED = {
    "pairwise_normalized": "section 5.1",
    "one_sided": "entangle/transforms",
    "protect_chosen": "entangle/transforms",
    "oracle masks": "section 5.2",
    "learned masks": "section 5.2",
    "dpop": "Figure 2",
    "cpo": "Figure 2",
}
"""What is said to end with a higher chosen log-probability than plain margin, and where."""
PROMISED = ("normalized", "pairwise_normalized", "band", "pairwise_band", "pcgrad", "one_sided", "protect_chosen")
"""Chains whose scope promises that the chosen side does not fall."""
LEAST = 0.25
"""Share of plain margin's growth below which two margins are alike because both runs are near their start."""
KEPT = 0.5
"""Of the mean mask on the tokens that differ: below it masks have let go of the others."""
NOTES = (
    "A remedy that moves less also lowers less, so both are judged: at the end, and where the held-out margin has grown as "
    "far under both (to the smaller of the two ends; each run is read where its margin first came so far, between "
    "evaluations along a straight line). That is not judged where it is less than a quarter of what plain margin's own has "
    "grown: so near to the start all are alike. What a scope promises is about the step's own batch sums (or single pairs), "
    "to first order, under a plain step; what is judged here is what a user has of it: the mean chosen log-probability of "
    "held-out probe pairs, after each step minus before, and in how many of the runs no step lowers it; plain margin lowers "
    "it less often under one optimizer than under the other, so optimizers are compared by what a remedy adds to it. The "
    "ideal share of a pairwise rule is that of the coefficients it makes: by definition 100 % where it promises both sides. "
    "Masks leave out tokens in training alone: everything here is measured on whole responses."
)


def redraw(out: Path) -> list[Path]:
    """Figures and report of a sweep's folder, from its run folders alone.

    Returns:
      The files that a reader wants.

    Raises:
      UserError: it holds no sweep, or no trial that is done.
    """
    sweep = read_sweep(out)
    panels = remedies_figures.panels(sweep)
    pictures = remedies_figures.draw(sweep, out / "figures")
    title = "Remedies over a whole training, under SGD and under AdamW"
    return [*pictures, sweep_report.write(out, sweep, title, verdicts(panels), pictures, NOTES)]


def verdicts(panels: Panels) -> list[Verdict]:
    """What the sweep says of the remedies.

    Args:
      panels: see ``remedies_figures.panels``.
    """
    found: list[Verdict] = []
    for objective, by_optimizer in panels.items():
        for optimizer, methods in by_optimizer.items():
            found += _higher(f"{objective}, {optimizer}", methods)
    return [*found, *_told(panels), *_kept(panels)]


def at_like_margins(one: Group, other: Group) -> np.ndarray:
    """Difference of the chosen log-probability's change where the margin has grown as far under both, one a seed.

    NaN where that is less than ``LEAST`` of what the other's has grown in the end. Both have the same seeds.

    Args:
      one: what is held against the other.
      other: plain margin.
    """
    found = []
    curves = [[group.curve(f"eval/{name}").values for name in ("margin", "log_prob/chosen")] for group in (one, other)]
    for mine, theirs in zip(zip(*curves[0], strict=True), zip(*curves[1], strict=True), strict=True):
        grown = [(margin - margin[0], chosen - chosen[0]) for margin, chosen in (mine, theirs)]
        least = min(margin[-1] for margin, _ in grown)
        judged = least > 0 and least >= LEAST * grown[1][0][-1]
        found.append(_first(least, *grown[0]) - _first(least, *grown[1]) if judged else np.nan)
    return np.asarray(found)


def _first(least: float, margin: np.ndarray, chosen: np.ndarray) -> float:
    """The chosen side where the margin is that large for the first time; both begin at 0, and the margin's end is no less."""
    place = int(np.argmax(margin >= least))
    return float(np.interp(least, margin[place - 1 : place + 1], chosen[place - 1 : place + 1]))


def _higher(where: str, methods: Mapping[str, Group]) -> list[Verdict]:
    found: list[Verdict] = []
    plain = methods.get(MARGIN)
    for name, source in CLAIMED.items():
        group = methods.get(name)
        if group is None:
            continue
        if plain is None or group.seeds != plain.seeds:
            why = "there is no single plain margin" if plain is None else "its seeds and those of margin differ"
            found.append(Verdict(f"{where}: {name} against margin", source, "not judged", why))
            continue
        end = group.change("eval/log_prob/chosen") - plain.change("eval/log_prob/chosen")
        text = f"{where}: under {name} the chosen log-probability ends higher than under margin"
        found.append(Verdict(text, source, judge(end > 0), f"difference {spread(end, 'nats')}"))
        like = at_like_margins(group, plain)
        text = f"{where}: under {name} it is higher also where margins are alike"
        if np.isfinite(like).all():
            found.append(Verdict(text, source, judge(like > 0), f"difference {spread(like, 'nats')}"))
        else:
            found.append(Verdict(text, source, "not judged", "in a seed a margin has grown too little"))
    return found


def _told(panels: Panels) -> list[Verdict]:
    """Whether learned masks have come to leave out what both responses share."""
    found = []
    for objective, by_optimizer in panels.items():
        for optimizer, methods in by_optimizer.items():
            if "learned masks" not in methods:
                continue
            shared, differing = (methods["learned masks"].last(f"eval/mask/{name}") for name in ("shared", "differing"))
            text = f"{objective}, {optimizer}: learned masks let go of what both share (here: to half of the rest)"
            numbers = (
                f"mean mask {spread(shared, signed=False)} on these tokens, {spread(differing, signed=False)} on others"
            )
            found.append(Verdict(text, "section 5.2", judge(shared < KEPT * differing), numbers))
    return found


def _kept(panels: Panels) -> list[Verdict]:
    """Of every chain that promises it, whether no step lowers the chosen side; over seeds and objectives."""
    shares: dict[str, dict[str, dict[tuple[str, int], float]]] = {}
    for objective, by_optimizer in panels.items():
        for optimizer, methods in by_optimizer.items():
            for name in (MARGIN, *PROMISED):
                if name in methods and recorded(methods[name].records, "probe/realised/chosen"):
                    kept = zip(methods[name].seeds, remedies_figures.kept(methods[name]).tolist(), strict=True)
                    mine = shares.setdefault(name, {}).setdefault(optimizer, {})
                    mine |= {(objective, seed): share for seed, share in kept}
    found = []
    plain = shares.get(MARGIN, {})
    for name in [name for name in PROMISED if name in shares]:
        for optimizer, by_run in shares[name].items():
            share, others = np.array(list(by_run.values())), np.array(list(plain.get(optimizer, {}).values()))
            beside = f"; under margin {spread(others, signed=False)}" if len(others) else ""
            text = f"{name}, {optimizer}: no step lowers the probe's chosen log-probability"
            numbers = f"share of steps that do not {spread(share, signed=False)}{beside}"
            found.append(Verdict(text, "held-out probe", judge(share == 1, "run"), numbers))
        added = {
            optimizer: {run: share - plain[optimizer][run] for run, share in by_run.items() if run in plain[optimizer]}
            for optimizer, by_run in shares[name].items()
            if optimizer in plain
        }
        runs = sorted(added.get("sgd", {}).keys() & added.get("adamw", {}).keys())
        if runs:
            sgd, adamw = (np.array([added[optimizer][run] for run in runs]) for optimizer in ("sgd", "adamw"))
            text = f"{name}: fewer steps lower it than under margin, and SGD gains more of them than AdamW"
            numbers = f"gained, in shares of steps: SGD {spread(sgd)}, AdamW {spread(adamw)}"
            found.append(Verdict(text, "held-out probe", judge((sgd > adamw) & (sgd > 0), "run"), numbers))
    return found
