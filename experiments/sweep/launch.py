"""A sweep from its points to its page: plan, run what is not over, summarise, draw."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from entangle import training
from entangle.errors import UserError
from entangle.training.run_folder import DONE, one_at_a_time, read_json, write_json
from experiments import figures
from experiments.pairs.pair_config import identity
from experiments.sweep import Overrides, Status, Trial, folder_of, open_sweep, plan, status, waiting, wandb_agents
from experiments.sweep import summary as summaries
from experiments.sweep.settings import SweepConfig
from experiments.sweep.trial_config import TrialConfig, data_fingerprint
from experiments.sweep.trials import FAILED, PAIRS, check_sweep, fingerprint

CHECKED = (
    *("objective", "objective_args", "pair_chain", "pair_chain_args", "masks", "sparsity", "layers"),
    *("data", "held_out", "pair_set", "max_length", "eval_batch", "train_pairs", "held_out_pairs", "probe_pairs"),
)
"""Fields of a trial that can be wrong without any data being read; all but the stages, which check themselves."""
Measure = Callable[[Path, Sequence[Trial[TrialConfig]]], None]
Launch = Callable[[Path, Sequence[Trial[TrialConfig]]], None]


def run(settings: SweepConfig, kind: str, points: Iterable[Overrides], measure: Measure | None = None) -> list[Path]:
    """Run or continue a sweep.

    Args:
      settings: the configuration.
      kind: of experiment, part of the folder's identity; ``experiments.figures`` knows what draws it.
      points: the sweep: overrides of ``settings.trial``.
      measure: the sweep's folder and its trials that are done to files in the trials' folders, before these are drawn.

    Returns:
      These files; none where trials are left to other shares or processes.

    Raises:
      UserError: bad input, or machines that cannot be reached; nothing has been overwritten.
      UnfinishedError: machines died too often; all that could be run is over.
    """
    if settings.ray.address:
        jax.config.update("jax_platforms", "cpu")  # this process trains nothing: accelerators are left to the tasks
    figures.check_kind(kind)
    place, shares = settings.shares()
    trials = plan(settings.trial, points, identity, settings.out)
    if not trials:
        raise UserError("the sweep has no trials")
    todo = waiting(settings.out, trials[place - 1 :: shares], retry_failed=settings.retry_failed)
    check_sweep(settings.out, kind, identity(settings.trial))
    gathered = _check(todo)
    if settings.export_wandb:
        return [wandb_agents.export(settings.export_wandb, kind, settings, len(trials))]
    with _launcher(settings, kind, gathered) if todo else contextlib.nullcontext() as launch:
        folder = open_sweep(settings.out, kind, identity(settings.trial), trials)
        _tell_pairs(settings.out, gathered)
        if todo:
            (settings.out / DONE).unlink(missing_ok=True)  # what was drawn before is not the whole sweep any more
        print(f"{kind}: {len(trials)} trials, {len(todo)} to run; output: {settings.out}", flush=True)
        for trial in todo:
            (folder_of(settings.out, trial) / FAILED).unlink(missing_ok=True)
        if launch is not None:
            launch(settings.out, todo)
    standing = [status(folder_of(settings.out, trial)) for trial in trials]
    if not set(standing) <= {Status.DONE, Status.FAILED}:
        print(f"{sum(s in (Status.NEW, Status.BEGUN) for s in standing)} trials are not over yet: no figures")
        return []
    if folder.done and not todo:
        files = read_json(settings.out / DONE)["files"]
        if all((settings.out / file).exists() for file in files):
            return [settings.out / file for file in files]
    with one_at_a_time(settings.out):
        if measure is not None:
            measure(settings.out, [t for t, now in zip(trials, standing, strict=True) if now is Status.DONE])
        files = [summaries.write(settings.out), *figures.redraw(settings.out)]
        folder.mark_done({"files": [str(file.relative_to(settings.out)) for file in files]})
    return files


@contextlib.contextmanager
def _launcher(settings: SweepConfig, kind: str, gathered: Mapping[str, Any]) -> Iterator[Launch]:
    """What runs trials: this process, or a cluster for as long as this process is connected to it."""
    from experiments.sweep import trial_runs  # what trains takes seconds to import

    tracker, packing = _trackers(settings, kind), settings.packing
    if not settings.ray.address:
        yield functools.partial(trial_runs.run, tracker=tracker, packing=packing, gathered=gathered)
        return
    from experiments.sweep import on_ray, ray_cluster

    with ray_cluster.connected(settings.ray) as room:
        yield functools.partial(on_ray.run, tracker=tracker, packing=packing, settings=settings.ray, room=room)


def _trackers(settings: SweepConfig, kind: str) -> Callable[[Path, Mapping[str, Any]], training.Tracker]:
    if not settings.track:
        return lambda folder, config: training.NoTracker()
    group = f"{kind} {settings.out.resolve().name}"

    def tracker(folder: Path, config: Mapping[str, Any]) -> training.Tracker:
        # an agent of W&B has one run for a trial, and none for the models that trials start from
        if os.environ.get("WANDB_SWEEP_ID") and config["kind"] != "preference":
            return training.NoTracker()
        return training.WandbTracker(folder, config, group=group)

    return tracker


def _check(trials: Sequence[Trial[TrialConfig]]) -> dict[str, Any]:
    """Refuse what cannot work, before anything is written; each kind of trial, and each one's data and model, once.

    Returns:
      Data fingerprint -> what such trials are made from.
    """
    if not trials:
        return {}
    try:
        return _gathered(trials)
    except UserError as error:
        raise UserError(_flags_of_trial(str(error))) from None


def _flags_of_trial(text: str) -> str:
    """What is said of a run's flags, said of the sweep's: they are those of its trial."""
    own = "|".join(field.name.replace("_", "-") for field in dataclasses.fields(TrialConfig))
    return re.sub(rf"(?<![\w.-])--(?=(?:{own})\b(?!-))", "--trial.", text)


def _gathered(trials: Sequence[Trial[TrialConfig]]) -> dict[str, Any]:
    from experiments.sweep import trial_data  # what reads data and models takes seconds to import

    seen, gathered = set(), {}
    for trial in trials:
        config = trial.config
        key = fingerprint({name: getattr(config, name) for name in CHECKED})
        if key not in seen:
            seen.add(key)
            trial_data.check(config)
    for trial in trials:
        digits = data_fingerprint(trial.config)
        if digits not in gathered:
            gathered[digits] = trial_data.gather(trial.config)
    return gathered


def _tell_pairs(out: Path, gathered: Mapping[str, Any]) -> None:
    """Print and keep what became of the pairs: data fingerprint -> pair set -> split -> lines."""
    if not gathered:
        return
    from experiments.pairs import pair_runs  # what trains takes seconds to import

    with one_at_a_time(out):
        before = read_json(out / PAIRS) if (out / PAIRS).exists() else {}
        new = {
            digits: {
                name: {split: [_flags_of_trial(line) for line in lines] for split, lines in splits.items()}
                for name, splits in materials.report.items()
            }
            for digits, materials in gathered.items()
            if digits not in before
        }
        if new:
            write_json(out / PAIRS, before | new)
    for report in new.values():
        pair_runs.say(report)
