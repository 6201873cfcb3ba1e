"""A trial is a configuration with a fingerprint and a run folder; a sweep's folder holds them, and tells how each stands."""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from entangle.errors import UserError
from entangle.training import RunFolder, write_json
from entangle.training.run_folder import CONFIG, DONE, check_folder, one_at_a_time, read_json
from experiments.sweep.overrides import Overrides, override

Config = TypeVar("Config")
TRIALS, FAILED, PLANNED, PAIRS = "trials", "failed.json", "planned.json", "pairs.json"
_DIGITS = 12


class Trial(NamedTuple, Generic[Config]):
    """One run of a sweep.

    Attributes:
      name: of its folder: what tells it from the others, and its fingerprint.
      config: the whole configuration.
      fingerprint: of the configuration; two trials with one fingerprint are one run.
    """

    name: str
    config: Config
    fingerprint: str


class Status(enum.Enum):
    """How a trial stands, by its folder alone."""

    NEW = "new"
    BEGUN = "begun"
    DONE = "done"
    FAILED = "failed"


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Hexadecimal digits that stand for a configuration.

    Example:
      >>> from experiments.sweep.trials import fingerprint
      >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}), len(fingerprint({}))
      (True, 12)
    """
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def plan(
    base: Config,
    sweep: Iterable[Overrides],
    identity: Callable[[Config], Mapping[str, Any]],
    out: Path | None = None,
) -> list[Trial[Config]]:
    """The trials of a sweep, in its order.

    Args:
      base: the configuration that the overrides change.
      sweep: the overrides of each trial.
      identity: configuration to what makes two runs the same.
      out: the sweep's folder: a trial that is there, perhaps from a sweep that spelt it otherwise, keeps its name.

    Raises:
      UserError: a field that is not there, a value of the wrong type or out of range, or two trials with one fingerprint.

    Example:
      >>> from experiments.pairs.pair_config import PairSettings, identity
      >>> from experiments.sweep import plan, product
      >>> [trial.name for trial in plan(PairSettings(), product({"objective": ["dpo", "ipo"]}), identity)]
      ['dpo-...', 'ipo-...']
    """
    found: dict[str, tuple[Trial[Config], Overrides]] = {}
    there = planned(out) if out is not None else {}
    if out is not None and (out / TRIALS).is_dir():
        there |= {path.name[-_DIGITS:]: path.name for path in (out / TRIALS).iterdir()}
    for overrides in sweep:
        config = override(base, overrides)
        digits = fingerprint(identity(config))
        if digits in found:
            both = " and ".join(_said(which) for which in (found[digits][1], overrides))
            raise UserError(f"two trials with one fingerprint ({digits}): {both}")
        found[digits] = Trial(there.get(digits, f"{_slug(overrides)}-{digits}"), config, digits), overrides
    return [trial for trial, _ in found.values()]


def check_sweep(out: Path, kind: str, base: Mapping[str, Any]) -> None:
    """Refuse a folder that is another experiment's, or a sweep's of another base configuration.

    Raises:
      UserError: it is.
    """
    check_folder(out, _whole(kind, base))


def open_sweep(out: Path, kind: str, base: Mapping[str, Any], trials: Iterable[Trial[Any]] = ()) -> RunFolder:
    """Make or continue a sweep's folder; further trials of the same base configuration may join those that are there.

    Args:
      out: the folder.
      kind: of experiment.
      base: the configuration that the trials change.
      trials: what is planned; the folder remembers it, so that no trial is forgotten that was never begun.

    Raises:
      UserError: see ``check_sweep``.
    """
    check_sweep(out, kind, base)
    with one_at_a_time(out):  # several shares of a sweep may begin at once
        folder, before = RunFolder(out, _whole(kind, base)), planned(out)
        if (now := {trial.fingerprint: trial.name for trial in trials} | before) != before:
            write_json(out / PLANNED, now)
        return folder


def planned(out: Path) -> dict[str, str]:
    """Fingerprint -> name of every trial that was planned in a sweep's folder, begun or not.

    Example:
      >>> from pathlib import Path
      >>> from experiments.sweep.trials import planned
      >>> planned(Path("nowhere"))
      {}
    """
    return dict(read_json(out / PLANNED)) if (out / PLANNED).exists() else {}


def _whole(kind: str, base: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "base": base}


def status(folder: Path) -> Status:
    """How the trial of a folder stands.

    Example:
      >>> from pathlib import Path
      >>> from experiments.sweep.trials import status
      >>> status(Path("nowhere"))
      <Status.NEW: 'new'>
    """
    if (folder / DONE).exists():
        return Status.DONE
    if (folder / FAILED).exists():
        return Status.FAILED
    return Status.BEGUN if (folder / CONFIG).exists() else Status.NEW


def waiting(out: Path, trials: Iterable[Trial[Config]], *, retry_failed: bool = False) -> list[Trial[Config]]:
    """The trials that are neither done nor failed.

    Args:
      out: the sweep's folder.
      trials: its trials.
      retry_failed: take those that failed, too.
    """
    over = {Status.DONE} if retry_failed else {Status.DONE, Status.FAILED}
    return [trial for trial in trials if status(folder_of(out, trial)) not in over]


def folder_of(out: Path, trial: Trial[Any]) -> Path:
    """A trial's run folder."""
    return out / TRIALS / trial.name


def mark_failed(folder: Path, reason: str) -> None:
    """Write down why a trial cannot end; it is listed with that, and not tried again unless that is asked for."""
    write_json(folder / FAILED, {"reason": reason})


def _said(overrides: Overrides) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in overrides.items()) + "}"


def _slug(overrides: Overrides) -> str:
    """What a reader tells a trial by: values, and of numbers the last part of their name before."""
    parts = []
    for name, value in overrides.items():
        words = ",".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else value
        head = "" if isinstance(value, (str, dict)) else name.rsplit(".", 1)[-1]
        parts.append(
            re.sub(r"[^A-Za-z0-9.,+-]+", "-", f"{head}{words:g}" if isinstance(words, float) else f"{head}{words}")
        )
    return "_".join(filter(None, parts))[:80] or "trial"
