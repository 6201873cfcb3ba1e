"""Figures 1 and 2: how chosen and rejected log-probabilities move under every margin objective, and why.

Claim: under DPO both log-probabilities move together, step by step, and end on the same side of their start; objectives that
weigh the chosen response more (CPO, DPOP, RRHF, SLiC-HF) and SPPO soften its fall, in line with d_w / d_l (arXiv 2410.13828,
Figures 1 and 2).

Command: ``python -m experiments.margin_objectives --out DIR``; ``--preset tweets --trial.data FOLDER`` (TweetEval's layout),
``--preset hh-rlhf --trial.data FILE.jsonl``; ``--preset paper --trial.data TLDR.jsonl --trial.model CHECKPOINT``.
Hardware and time: two CPU cores, under seven minutes. The presets for real data pretrain a larger model; not timed.
Result: experiments/results/margin_objectives/report.md (three seeds): both fall under DPO, every pair in the ideal case;
CPO, DPOP, RRHF and SLiC-HF raise the chosen one (+0.05 to +0.14 nats against -0.29), in line with d_w / d_l; SPPO does not.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path

from entangle import command_line, losses
from entangle.errors import UserError
from entangle.training import OptimizerConfig, StageConfig
from experiments.sweep import Overrides, experiment, launch, product
from experiments.sweep.experiment import LAPTOP
from experiments.sweep.settings import SweepConfig
from experiments.sweep.trial_config import TrialConfig

KIND = "margin_objectives"


@dataclasses.dataclass(frozen=True)
class MarginObjectivesConfig(SweepConfig):
    """The sweep over margin objectives.

    Attributes:
      objectives: by name; the paper's ten by default.
      betas: values of beta, for the objectives that have one; without any, each has its default.
      learning_rates: of the preference stage; without any, that of --trial.
    """

    out: Path = Path("runs/margin_objectives")
    objectives: tuple[str, ...] = losses.PAPER_OBJECTIVES
    betas: tuple[float, ...] = ()
    learning_rates: tuple[float, ...] = ()


def presets() -> dict[str, MarginObjectivesConfig]:
    """The named defaults.

    ``laptop`` is the package's grammar and a model of 170,000 parameters, for two cores; ``smoke`` sees that all is in place;
    ``tweets`` and ``hh-rlhf`` are for real data with a model that is pretrained on it here; ``paper`` has the numbers of
    arXiv 2410.13828, section 3: a checkpoint as it is, AdamW at 5e-6, 16 pairs a step, 2,048 held-out pairs, one epoch of the
    93,000 comparisons of TL;DR. It trains all parameters, where the paper has LoRA, of checkpoints that the package reads;
    rows of 1,024 tokens are not the paper's word.

    Example:
      >>> from experiments.margin_objectives import presets
      >>> list(presets())
      ['laptop', 'smoke', 'tweets', 'hh-rlhf', 'paper']
    """
    laptop = MarginObjectivesConfig(trial=LAPTOP)
    found = experiment.presets(laptop, seeds=2, objectives=("dpo", "cpo", "slic_hf"))
    stage = StageConfig(5800, 16, OptimizerConfig(learning_rate=5e-6), eval_every=200, checkpoint_every=200)
    trial = TrialConfig(
        data="",
        model="",
        sft_first=False,
        max_length=1024,
        train_pairs=1_000_000,
        held_out_pairs=2048,
        changes=False,
        preference=stage,
    )
    return found | {"paper": MarginObjectivesConfig(preset="paper", trial=trial)}


def config() -> TrialConfig:
    """The trial that the default sweep's overrides change.

    Example:
      >>> from experiments.margin_objectives import config
      >>> config().data
      'embedded'
    """
    return presets()["laptop"].trial


def sweep(settings: MarginObjectivesConfig | None = None) -> Iterator[Overrides]:
    """Objective by beta by learning rate by seed.

    Args:
      settings: the default sweep's by default.

    Example:
      >>> from experiments.margin_objectives import sweep
      >>> len(list(sweep())), next(sweep())
      (30, {'objective': 'dpo', 'seed': 0})
    """
    settings = settings or presets()["laptop"]
    rates = {"preference.optimizer.learning_rate": settings.learning_rates} if settings.learning_rates else {}
    for objective in settings.objectives:
        betas = {"objective_args.beta": settings.betas} if settings.betas and _has_beta(objective) else {}
        yield from product({"objective": [objective]}, betas, rates, {"seed": range(settings.seeds)})


def _has_beta(objective: str) -> bool:
    return "beta" in inspect.signature(losses.get_objective(objective)).parameters


def run(settings: MarginObjectivesConfig) -> list[Path]:
    """Run or continue the sweep, and draw its figures.

    Returns:
      The files that a reader wants.

    Raises:
      UserError: bad input; nothing has been overwritten.
    """
    experiment.need(settings, "objectives")
    if settings.betas and not any(map(_has_beta, settings.objectives)):
        raise UserError(
            f"--betas {' '.join(map(str, settings.betas))} has no effect: none of --objectives takes a beta"
        )
    return launch.run(settings, KIND, sweep(settings))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: ``python -m experiments.margin_objectives --help``."""
    swept = {"learning_rates": "preference.optimizer.learning_rate"}
    experiment.main(presets(), run, arguments, __doc__, ("objective", "seed"), swept)


if __name__ == "__main__":
    command_line.run(main)
