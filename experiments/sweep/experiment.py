"""What experiments that are sweeps share: presets by size and data, what has to be named, the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from entangle import command_line, models
from entangle.errors import UserError
from entangle.training import OptimizerConfig, StageConfig
from experiments.pairs.pair_config import NOT_EVALUATED
from experiments.sweep import Overrides, product
from experiments.sweep.settings import SweepConfig
from experiments.sweep.trial_config import TrialConfig

Settings = TypeVar("Settings", bound=SweepConfig)

LAPTOP = TrialConfig(
    vocab_size=1024,
    max_length=48,
    train_pairs=2000,
    changes=False,
    base=StageConfig(1000, 32, OptimizerConfig(learning_rate=3e-3), checkpoint_every=250),
    sft=StageConfig(60, 32, OptimizerConfig(learning_rate=1e-3), checkpoint_every=60),
    preference=StageConfig(100, 16, OptimizerConfig(learning_rate=5e-5), eval_every=10, checkpoint_every=50),
)
"""The package's grammar and a model of 170,000 parameters, for two cores."""


def presets(laptop: Settings, **smoke: Any) -> dict[str, Settings]:
    """The named defaults of a sweep: ``laptop``, ``smoke`` (is all in place?), and two for real data.

    Args:
      laptop: the first one; the others change its trial.
      smoke: what ``smoke`` changes besides, so that its sweep is small.

    Returns:
      Name to settings. ``tweets`` and ``hh-rlhf`` are without data, which is to be named, and pretrain a model on it.

    Example:
      >>> from experiments.sweep.settings import SweepConfig
      >>> from experiments.sweep.experiment import LAPTOP, presets
      >>> found = presets(SweepConfig(trial=LAPTOP), seeds=1)
      >>> list(found), found["smoke"].seeds, found["hh-rlhf"].trial.model
      (['laptop', 'smoke', 'tweets', 'hh-rlhf'], 1, 'small')
    """
    trial = laptop.trial
    few = dataclasses.replace(
        trial,
        train_pairs=256,
        held_out_pairs=16,
        probe_pairs=8,
        base=StageConfig(60, 32, trial.base.optimizer, checkpoint_every=60),
        sft=StageConfig(20, 16, OptimizerConfig(learning_rate=3e-3), checkpoint_every=20),
        preference=StageConfig(10, 8, trial.preference.optimizer, eval_every=5, checkpoint_every=5),
    )
    tweets = dataclasses.replace(trial, data="", model="small", vocab_size=4096, max_length=64)
    found = {"laptop": laptop, "smoke": dataclasses.replace(laptop, trial=few, **smoke)}
    found["tweets"] = dataclasses.replace(laptop, trial=tweets)
    found["hh-rlhf"] = dataclasses.replace(laptop, trial=dataclasses.replace(tweets, max_length=256))
    return {name: dataclasses.replace(settings, preset=name) for name, settings in found.items()}


def by_pair_set(settings: SweepConfig, pair_sets: Sequence[str]) -> Iterator[Overrides]:
    """Pair set by seed; seeds alone on a preference file, which has its own pairs.

    Args:
      settings: the configuration.
      pair_sets: as --trial.pair-set takes them.

    Example:
      >>> from experiments.sweep.settings import SweepConfig
      >>> from experiments.sweep.experiment import by_pair_set
      >>> [list(point.values()) for point in by_pair_set(SweepConfig(seeds=2), ["tweets", "single_token"])]
      [['tweets', 0], ['tweets', 1], ['single_token', 0], ['single_token', 1]]
    """
    sets = {} if settings.trial.from_file else {"pair_set": pair_sets}
    return product(sets, {"seed": range(settings.seeds)})


def need(settings: SweepConfig, *names: str) -> None:
    """Refuse a sweep over nothing, or on no data.

    Args:
      settings: the configuration.
      names: its fields that are swept, beside the seeds.

    Raises:
      UserError: one of them is empty, or the data is not named.

    Example:
      >>> from experiments.sweep.settings import SweepConfig
      >>> from experiments.sweep.experiment import need
      >>> need(SweepConfig(seeds=0))
      Traceback (most recent call last):
      entangle.errors.UserError: --seeds: at least one is needed
    """
    for name in (*names, "seeds"):
        value = getattr(settings, name)
        if not value or (name == "seeds" and value < 0):
            raise UserError(f"--{name.replace('_', '-')}: at least one is needed")
    for name in ("data", "model"):
        if not getattr(settings.trial, name):
            raise UserError(f"--preset {settings.preset}: name the {name} with --trial.{name}")


def main(
    presets: Mapping[str, Settings],
    run: Callable[[Settings], list[Path]],
    arguments: Sequence[str] | None,
    description: str | None,
    swept: Sequence[str],
    swept_by: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """The command line of a sweep.

    Args:
      presets: name to defaults, the first is the default one.
      run: runs the sweep; returns the files that a reader wants.
      arguments: the words of the command line; None takes the process's.
      description: the module's docstring, whose first line ``--help`` begins with.
      swept: fields of the trial that the sweep sets itself.
      swept_by: field of the sweep -> field of the trial that the sweep sets where that one is given.

    Raises:
      UserError: a flag without effect, and what ``run`` refuses.
    """
    settings = command_line.parse(presets, arguments, description=(description or "").split("\n")[0])
    given = [field for name, field in swept_by.items() if getattr(settings, name)]
    refuse_unused(settings, presets[settings.preset], [*swept, *given])
    command_line.name_files(run(settings))


def refuse_unused(settings: SweepConfig, default: SweepConfig, swept: Sequence[str]) -> None:
    """Refuse flags of the trial that would change nothing.

    Args:
      settings: read from the command line.
      default: the preset that it started from.
      swept: fields of the trial that the sweep sets itself.

    Raises:
      UserError: one of them differs from the preset.

    Example:
      >>> from experiments.sweep.settings import SweepConfig
      >>> from experiments.sweep.experiment import refuse_unused
      >>> from experiments.sweep.trial_config import TrialConfig
      >>> refuse_unused(SweepConfig(trial=TrialConfig(seed=3)), SweepConfig(), ["seed"])
      Traceback (most recent call last):
      entangle.errors.UserError: --trial.seed 3 has no effect: the sweep sets it itself
    """
    trial = settings.trial
    unused = [(swept, "the sweep sets it itself"), NOT_EVALUATED]
    if trial.model not in models.PRESETS:
        unused.append((("base", "vocab_size"), f"the base model is --trial.model {trial.model}"))
    if trial.from_file:
        why = f"the pairs are those of --trial.data {trial.data}"
        unused.append((("pair_set", "labels", "label_words"), why))
        command_line.refuse_unused(settings, default, ["pair_sets"], why)
    if not trial.sft_first:
        unused.append((("sft",), "--trial.no-sft-first leaves SFT out"))
    for names, why in unused:
        command_line.refuse_unused(settings, default, [f"trial.{name}" for name in names], why)
