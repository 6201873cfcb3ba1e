"""The runs of an experiment on preference pairs: SFT and preference optimisation for every set and seed, then the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from entangle import distributed, losses, models, training
from entangle.training import RunFolder
from entangle.types import Params
from experiments import figures
from experiments.pairs import exports, programs, references, stages
from experiments.pairs.pair_config import PairConfig, identity, objective_identity
from experiments.pairs.pair_data import Checkpoint
from experiments.pairs.placement import FIRST_DEVICE, Placement

AfterRun = Callable[[Path, stages.PreferenceData, Params, Params], None]
"""Called once a set, for seed 0: the set's folder, its pairs, the parameters before and after preference optimisation."""


def trackers(settings: PairConfig) -> stages.TrackerFactory:
    """The mirror that the configuration asks for."""
    return training.WandbTracker if settings.track else lambda folder, config: training.NoTracker()


def open_folder(
    settings: PairConfig,
    kind: str,
    pairs: Mapping[str, stages.PreferenceData],
    reports: Mapping[str, Mapping[str, list[str]]],
) -> RunFolder:
    """Make or continue the experiment's folder, and say what became of the pairs.

    Args:
      settings: the configuration.
      kind: of experiment, part of the folder's identity.
      pairs: pair set -> both splits; their digest is part of the identity too.
      reports: pair set -> split -> lines, printed and kept in ``pairs.json``.

    Raises:
      UserError: the folder holds something else, or the same flags on other data.
    """
    digests = {name: stages.digest(*both.train[:2], *both.held_out[:2]) for name, both in pairs.items()}
    experiment = RunFolder(settings.out, {"kind": kind, **identity(settings), "pairs": digests})
    if distributed.is_writer() and not (settings.out / "pairs.json").exists():
        training.write_json(settings.out / "pairs.json", reports)
    say(reports)
    return experiment


def say(reports: Mapping[str, Mapping[str, list[str]]]) -> None:
    """Print what became of the pairs: pair set -> split -> lines.

    Example:
      >>> from experiments.pairs.pair_runs import say
      >>> say({"tweets": {"train": ["60 of 64 pairs encoded", "  too long: 4"]}})
      tweets, train: 60 of 64 pairs encoded
        too long: 4
    """
    for name, splits in reports.items() if distributed.is_writer() else ():
        for split, lines in splits.items():
            print(f"{name}, {split}: " + "\n".join(lines), flush=True)


def identities(
    settings: PairConfig, pair_set: str, both: stages.PreferenceData, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What tells a pair set's runs of a seed from others, their stages apart: of SFT, and of preference optimisation."""
    supervised = {"pair_set": pair_set, "seed": seed, "data": stages.digest(*both.train[:2])}
    return supervised, {
        **supervised,
        "held_out": stages.digest(*both.held_out[:2]),
        "objective": settings.objective,
        "objective_args": settings.objective_args,
        "pair_chain": settings.pair_chain,
        "pair_chain_args": settings.pair_chain_args,
        **objective_identity(settings),
    }


def run_all(
    settings: PairConfig,
    base: Checkpoint,
    pairs: Mapping[str, stages.PreferenceData],
    tracker: stages.TrackerFactory,
    after: AfterRun | None = None,
    *,
    sft_first: bool = True,
    place: Placement = FIRST_DEVICE,
) -> list[Path]:
    """Run or continue SFT and preference optimisation for every set and seed.

    Args:
      settings: the configuration.
      base: the policy, the parameters to start from, and the tokenizer.
      pairs: pair set -> both splits.
      tracker: makes the mirror of a run.
      after: what else is to be made from the models of seed 0.
      sft_first: SFT before; without it ``base`` itself is start and reference of preference optimisation.
      place: where everything lies.

    Returns:
      Folders of what was trained on a checkpoint: adapters, or a checkpoint again. Of several processes, process 0 alone
      leaves any.

    Raises:
      UserError: a folder holds another run, or the reference cache another reference's log-probabilities.
      NonFiniteError: see ``training.train``.
    """
    sft = programs.likelihood_program(base.model, settings.sft, place, base.frozen)
    objective = losses.get_objective(settings.objective, **settings.objective_args)
    preference = programs.preference_program(
        base.model,
        settings.preference,
        objective,
        training.pair_chain(settings.pair_chain, **settings.pair_chain_args),
        changes=settings.changes,
        eval_batch=settings.eval_batch,
        place=place,
        frozen=base.frozen,
    )
    lora = base.model.config.lora
    on = {"frozen": models.checksum(base.frozen), "lora": dataclasses.asdict(lora)} if lora else {}
    left: list[Path] = []
    for pair_set, both in pairs.items():
        for seed in range(settings.seeds):
            folder = settings.out / pair_set / f"seed{seed}"
            supervised, preferred = ({**one, **on} for one in identities(settings, pair_set, both, seed))
            start = base.params
            if sft_first:
                start = stages.supervise(folder / "sft", base.model, sft, start, both.train, supervised, tracker)
            end = stages.prefer(
                folder / "preference",
                preference,
                start,
                both,
                preferred,
                tracker,
                probe_pairs=settings.probe_pairs,
                cache=references.find(
                    settings, base._replace(params=start), pair_set, both, seed if sft_first else None
                ),
            )
            if distributed.is_writer() and (trained := exports.leave_trained(folder, base, end)) is not None:
                left.append(trained)
            if seed == 0 and after is not None:
                after(folder, both, start, end)
    return left


def write_up(experiment: RunFolder) -> list[Path]:
    """Draw the figures, write the report, mark the experiment as done; of several processes, process 0 alone.

    Args:
      experiment: its folder, all runs finished.

    Returns:
      The files that a reader wants: figures and report, see ``figures.redraw``.
    """

    def write() -> list[str]:
        files = figures.redraw(experiment.path)
        if not experiment.done:
            experiment.mark_done({"files": [str(f.relative_to(experiment.path)) for f in files]})
        return [str(file) for file in files]

    return [Path(file) for file in distributed.from_writer(write)]
