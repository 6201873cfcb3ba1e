"""The sentiment experiment's claims, each judged seed by seed from the run folders."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from entangle.training.run_folder import read_json
from experiments.reports import token_heatmap
from experiments.reports.run_tables import Runs, curve, recorded, spread


class Verdict(NamedTuple):
    """A claim and what the runs say about it.

    Attributes:
      claim: the claim, as the paper has it.
      where: figure or section of arXiv 2410.13828.
      verdict: "shown" in every seed, "not shown" in any, or in how many.
      numbers: what was measured: mean and range over seeds.
    """

    claim: str
    where: str
    verdict: str
    numbers: str


def judge(holds: np.ndarray, what: str = "seed") -> str:
    """Put a claim's outcomes, one a seed (or another case), into words.

    Example:
      >>> import numpy as np
      >>> from experiments.reports.claims import judge
      >>> judge(np.array([True, True])), judge(np.array([False])), judge(np.array([True, False]))
      ('shown', 'not shown (one seed)', 'in 1 of 2 seeds')
    """
    held = int(np.sum(holds))
    if 0 < held < len(holds):
        return f"in {held} of {len(holds)} {what}s"
    return ("shown" if held else "not shown") + (f" (one {what})" if len(holds) == 1 else "")


def paper_claims(runs: Runs, out: Path) -> list[Verdict]:
    """The paper's claims whose pair sets were run.

    They are about DPO by plain combination; other objectives and combinations are measured, not judged.

    Args:
      runs: the runs.
      out: the experiment's folder, for the token cosines.
    """
    found = [*_displacement(runs), *_cosines(runs), *_tokens(runs, out)]
    if (runs.config["objective"], runs.config["pair_chain"]) == ("dpo", "margin"):
        return found
    return [verdict._replace(verdict="measured") for verdict in found]


def _displacement(runs: Runs) -> list[Verdict]:
    verdicts, changes = [], {}
    for name, seeds in runs.records.items():
        chosen, rejected = (curve(seeds, f"eval/log_prob/{side}").change() for side in ("chosen", "rejected"))
        seen = curve(seeds, "eval_train/log_prob/chosen").change()
        changes[name] = chosen
        rises = name == "single_token"
        numbers = (
            f"held-out chosen {spread(chosen, 'nats')}, rejected {spread(rejected, 'nats')}; "
            f"chosen on training pairs {spread(seen, 'nats')}"
        )
        text = f"{name}: the chosen log-probability {'rises' if rises else 'falls'}"
        verdicts.append(Verdict(text, "Figure 3", judge(chosen > 0 if rises else chosen < 0), numbers))
    if {"short_suffix", "long_suffix"} <= changes.keys():
        more = changes["long_suffix"] - changes["short_suffix"]
        text = "the chosen log-probability falls more for long_suffix than for short_suffix"
        verdicts.append(Verdict(text, "Figure 3", judge(more < 0), f"long minus short {spread(more, 'nats')}"))
    return verdicts


def _cosines(runs: Runs) -> list[Verdict]:
    verdicts, last = [], {}
    for name, seeds in runs.records.items():
        found = curve(seeds, "eval/geometry/cosine")
        first, last[name] = found.values[:, 0], found.values[:, -1]
        numbers = f"first {spread(first)}, last {spread(last[name])}"
        if name == "single_token":
            text, holds = "single_token: the cosine drops and ends negative", (last[name] < first) & (last[name] < 0)
        else:
            text, holds = f"{name}: the cosine is positive at the end", last[name] > 0
        verdicts.append(Verdict(text, "Figure 4a", judge(holds), numbers))
    if {"single_token", "short_suffix", "long_suffix"} <= last.keys():
        ordered = (last["single_token"] < last["short_suffix"]) & (last["short_suffix"] < last["long_suffix"])
        gaps = f"{spread(last['short_suffix'] - last['single_token'])}, {spread(last['long_suffix'] - last['short_suffix'])}"
        text = "the longer the identical suffix, the larger the cosine"
        verdicts.append(Verdict(text, "Figure 4a", judge(ordered), f"gaps short - single, long - short: {gaps}"))
    return verdicts


def checks(runs: Runs) -> list[Verdict]:
    """What this project says of its own numbers, whatever the objective; nothing where there was no probe."""
    if not all(recorded(seeds, "probe/realised/chosen") for seeds in runs.records.values()):
        return []
    signs, margins = [], []
    for seeds in runs.records.values():
        moved = []
        for side in ("chosen", "rejected"):
            first_order, realised = (
                curve(seeds, f"probe/{kind}/{side}").values for kind in ("first_order", "realised")
            )
            signs.append((np.sign(first_order) == np.sign(realised)).mean(1))
            moved.append(realised)
        margins.append((moved[0] - moved[1]).sum(1))
    agreement, margin = np.mean(signs, axis=0), np.min(margins, axis=0)
    return [
        Verdict(
            "the first-order change under the actual update has the sign of the realised one in over 95 % of steps",
            "probe pairs, their mean",
            judge(agreement > 0.95),
            f"share of steps {spread(agreement, signed=False)}",
        ),
        Verdict(
            "over the run the mean margin of the held-out probe pairs rises, in every set",
            "probe pairs",
            judge(margin > 0),
            f"smallest set {spread(margin, 'nats')}",
        ),
    ]


def _tokens(runs: Runs, out: Path) -> list[Verdict]:
    verdicts = []
    for name in runs.records:
        file = out / name / "seed0" / token_heatmap.FILE
        if not file.exists():
            continue
        record = read_json(file)
        blocks = {when: np.asarray(block) for when, block in record["cosines"].items()}
        # from the right: the labels need not have the same number of tokens
        ends = zip(reversed(record["chosen"]), reversed(record["rejected"]), strict=False)
        count = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], ends))
        first = blocks["after SFT"]
        text = f"{name}: the contrasting tokens' gradients have a negative cosine after SFT"
        numbers = ", ".join(f"{block[0, 0]:+.3f} {when}" for when, block in blocks.items())
        verdicts.append(Verdict(text, "Figure 4b", judge(np.array([first[0, 0] < 0]), "pair"), numbers))
        if count:
            same = {when: np.diagonal(block[::-1, ::-1])[:count].mean() for when, block in blocks.items()}
            text = f"{name}: identical tokens' gradients are close to parallel after SFT (here: mean cosine over 0.8)"
            numbers = ", ".join(f"mean {value:+.3f} {when}" for when, value in same.items())
            verdicts.append(Verdict(text, "Figure 4b", judge(np.array([same["after SFT"] > 0.8]), "pair"), numbers))
    return verdicts
