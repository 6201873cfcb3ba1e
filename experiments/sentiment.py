"""Figures 3, 4a and 4b: a contrast of one token, alone or followed by identical tokens, under a margin objective.

Claim: the chosen log-probability rises only when the responses differ in their one token; identical tokens after it
entangle the two gradients, and the chosen log-probability falls, the more the longer the suffix (arXiv 2410.13828, 4.3).

Command: ``python -m experiments.sentiment --data FOLDER --out DIR`` (a folder in TweetEval's layout; default: embedded).
Hardware and time: two CPU cores, shared with other jobs: ten minutes for the base model, then forty for three seeds.
Result: experiments/results/sentiment_tweets/report.md (real tweets), experiments/results/sentiment_embedded/report.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from entangle import command_line, models
from entangle.types import Params
from experiments.pairs import pair_runs, stages
from experiments.pairs.base_models import base_model
from experiments.pairs.pair_config import NOT_EVALUATED
from experiments.pairs.pair_data import Checkpoint
from experiments.pairs.sentiment_config import SentimentConfig, config, presets
from experiments.pairs.sentiment_data import gather
from experiments.reports import token_heatmap

__all__ = ["SentimentConfig", "config", "gather", "main", "presets", "run"]


def run(settings: SentimentConfig) -> list[Path]:
    """Run or continue the whole experiment, and draw its figures.

    Args:
      settings: the configuration.

    Returns:
      The files that a reader wants: figures and report.

    Raises:
      UserError: bad input; nothing has been overwritten.
      NonFiniteError: see ``training.train``.
    """
    materials = gather(settings)
    experiment = pair_runs.open_folder(settings, "sentiment", materials.pairs, materials.report)
    tracker = pair_runs.trackers(settings)
    count = 1 + 2 * len(settings.sets) * settings.seeds
    print(f"at most {count} runs: the base model, then SFT and preference optimisation for every set and seed")
    base = base_model(settings.out / "base", settings.base, settings.max_length, materials, tracker)

    def heatmap(folder: Path, pairs: stages.PreferenceData, start: Params, end: Params) -> None:
        checkpoints = {"after SFT": start, "after preference optimisation": end}
        token_heatmap.write(folder, materials.model, materials.tokenizer, pairs.held_out, checkpoints)

    checkpoint = Checkpoint(materials.model, base, materials.tokenizer)
    pair_runs.run_all(settings, checkpoint, materials.pairs, tracker, heatmap)
    return pair_runs.write_up(experiment)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: ``python -m experiments.sentiment --help``."""
    settings = command_line.parse(presets(), arguments, description=(__doc__ or "").split("\n")[0])
    command_line.refuse_unused(settings, presets()[settings.preset], *NOT_EVALUATED)
    if settings.model not in models.PRESETS:
        why = f"the base model is --model {settings.model}"
        command_line.refuse_unused(settings, presets()[settings.preset], ("base", "vocab_size"), why)
    command_line.say_where(settings.out)
    command_line.name_files(run(settings))


if __name__ == "__main__":
    command_line.run(main)
