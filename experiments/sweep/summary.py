"""The summary of a sweep, one row a trial, rebuilt from the run folders alone."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from entangle.command_line import leaves
from entangle.training.run_folder import CONFIG, DONE, read_json, write_text
from experiments.sweep.trials import FAILED, TRIALS, Status, planned, status

FILE = "summary.csv"


def read_trials(out: Path) -> list[dict[str, Any]]:
    """What every trial's folder says, and which trials have none yet, in the order of the plan; others after it.

    Args:
      out: the sweep's folder.

    Raises:
      UserError: a file in a folder is no JSON.

    Returns:
      One dict a trial: ``name``, ``status``, ``reason`` (of a failure), ``config`` (of the run) and ``done`` (its marker; {}
      before the end).

    Example:
      >>> from pathlib import Path
      >>> from experiments.sweep import read_trials
      >>> read_trials(Path("nowhere"))
      []
    """
    folder = out / TRIALS
    there = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    begun, plan = {name.rpartition("-")[2]: name for name in there}, planned(out)
    names = [begun.get(digits, name) for digits, name in plan.items()]
    return [_read(folder / name) for name in [*names, *sorted(set(there) - set(names))]]


def rows(out: Path) -> list[dict[str, Any]]:
    """The table: what tells the trials apart, how each stands, and its first and last evaluation.

    Returns:
      One flat dict a trial with the same keys: ``trial``, ``status``, ``reason``, ``step``, the fields of the configuration
      that differ between trials (``objective`` and ``seed`` always), ``first:METRIC`` and ``last:METRIC``.
    """
    found = read_trials(out)
    configs = [dict(leaves(trial["config"].get("trial", {}))) for trial in found]
    names = list(dict.fromkeys(name for config in configs for name in config))
    begun = [config for config in configs if config]
    differ = [n for n in names if n in ("objective", "seed") or len({str(c.get(n)) for c in begun}) > 1]
    table = []
    for trial, config in zip(found, configs, strict=True):
        row = {"trial": trial["name"], "status": trial["status"].value, "reason": trial["reason"]}
        row |= {"step": trial["done"].get("step", "")} | {name: config.get(name, "") for name in differ}
        for when in ("first", "last"):
            evaluated = trial["done"].get(when, {})
            row |= {f"{when}:{name}": value for name, value in evaluated.items() if name != "step"}
        table.append(row)
    columns = dict.fromkeys(name for row in table for name in row)
    return [{name: row.get(name, "") for name in columns} for row in table]


def write(out: Path) -> Path:
    """Write ``summary.csv``, whole or not at all.

    Returns:
      The file.
    """
    table, text = rows(out), io.StringIO()
    writer = csv.DictWriter(text, list(table[0]) if table else ["trial"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_text(out / FILE, text.getvalue())
    return out / FILE


def _read(path: Path) -> dict[str, Any]:
    now = status(path)
    return {
        "name": path.name,
        "status": now,
        "reason": _json(path / FAILED).get("reason", "") if now is Status.FAILED else "",
        "config": _json(path / CONFIG),
        "done": _json(path / DONE) if now is Status.DONE else {},
    }


def _json(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.exists() else {}
