"""Figures 3, 4a and 4b: a contrast of one token, alone or followed by identical tokens, under a margin objective.

Claim: the chosen log-probability rises only when the responses differ in their one token; identical tokens after it
entangle the two gradients, and the chosen log-probability falls, the more the longer the suffix (arXiv 2410.13828, 4.3).

Command: ``python -m experiments.sentiment --data FOLDER --out DIR`` (a folder in TweetEval's layout; default: embedded).
Hardware and time: two CPU cores, shared with other jobs: 25 minutes for the base model, then an hour for three seeds.
Result: experiments/results/sentiment_tweets/report.md (real tweets), experiments/results/sentiment_embedded/report.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax

from entangle import losses, models, training
from entangle.training import RunFolder
from entangle.types import Params
from experiments import command_line, figures, report, stages, token_heatmap
from experiments.sentiment_config import SentimentConfig, config, identity, presets
from experiments.sentiment_data import Materials, gather

__all__ = ["EXPORT", "SentimentConfig", "config", "gather", "main", "presets", "run"]

EXPORT = "huggingface"


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
    experiment = RunFolder(settings.out, {"kind": "sentiment", **identity(settings)})
    training.write_json(settings.out / "pairs.json", materials.report)
    for name, splits in materials.report.items():
        for split, lines in splits.items():
            print(f"{name}, {split}: " + "\n".join(lines))
    model, tracker = materials.model, trackers(settings)
    count = 1 + 2 * len(settings.sets) * settings.seeds
    print(f"at most {count} runs: the base model, then SFT and preference optimisation for every set and seed")
    base = materials.checkpoint if materials.checkpoint is not None else _base(settings, materials, tracker)
    sft = stages.likelihood_program(model, settings.sft)
    objective = losses.get_objective(settings.objective, **settings.objective_args)
    preference = stages.preference_program(model, settings.preference, objective, settings.pair_chain)
    for pair_set in settings.sets:
        pairs = materials.pairs[pair_set]
        for seed in range(settings.seeds):
            folder = settings.out / pair_set / f"seed{seed}"
            named = {"pair_set": pair_set, "seed": seed, "data": stages.digest(*pairs.train[:2])}
            start = stages.supervise(folder / "sft", model, sft, base, pairs.train, named, tracker)
            named |= {"objective": settings.objective, "objective_args": settings.objective_args}
            named |= {"pair_chain": settings.pair_chain, "held_out": stages.digest(*pairs.held_out[:2])}
            end = stages.prefer(
                folder / "preference", preference, start, pairs, named, tracker, probe_pairs=settings.probe_pairs
            )
            if seed == 0:
                token_heatmap.write(
                    folder,
                    model,
                    materials.tokenizer,
                    pairs.held_out,
                    {"after SFT": start, "after preference optimisation": end},
                )
    files = [*figures.draw(settings.out), report.write(settings.out)]
    if not experiment.done:
        experiment.mark_done({"files": [str(f.relative_to(settings.out)) for f in files]})
    return files


def trackers(settings: SentimentConfig) -> stages.TrackerFactory:
    """The mirror that the configuration asks for."""
    return training.WandbTracker if settings.track else lambda folder, config: training.NoTracker()


def _base(settings: SentimentConfig, materials: Materials, tracker: stages.TrackerFactory) -> Params:
    program = stages.likelihood_program(materials.model, settings.base)
    folder = settings.out / "base"
    params = stages.pretrain(folder, materials.model, program, materials.text, settings.max_length, 0, tracker)
    if not (folder / EXPORT).exists():  # so that another experiment can start from it with --model
        models.save_gpt2(folder / EXPORT, materials.model.config, params)
    if not (folder / EXPORT / "tokenizer.json").exists():
        materials.tokenizer.save(folder / EXPORT)
    return params


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: ``python -m experiments.sentiment --help``."""
    settings = command_line.parse(presets(), arguments, description=(__doc__ or "").split("\n")[0])
    if settings.model not in models.PRESETS:
        why = f"the base model is --model {settings.model}"
        command_line.refuse_unused(settings, presets()[settings.preset], ("base", "vocab_size"), why)
    print(f"devices: {', '.join(d.device_kind for d in jax.devices())}; output: {settings.out}")
    files = run(settings)
    print("\nwrote:")
    for file in files:
        print(f"  {file}")


if __name__ == "__main__":
    command_line.run(main)
