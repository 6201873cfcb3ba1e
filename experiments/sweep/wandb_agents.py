"""A sweep for W&B's agents: a file for ``wandb sweep``, whose agents run one trial after another."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entangle.errors import UserError
from experiments.sweep.overrides import fields
from experiments.sweep.settings import SweepConfig

PROJECT = "entangle"


def export(file: Path, kind: str, settings: SweepConfig, trials: int) -> Path:
    """Write a configuration for ``wandb sweep``, and run nothing.

    Its one parameter is the share of the trials, 1/N to N/N: which trials a sweep has is said by its flags, objectives differ
    in their hyperparameters, and no grid of flags names each trial once. Agents are started in a folder from which the paths
    of the command lead to files that all of them share.

    Args:
      file: what to write.
      kind: the experiment, a module of ``experiments`` with ``presets()``.
      settings: the sweep.
      trials: how many it has.

    Returns:
      The file.

    Raises:
      UserError: it cannot be written, or the settings have what the agents decide.
    """
    import yaml

    if settings.part or settings.ray.address:
        raise UserError("--export-wandb: agents choose --part themselves, and run without --ray")
    module = f"experiments.{kind}"
    default = importlib.import_module(module).presets()[settings.preset]
    text = yaml.safe_dump(configuration(module, settings, default, trials), sort_keys=False)
    try:
        with file.open("x", encoding="utf-8") as new:  # nothing is overwritten
            new.write(text)
    except OSError as error:
        raise UserError(f"--export-wandb {file}: cannot be written ({error.strerror})") from None
    return file


def configuration(module: str, settings: SweepConfig, default: SweepConfig, trials: int) -> dict[str, Any]:
    """What the file holds.

    Args:
      module: whose command line it is.
      settings: the sweep.
      default: the preset that its flags override.
      trials: how many it has.

    Example:
      >>> from experiments.sweep.settings import SweepConfig
      >>> from experiments.sweep.wandb_agents import configuration
      >>> found = configuration("experiments.margin_objectives", SweepConfig(seeds=2), SweepConfig(), 2)
      >>> " ".join(found["command"])
      '${env} ${interpreter} -m experiments.margin_objectives --preset laptop --seeds 2 ${args}'
      >>> found["method"], found["parameters"]
      ('grid', {'part': {'values': ['1/2', '2/2']}})
    """
    return {
        "project": PROJECT,
        "name": f"{module.rpartition('.')[2]} {settings.out.name}",
        "program": f"{module.replace('.', '/')}.py",  # shown by W&B; the command says what runs
        "method": "grid",
        "parameters": {"part": {"values": [f"{one}/{trials}" for one in range(1, trials + 1)]}},
        "command": ["${env}", "${interpreter}", "-m", module, *flags(settings, default), "${args}"],
    }


def flags(settings: SweepConfig, default: SweepConfig) -> list[str]:
    """The command line that makes a preset these settings.

    Example:
      >>> import dataclasses
      >>> from experiments.sweep.settings import SweepConfig
      >>> from experiments.sweep.wandb_agents import flags
      >>> from experiments.sweep.trial_config import TrialConfig
      >>> flags(SweepConfig(track=False, trial=TrialConfig(objective_args={"beta": 0.2})), SweepConfig())
      ['--preset', 'laptop', '--trial.objective-args', 'beta', '0.2', '--no-track']
    """
    usual = fields(default)
    words = ["--preset", settings.preset]
    for name, value in fields(settings).items():
        if value != usual[name] and name not in ("preset", "export_wandb"):
            words += _flag(name.replace("_", "-"), value)
    return words


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        head, _, last = name.rpartition(".")
        return [f"--{name}" if value else f"--{head}{'.' if head else ''}no-{last}"]
    if isinstance(value, Mapping):
        return [f"--{name}", *(str(word) for pair in value.items() for word in pair)]
    return [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
