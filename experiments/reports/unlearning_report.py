"""report.md of the unlearning experiment: what forgetting cost, and whether the retain side stayed put to first order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from entangle.training.run_folder import read_json
from experiments.reports import preference_report, unlearning_figures
from experiments.reports.run_tables import Runs, curve, objective_label, pair_lines, spread
from experiments.reports.unlearning_figures import moved, read, share
from experiments.unlearning_config import METHODS, OPTIMIZERS, VARIANTS

STAYS = 1e-3
"""Largest first-order change of the batch's retain sum, in nats a forget nat, that counts as none."""
MEANT_TO_RISE = ("difference", "joint")
"""Methods that add the retain gradient: theirs is no claim that the retain side stays."""
FIGURES = ("log_probs", "trade_off", "first_order")

Seeds = list[list[dict[str, Any]]]


def redraw(out: Path) -> list[Path]:
    """Draw the figures and write ``report.md`` of the unlearning experiment, from its run folders alone.

    Args:
      out: the experiment's folder.

    Returns:
      The files that a reader wants: figures and report.

    Raises:
      UserError: the folder has no finished runs, or a file in it cannot be read; nothing has been overwritten.
    """
    said = text(out)  # what is amiss ends here, before anything is drawn
    figures = unlearning_figures.draw(out)
    (out / "report.md").write_text(said, encoding="utf-8")
    return [*figures, out / "report.md"]


def text(out: Path) -> str:
    """What ``report.md`` says.

    Raises:
      UserError: the folder has no finished runs, or a file in it cannot be read.
    """
    runs = read(out)
    parts = [
        _head(runs),
        _seen(runs),
        _judged(runs),
        _moved(runs),
        _pictures(),
        _data(out),
        preference_report.provenance(out),
    ]
    return "\n\n".join(parts) + "\n"


def verdict(seeds: Seeds, method: str) -> str:
    """Whether a variant's steps left the batch's retain sum as it was, to first order, in every seed.

    Example:
      >>> from experiments.reports.unlearning_report import verdict
      >>> step = {"step": 1, "first_order/chosen": -1e-9, "first_order/rejected": -1.0}
      >>> verdict([[step]], "project"), verdict([[step | {"first_order/chosen": -0.5}]], "project")
      ('holds', 'fails')
    """
    if method in MEANT_TO_RISE:
        return "not claimed"
    return "holds" if share(seeds).values.max() < STAYS else "fails"


def at_equal_forgetting(seeds: Seeds, forgotten: float) -> np.ndarray:
    """Held-out retain change at the evaluation where a seed has forgotten so much, between evaluations along the line.

    Args:
      seeds: metrics of every seed.
      forgotten: nats a token by which the held-out forget log-probability has fallen.

    Returns:
      Nats a token, ``[seeds]``; NaN where a seed never forgets so much.
    """
    found = []
    for f, r in zip(-moved(seeds, "rejected").values, moved(seeds, "chosen").values, strict=True):
        past = np.flatnonzero(f >= forgotten)
        if not past.size:
            found.append(np.nan)
        elif past[0] == 0:
            found.append(r[0])
        else:
            i = past[0]
            weight = (forgotten - f[i - 1]) / (f[i] - f[i - 1])
            found.append(r[i - 1] + weight * (r[i] - r[i - 1]))
    return np.asarray(found)


def _common(runs: Runs) -> float:
    """Nats a token that every variant and seed forgets, rounded down."""
    least = min(float((-moved(seeds, "rejected").values).max()) for seeds in _single(runs))
    return max(0.0, np.floor(100 * least) / 100)


def _single(runs: Runs) -> list[Seeds]:
    return [[records] for seeds in runs.records.values() for records in seeds]


def _called(name: str) -> str:
    variant = VARIANTS[name]
    return f"{OPTIMIZERS[variant.optimizer]} | {METHODS[variant.method]}"


def _table(head: list[str], rows: list[str]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *rows]


def _head(runs: Runs) -> str:
    c = runs.config
    sft, stage, seeds = c["sft"], c["preference"], c["seeds"]
    return (
        f"# Unlearning experiment: {objective_label(c).split(':')[-1]} on {Path(c['data']).name}\n\n"
        f"Model {Path(c['model']).name}, {seeds} {'seed' if seeds == 1 else 'seeds'}. First {sft['steps']} steps of "
        f"supervised training on chosen and rejected completions alike; then {stage['steps']} steps of {stage['batch_size']} "
        f"pairs that forget the rejected ones (`forget`) and are to keep the chosen ones (`retain`). Memory of the "
        f"projections that have one: {c['memory']} earlier retain gradients.\n\n"
        "Values are the mean over seeds and, in brackets, the smallest and largest seed."
    )


def _seen(runs: Runs) -> str:
    common, rates = _common(runs), runs.config["rates"]
    rows = []
    for name, seeds in runs.records.items():
        cells = [
            spread(moved(seeds, side, split).values[:, -1])
            for side, split in (("rejected", "eval"), ("chosen", "eval"), ("chosen", "eval_train"))
        ]
        cells.append(spread(at_equal_forgetting(seeds, common)) if common > 0 else "")
        rows.append(f"| {_called(name)} | {rates[name]:g} | " + " | ".join(cells) + " |")
    first = next(iter(runs.records.values()))
    starts = [curve(first, f"eval/per_token/{side}").values[:, 0] for side in ("chosen", "rejected")]
    cosines = [curve(first, "batch/cosine").values[:, place] for place in (0, -1)]
    text = (
        f"Held-out log-probability at the start, nats a token: retain {spread(starts[0])}, forget {spread(starts[1])}. "
        f"Cosine of the batch's two gradients: {spread(cosines[0])} at the first step, {spread(cosines[1])} at the last one "
        "of the first variant. Changes from the first to the last evaluation in nats a token. The last column is read off the "
        f"path where {common:.2f} nats a token are forgotten, so that learning rates do not matter to it."
    )
    head = [
        "optimizer",
        "method",
        "rate",
        "forget",
        "retain",
        "retain, training pairs",
        f"retain at {common:.2f} forgotten",
    ]
    return "\n".join(["## What forgetting cost", "", text, "", *_table(head, rows)])


def _judged(runs: Runs) -> str:
    common = _common(runs)
    rows = []
    for name, seeds in runs.records.items():
        variant, found = VARIANTS[name], share(seeds).values
        cells = [verdict(seeds, variant.method), "", "", ""]
        if variant.method not in MEANT_TO_RISE:
            cells[1:3] = [f"{found.mean():.1e}", f"{found.max():.1e}"]
            plain = runs.records.get(f"{variant.optimizer}-plain")
            cells[3] = "" if plain is None else f"{found.mean() / share(plain).values.mean():.1e}"
        retain, forget = (curve(seeds, f"realised/{side}").values.sum(1) for side in ("chosen", "rejected"))
        cells.append(spread(retain / np.abs(forget)))
        retain, forget = (moved(seeds, side).values[:, -1] for side in ("chosen", "rejected"))
        cells.append(spread(retain / np.abs(forget)))
        cells.append(spread(at_equal_forgetting(seeds, common) / common) if common > 0 else "")
        rows.append(f"| {_called(name)} | " + " | ".join(cells) + " |")
    text = (
        "In nats of retain for a nat of forget. First order: how the batch's retain sum changes by the step that was made, "
        "for a nat by which its forget sum changes, without its sign. The claim, that the retain loss stays put to first "
        f"order, holds where that is below {STAYS:g} at every step of every seed; the methods that add the retain gradient "
        "make no such claim. Realised: the changes of each step's own batch, summed over all steps. Held-out: changes at the "
        f"end, and where {common:.2f} nats a token are forgotten."
    )
    head = ["optimizer", "method", "verdict", "first order: mean", "largest", "mean over plain's"]
    head += ["realised, own batch", "held-out", f"held-out at {common:.2f}"]
    return "\n".join(["## Does the retain loss stay put?", "", text, "", *_table(head, rows)])


def _moved(runs: Runs) -> str:
    rows = []
    for name, seeds in runs.records.items():
        sums = [
            spread(curve(seeds, f"{kind}/{side}").values.sum(1))
            for side in ("rejected", "chosen")
            for kind in ("first_order", "realised")
        ]
        rows.append(f"| {_called(name)} | " + " | ".join(sums) + " |")
    text = (
        "Each step's own batch: the mean change of its rows in nats a response, summed over all steps. What is realised "
        "beyond first order is of second order; what held-out and training pairs lose beyond that is the doing of steps whose "
        "batches held other pairs."
    )
    head = ["optimizer", "method", *(f"{s}, {k}" for s in ("forget", "retain") for k in ("first order", "realised"))]
    return "\n".join(["## What the steps did to their own batch", "", text, "", *_table(head, rows)])


def _pictures() -> str:
    return "\n\n".join(["## Figures", *(f"![{name}](figures/{name}.png)" for name in FIGURES)])


def _data(out: Path) -> str:
    rows = pair_lines([read_json(out / "pairs.json")])
    text = "A seed varies the order of the batches, in supervised training and in forgetting."
    return "\n".join(["## Data", "", text, "", *rows])
