"""Entanglement against the size of the model, on the same data.

Claim: none of the paper's; its two models have 7 and 8 billion parameters. Cosine, the ratio |g_l| / |g_w| and the cases are
measured for models of growing size that were pretrained, tuned and optimised alike. For each is judged whether both log-
probabilities end lower where most pairs are in the case in which both fall (under equal coefficients |g_w|^2 < <g_w, g_l> <
|g_l|^2, arXiv 2410.13828, section 3).

Sizes are those of ``models.PRESETS``; a larger model also learns more in the same number of steps, which is not held apart.

Command: ``python -m experiments.scale --out DIR``; ``--preset tweets --trial.data FOLDER`` (TweetEval's layout),
``--preset hh-rlhf --trial.data FILE.jsonl``; ``--models tiny mini small gpt2`` on an accelerator.
Hardware and time: 11 minutes on two CPU cores (AMD EPYC).
Result: experiments/results/scale/report.md (three seeds, 0.17, 0.46 and 0.96 million parameters): the larger model, trained
for as many steps, has the lower cosine (0.77, 0.70, 0.28 at the end, in every seed); all pairs are ideal at every size, and
both log-probabilities fall all the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from entangle import command_line
from experiments.sweep import Overrides, experiment, launch, product
from experiments.sweep.experiment import LAPTOP
from experiments.sweep.settings import SweepConfig
from experiments.sweep.trial_config import TrialConfig

KIND = "scale"


@dataclasses.dataclass(frozen=True)
class ScaleConfig(SweepConfig):
    """The sweep over sizes.

    Attributes:
      models: names of ``models.PRESETS``, or local Hugging Face checkpoint folders.
    """

    out: Path = Path("runs/scale")
    models: tuple[str, ...] = ("tiny", "mini", "small")


def presets() -> dict[str, ScaleConfig]:
    """The named defaults, see ``experiment.presets``.

    Example:
      >>> from experiments.scale import presets
      >>> presets()["smoke"].models
      ('tiny', 'mini')
    """
    stage = dataclasses.replace(LAPTOP.preference, steps=60, batch_size=8, checkpoint_every=60)
    base = dataclasses.replace(LAPTOP.base, steps=600)
    trial = dataclasses.replace(LAPTOP, pair_set="long_suffix", held_out_pairs=64, base=base, preference=stage)
    return experiment.presets(ScaleConfig(trial=trial), seeds=1, models=("tiny", "mini"))


def config() -> TrialConfig:
    """The trial that the default sweep's overrides change.

    Example:
      >>> from experiments.scale import config
      >>> config().pair_set
      'long_suffix'
    """
    return presets()["laptop"].trial


def sweep(settings: ScaleConfig | None = None) -> Iterator[Overrides]:
    """Model by seed.

    Args:
      settings: the default sweep's by default.

    Example:
      >>> from experiments.scale import sweep
      >>> len(list(sweep())), next(sweep())
      (9, {'model': 'tiny', 'seed': 0})
    """
    settings = settings or presets()["laptop"]
    yield from product({"model": settings.models}, {"seed": range(settings.seeds)})


def run(settings: ScaleConfig) -> list[Path]:
    """Run or continue the sweep, and draw its figures.

    Returns:
      The files that a reader wants.

    Raises:
      UserError: bad input; nothing has been overwritten.
    """
    experiment.need(settings, "models")
    return launch.run(settings, KIND, sweep(settings))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: ``python -m experiments.scale --help``."""
    experiment.main(presets(), run, arguments, __doc__, ("model", "seed"))


if __name__ == "__main__":
    command_line.run(main)
