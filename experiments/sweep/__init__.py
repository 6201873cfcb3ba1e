"""Sweeps: overrides as data, trials with fingerprints and folders, and their summary."""

from experiments.sweep.overrides import Overrides, override, product, subset, zipped
from experiments.sweep.summary import read_trials
from experiments.sweep.trials import Status, Trial, folder_of, mark_failed, open_sweep, plan, status, waiting

__all__ = [
    "Overrides",
    "Status",
    "Trial",
    "folder_of",
    "mark_failed",
    "open_sweep",
    "override",
    "plan",
    "product",
    "read_trials",
    "status",
    "subset",
    "waiting",
    "zipped",
]
