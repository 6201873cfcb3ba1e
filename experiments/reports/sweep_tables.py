"""Reads a sweep's run folders into groups of trials that differ in their seed alone; figures and reports see nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from entangle.command_line import leaves
from entangle.errors import UserError
from entangle.training import read_metrics
from entangle.training.run_folder import read_json
from experiments.reports.run_tables import Curve, curve
from experiments.sweep import Status, read_trials
from experiments.sweep.trials import TRIALS

NAMELESS = (
    *("objective", "objective_args", "pair_chain", "pair_chain_args", "model", "pair_set", "data"),
    "preference.optimizer.name",
)
"""Fields whose value says which field it is."""


class Group(NamedTuple):
    """Trials that differ in their seed alone.

    Attributes:
      config: of the first one.
      seeds: of each.
      records: metrics records of each.
      names: of their folders.
    """

    config: dict[str, Any]
    seeds: list[int]
    records: list[list[dict[str, Any]]]
    names: tuple[str, ...] = ()

    def only(self, seeds: Sequence[int]) -> Group:
        """The same of some of its seeds, in their order."""
        places = [self.seeds.index(seed) for seed in seeds]
        names = tuple(self.names[place] for place in places) if self.names else ()
        return self._replace(seeds=list(seeds), records=[self.records[place] for place in places], names=names)

    def curve(self, metric: str) -> Curve:
        """A metric over the steps, one row a seed."""
        return curve(self.records, metric)

    def change(self, metric: str) -> np.ndarray:
        """Last evaluation minus first, one a seed."""
        return self.curve(metric).change()

    def last(self, metric: str) -> np.ndarray:
        """At the last evaluation, one a seed."""
        return np.asarray(self.curve(metric).values[:, -1])


class Sweep(NamedTuple):
    """A sweep's finished trials by what they were made with, and the others.

    Attributes:
      kind: of experiment.
      base: the configuration that the trials change.
      groups: label -> trials, in the order of ``labels``.
      failed: name and reason of every trial that failed.
      open: names of the trials that are not over.
    """

    kind: str
    base: dict[str, Any]
    groups: dict[str, Group]
    failed: list[tuple[str, str]]
    open: list[str]


def read_sweep(out: Path) -> Sweep:
    """Read a sweep's folder.

    Args:
      out: the folder.

    Raises:
      UserError: it holds no sweep, or no trial that is done.
    """
    config = read_json(out / "config.json")
    trials = read_trials(out)
    done = [trial for trial in trials if trial["status"] is Status.DONE]
    if not done:
        raise UserError(f"{out}: no trial is done yet")
    configs = [trial["config"]["trial"] for trial in done]
    labels = _labels(configs)
    groups: dict[str, Group] = {}
    for label in dict.fromkeys(labels):
        mine = sorted(
            (settings["seed"], trial["name"], settings)
            for trial, settings, called in zip(done, configs, labels, strict=True)
            if called == label
        )
        records = [read_metrics(out / TRIALS / name) for _, name, _ in mine]
        groups[label] = Group(mine[0][2], [seed for seed, _, _ in mine], records, tuple(name for _, name, _ in mine))
    return Sweep(
        config["kind"],
        config["base"],
        groups,
        [(trial["name"], trial["reason"]) for trial in trials if trial["status"] is Status.FAILED],
        [trial["name"] for trial in trials if trial["status"] in (Status.NEW, Status.BEGUN)],
    )


def _labels(configs: list[dict[str, Any]]) -> list[str]:
    """What tells each from the others, seeds left out: values where they speak for themselves, else names and values.

    A number that follows from the other fields is left out: of optimizers with a learning rate each, say, the rate.
    """
    flat = [dict(leaves(config)) for config in configs]
    names = list(dict.fromkeys(name for config in flat for name in config if name != "seed"))
    differ = [name for name in names if len({str(config.get(name)) for config in flat}) > 1]
    for name in [name for name in differ if name not in NAMELESS]:
        others = [other for other in differ if other != name]
        if others and len(set(_joined(flat, others))) == len(set(_joined(flat, differ))):
            differ = others
    return [label or "all trials" for label in _joined(flat, differ)]


def _joined(configs: list[dict[str, Any]], names: list[str]) -> list[str]:
    return [", ".join(filter(None, (_said(config, name) for name in names))) for config in configs]


def _said(config: Mapping[str, Any], name: str) -> str:
    if name not in config:
        return ""
    if name == "masks":
        return "" if config[name] == "none" else f"{config[name]} masks"
    value = f"{config[name]:g}" if isinstance(config[name], float) else str(config[name])
    return value if name in NAMELESS else f"{name.rsplit('.', 1)[-1].replace('_', ' ')} {value}"
