"""How far the overlap of two responses predicts their entanglement and the displacement of the chosen one; CHES against it.

Claim: identical tokens entangle the two gradients (arXiv 2410.13828, section 4.2), so pairs that differ in fewer tokens have a
larger cosine; pairs whose hidden states are alike, by the CHES score, lose more of the chosen log-probability, and CHES tells
this better than the edit distance (arXiv 2410.08847, whose evidence is between sets of pairs with a model for each; here
the pairs are held-out ones of one run).

Pairs are ``spliced``: whole tweets of which the rejected one ends with none, one, two, ... words of the chosen one, so that
every overlap occurs; and ``tweets``, unlike in nearly all tokens.

Command: ``python -m experiments.token_overlap --out DIR``; ``--preset tweets --trial.data FOLDER`` (TweetEval's layout),
``--preset hh-rlhf --trial.data FILE.jsonl``.
Output: beside the figures and the report ``pairs.csv`` in every trial's folder, a row for every held-out pair.
Hardware and time: 4 minutes on two CPU cores (AMD EPYC).
Result: experiments/results/token_overlap/report.md (three seeds): the fewer tokens differ, the larger the cosine (rank
correlation -0.77 on spliced tweets); length-normalised CHES tells the displacement best (-0.41, edit distance +0.17); CHES
itself grows with length and tells it the wrong way round, until both lengths are held fixed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from entangle import command_line
from entangle.training import OptimizerConfig
from experiments.sweep import Overrides, experiment, launch
from experiments.sweep.experiment import LAPTOP
from experiments.sweep.settings import SweepConfig
from experiments.sweep.trial_config import TrialConfig

KIND = "token_overlap"


@dataclasses.dataclass(frozen=True)
class TokenOverlapConfig(SweepConfig):
    """The sweep.

    Attributes:
      pair_sets: as --trial.pair-set takes them; a preference file has its own pairs.
    """

    out: Path = Path("runs/token_overlap")
    pair_sets: tuple[str, ...] = ("spliced", "tweets")


def presets() -> dict[str, TokenOverlapConfig]:
    """The named defaults, see ``experiment.presets``.

    Example:
      >>> from experiments.token_overlap import presets
      >>> presets()["laptop"].pair_sets
      ('spliced', 'tweets')
    """
    optimizer = OptimizerConfig(learning_rate=2e-4)
    stage = dataclasses.replace(LAPTOP.preference, steps=60, optimizer=optimizer, eval_every=20, checkpoint_every=60)
    base = dataclasses.replace(LAPTOP.base, steps=600)
    trial = dataclasses.replace(LAPTOP, held_out_pairs=256, probe_pairs=0, base=base, preference=stage)
    return experiment.presets(TokenOverlapConfig(trial=trial), seeds=1)


def config() -> TrialConfig:
    """The trial that the default sweep's overrides change.

    Example:
      >>> from experiments.token_overlap import config
      >>> config().objective
      'dpo'
    """
    return presets()["laptop"].trial


def sweep(settings: TokenOverlapConfig | None = None) -> Iterator[Overrides]:
    """Pair set by seed.

    Args:
      settings: the default sweep's by default.

    Example:
      >>> from experiments.token_overlap import sweep
      >>> len(list(sweep())), next(sweep())
      (6, {'pair_set': 'spliced', 'seed': 0})
    """
    settings = settings or presets()["laptop"]
    return experiment.by_pair_set(settings, settings.pair_sets)


def run(settings: TokenOverlapConfig) -> list[Path]:
    """Run or continue the sweep, look at every held-out pair, and draw the figures.

    Returns:
      The files that a reader wants.

    Raises:
      UserError: bad input; nothing has been overwritten.
    """
    experiment.need(settings, "pair_sets")
    from experiments import token_overlap_measure  # what runs models takes seconds to import

    return launch.run(settings, KIND, sweep(settings), token_overlap_measure.measure)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: ``python -m experiments.token_overlap --help``."""
    experiment.main(presets(), run, arguments, __doc__, ("pair_set", "seed"))


if __name__ == "__main__":
    command_line.run(main)
