"""Where in the model the two gradients are entangled: their geometry layer by layer, over training.

Claim: none of the paper's, which looks at whole gradients. <g_w, g_l>, |g_w|^2 and |g_l|^2 are sums over layers (embeddings,
sublayers with their norms, final norm), so every layer's part of the cosine and of the norms is exact; this shows where the
entanglement sits, and which layers turn as training goes on.

Command: ``python -m experiments.layerwise --out DIR``; ``--preset tweets --trial.data FOLDER`` (TweetEval's layout),
``--preset hh-rlhf --trial.data FILE.jsonl``.
Hardware and time: 5 minutes on two CPU cores (AMD EPYC).
Result: experiments/results/layerwise/report.md (three seeds): in a model of 170,000 parameters whose token embedding is also
its head, the cosine of short pairs sits in that embedding (0.63 of 0.76 with a long suffix, all of -1 with a single token);
every layer's own cosine has the sign of the whole one, and training changes little of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from entangle import command_line
from experiments.sweep import Overrides, experiment, launch
from experiments.sweep.experiment import LAPTOP
from experiments.sweep.settings import SweepConfig
from experiments.sweep.trial_config import TrialConfig

KIND = "layerwise"


@dataclasses.dataclass(frozen=True)
class LayerwiseConfig(SweepConfig):
    """The sweep.

    Attributes:
      pair_sets: as --trial.pair-set takes them; a preference file has its own pairs.
    """

    out: Path = Path("runs/layerwise")
    pair_sets: tuple[str, ...] = ("single_token", "long_suffix", "tweets")


def presets() -> dict[str, LayerwiseConfig]:
    """The named defaults, see ``experiment.presets``.

    Example:
      >>> from experiments.layerwise import presets
      >>> presets()["laptop"].trial.layers
      True
    """
    stage = dataclasses.replace(LAPTOP.preference, steps=60, checkpoint_every=60)
    base = dataclasses.replace(LAPTOP.base, steps=600)
    trial = dataclasses.replace(LAPTOP, layers=True, held_out_pairs=64, base=base, preference=stage)
    return experiment.presets(LayerwiseConfig(trial=trial), seeds=1, pair_sets=("long_suffix",))


def config() -> TrialConfig:
    """The trial that the default sweep's overrides change.

    Example:
      >>> from experiments.layerwise import config
      >>> config().layers
      True
    """
    return presets()["laptop"].trial


def sweep(settings: LayerwiseConfig | None = None) -> Iterator[Overrides]:
    """Pair set by seed.

    Args:
      settings: the default sweep's by default.

    Example:
      >>> from experiments.layerwise import sweep
      >>> len(list(sweep())), next(sweep())
      (9, {'pair_set': 'single_token', 'seed': 0})
    """
    settings = settings or presets()["laptop"]
    return experiment.by_pair_set(settings, settings.pair_sets)


def run(settings: LayerwiseConfig) -> list[Path]:
    """Run or continue the sweep, and draw its figures.

    Returns:
      The files that a reader wants.

    Raises:
      UserError: bad input; nothing has been overwritten.
    """
    experiment.need(settings, "pair_sets")
    return launch.run(settings, KIND, sweep(settings))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: ``python -m experiments.layerwise --help``."""
    experiment.main(presets(), run, arguments, __doc__, ("pair_set", "layers", "seed"))


if __name__ == "__main__":
    command_line.run(main)
