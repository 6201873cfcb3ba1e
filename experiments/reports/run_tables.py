"""Reads an experiment's run folders into tables; figures and reports see nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from entangle.errors import UserError
from entangle.training import read_metrics
from entangle.training.run_folder import CONFIG, DONE, read_json

# What predicts the changes of ``agreement/...``, in print.
PREDICTIONS = {
    "predicted": "plain step on the pair",
    "predicted_batch": "plain step on the batch",
    "first_order": "actual update",
}


class Runs(NamedTuple):
    """The preference runs of one experiment.

    Attributes:
      config: the experiment's configuration.
      records: pair set, or variant -> one list of metrics records a seed.
    """

    config: dict[str, Any]
    records: dict[str, list[list[dict[str, Any]]]]


class Curve(NamedTuple):
    """One metric over steps, for all seeds.

    Attributes:
      steps: ``[S]``.
      values: ``[seeds, S]``.
    """

    steps: np.ndarray
    values: np.ndarray

    def change(self) -> np.ndarray:
        """Last value minus first, ``[seeds]``."""
        return np.asarray(self.values[:, -1] - self.values[:, 0])

    def averaged(self, windows: int) -> Curve:
        """The curve over at most so many windows of equal length (the last may be shorter), or over all its steps.

        Example:
          >>> import numpy as np
          >>> from experiments.reports.run_tables import Curve
          >>> found = Curve(np.arange(4), np.array([[0.0, 1.0, 1.0, 1.0]])).averaged(2)
          >>> found.steps.tolist(), found.values.tolist()
          ([0.5, 2.5], [[0.5, 1.0]])
        """
        width = -(-len(self.steps) // windows)
        parts = np.array_split(np.arange(len(self.steps)), range(width, len(self.steps), width))
        return Curve(
            np.array([self.steps[part].mean() for part in parts]),
            np.stack([self.values[:, part].mean(1) for part in parts], 1),
        )


def read_runs(out: Path, names: str | None = None, stage: str = "preference") -> Runs:
    """Read the runs under an experiment's folder.

    Args:
      out: the experiment's folder.
      names: the flag that lists the folders in it; without one they are the pair sets of ``pairs.json``.
      stage: the run's folder in that of its seed; "" where that is the run's own.

    Raises:
      UserError: the folder has no experiment, or a seed's run has not ended.
    """
    config = read_json(out / CONFIG)
    found = config[names] if names else read_json(out / "pairs.json")
    return Runs(config, {name: read_seeds(out / name, config["seeds"], stage) for name in found})


def read_seeds(folder: Path, seeds: int, stage: str = "") -> list[list[dict[str, Any]]]:
    """Read the metrics of every seed's run under a folder.

    Args:
      folder: the folder that has one of each seed.
      seeds: number of seeds.
      stage: the run's folder in that of its seed; "" where that is the run's own.

    Raises:
      UserError: a seed's run has not ended.

    Example:
      >>> from pathlib import Path
      >>> from experiments.reports.run_tables import read_seeds
      >>> read_seeds(Path("nowhere"), 1)
      Traceback (most recent call last):
      entangle.errors.UserError: nowhere/seed0: this run has not ended; run the experiment to its end first
    """
    runs = [folder / f"seed{seed}" / stage for seed in range(seeds)]
    for run in runs:
        if not (run / DONE).exists():
            raise UserError(f"{run}: this run has not ended; run the experiment to its end first")
    return [read_metrics(run) for run in runs]


def pair_lines(reports: Iterable[Mapping[str, Mapping[str, Iterable[str]]]]) -> list[str]:
    """What became of the pairs, an item of a list for every split.

    Args:
      reports: pair set -> split -> lines, as ``pairs.json`` has them.

    Example:
      >>> from experiments.reports.run_tables import pair_lines
      >>> pair_lines([{"tweets": {"train": ["60 of 64 pairs encoded", "  too long: 4"]}}])
      ['- tweets, train: 60 of 64 pairs encoded; too long: 4']
    """
    return [
        f"- {name}, {split}: {'; '.join(map(str.strip, lines))}"
        for sets in reports
        for name, splits in sets.items()
        for split, lines in splits.items()
    ]


def curve(seeds: Iterable[list[dict[str, Any]]], metric: str) -> Curve:
    """A metric over the steps that have it, one row a seed.

    Raises:
      UserError: no step has it.

    Example:
      >>> from experiments.reports.run_tables import curve
      >>> curve([[{"step": 0, "x": 1.0}, {"step": 1}, {"step": 2, "x": 3.0}]], "x").change().tolist()
      [2.0]
    """
    rows = [{r["step"]: r[metric] for r in records if metric in r} for records in seeds]
    steps = sorted(set.intersection(*(set(row) for row in rows)))
    if not steps:
        raise UserError(f"no step of every run has the metric {metric}")
    return Curve(np.asarray(steps), np.asarray([[row[step] for step in steps] for row in rows], np.float64))


def recorded(seeds: Iterable[list[dict[str, Any]]], metric: str) -> bool:
    """Whether every seed has the metric at some step.

    Example:
      >>> from experiments.reports.run_tables import recorded
      >>> recorded([[{"step": 0, "x": 1.0}], [{"step": 0}]], "x")
      False
    """
    return all(any(metric in record for record in records) for records in seeds)


def all_predictions(runs: Runs) -> bool:
    """Whether every run recorded what each of ``PREDICTIONS`` says of the batches' rows."""
    return all(recorded(seeds, f"agreement/{kind}") for kind in PREDICTIONS for seeds in runs.records.values())


def spread(values: np.ndarray, unit: str = "", *, signed: bool = True) -> str:
    """Mean and range over seeds, in words; one seed's value alone.

    Example:
      >>> import numpy as np
      >>> from experiments.reports.run_tables import spread
      >>> spread(np.array([1.0, 2.0]), "nats"), spread(np.array([0.5]), signed=False)
      ('+1.500 nats (+1.000 to +2.000)', '0.500')
    """
    form = "+.3f" if signed else ".3f"
    mean = f"{values.mean():{form}}" + (f" {unit}" if unit else "")
    return mean if len(values) == 1 else f"{mean} ({values.min():{form}} to {values.max():{form}})"


def objective_label(config: Mapping[str, Any]) -> str:
    """The objective with what was set of its hyperparameters; the others have the defaults of the reference page.

    Example:
      >>> from experiments.reports.run_tables import objective_label
      >>> objective_label({"objective": "simpo", "objective_args": {"beta": 3.0}}), objective_label({"objective": "dpo"})
      ('simpo (beta 3)', 'dpo')
    """
    return _with_settings(config, "objective")


def pair_chain_label(config: Mapping[str, Any]) -> str:
    """How the two gradients are combined, with what was set.

    Example:
      >>> from experiments.reports.run_tables import pair_chain_label
      >>> pair_chain_label({"pair_chain": "cagrad", "pair_chain_args": {"c": 0.4}}), pair_chain_label({"pair_chain": "margin"})
      ('cagrad (c 0.4)', 'margin')
    """
    return _with_settings(config, "pair_chain")


def method_label(config: Mapping[str, Any]) -> str:
    """The objective and, unless it is plain margin, how the two gradients are combined.

    Example:
      >>> from experiments.reports.run_tables import method_label
      >>> config = {"objective": "dpo", "pair_chain": "margin"}
      >>> method_label(config), method_label(config | {"pair_chain": "protect_chosen"})
      ('dpo', 'dpo, protect_chosen')
    """
    objective, chain = objective_label(config), pair_chain_label(config)
    return objective if chain == "margin" else f"{objective}, {chain}"


def _with_settings(config: Mapping[str, Any], name: str) -> str:
    given = ", ".join(f"{key} {value:g}" for key, value in config.get(f"{name}_args", {}).items())
    return config[name] + (f" ({given})" if given else "")
