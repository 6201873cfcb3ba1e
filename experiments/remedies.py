"""The paper's remedy and its successors over a whole training, under SGD and under AdamW.

Claim: pairwise normalised gradients, rules that protect the chosen side alone, masks that leave out tokens (learned ones, and
the oracle's, which know what both responses share), and DPOP and CPO, which weigh the chosen response in the loss itself, end
with a higher chosen log-probability than plain margin (arXiv 2410.13828, section 5 and Figure 2). What the rules promise is
about a plain gradient step, so it may be lost under AdamW.

Under SGD a rule whose step has a length of its own needs a rate of its own, and so do objectives of another size: CPO's
likelihood weighs some twenty times what DPO's coefficients do, DPOP's penalty fifty times. --sgd-factors are on the others'
rate, from short runs: for the rules so that the held-out margin grows about as far, for the objectives so that the run is
stable. Pairs are those of ``long_suffix``, after SFT as in the sentiment experiment: there DPO lowers both sides.

Command: ``python -m experiments.remedies --out DIR``; ``--preset tweets --trial.data FOLDER`` (TweetEval's layout),
``--preset hh-rlhf --trial.data FILE.jsonl``; ``--objectives dpo simpo ipo`` for more objectives.
Hardware and time: 14 minutes on two CPU cores (AMD EPYC).
Result: experiments/results/remedies/report.md (three seeds): pairwise_normalized and one_sided end above plain margin in
every seed under either optimizer, protect_chosen under AdamW alone. Of the steps that do not lower a probe's chosen side both
gain more over plain margin under AdamW, where that lowers it oftener. Masks change next to nothing: the shared tokens'
gradients are long, but all but the same on both sides, so that the margin's gradient has little of them. No rule keeps the
probe from falling at every step in every seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType

from entangle import command_line, losses
from entangle.errors import UserError
from entangle.training import OptimizerConfig
from experiments.sweep import Overrides, experiment, launch, product, zipped
from experiments.sweep.experiment import LAPTOP
from experiments.sweep.settings import SweepConfig
from experiments.sweep.trial_config import TrialConfig

KIND = "remedies"
OPTIMIZER = "preference.optimizer"
SWEPT = ("objective", "pair_chain", "masks", f"{OPTIMIZER}.name", f"{OPTIMIZER}.learning_rate", "seed")

SGD_FACTORS = MappingProxyType({"normalized": 1 / 3, "pairwise_normalized": 15.0, "dpop": 0.01, "cpo": 0.05})
"""Method -> what its learning rate under SGD is over that of the others; from short runs, see above."""


@dataclasses.dataclass(frozen=True)
class RemediesConfig(SweepConfig):
    """The sweep over remedies.

    Attributes:
      chains: how the two gradients are combined, as --pair-chain takes them; margin is what the others are held against.
      objectives: each by every chain; simpo and ipo are worth a look, too.
      masks: oracle, learned: tokens that are left out, by plain margin alone; learned ones by dpo alone, which trains them.
      beside: objectives by plain margin alone.
      optimizers: sgd, adamw.
      learning_rates: one an optimizer.
      sgd_factors: chain, masks, or objective beside -> what its learning rate under SGD is over that of the others, in the
        place of SGD_FACTORS.
    """

    out: Path = Path("runs/remedies")
    chains: tuple[str, ...] = (
        *("margin", "normalized", "pairwise_normalized", "pairwise_band"),
        *("pcgrad", "one_sided", "protect_chosen"),
    )
    objectives: tuple[str, ...] = ("dpo",)
    masks: tuple[str, ...] = ("oracle", "learned")
    beside: tuple[str, ...] = ("dpop", "cpo")
    optimizers: tuple[str, ...] = ("sgd", "adamw")
    learning_rates: tuple[float, ...] = (0.05, 2e-4)
    sgd_factors: dict[str, float] = dataclasses.field(default_factory=dict)


def presets() -> dict[str, RemediesConfig]:
    """The named defaults, see ``experiment.presets``.

    Example:
      >>> from experiments.remedies import presets
      >>> presets()["laptop"].optimizers
      ('sgd', 'adamw')
    """
    stage = dataclasses.replace(LAPTOP.preference, steps=40, batch_size=8, eval_every=20, checkpoint_every=40)
    # SFT as in the sentiment experiment's ``embedded`` preset, after which plain DPO lowers the chosen side
    sft = dataclasses.replace(LAPTOP.sft, optimizer=OptimizerConfig(learning_rate=3e-3))
    trial = dataclasses.replace(LAPTOP, pair_set="long_suffix", held_out_pairs=64, sft=sft, preference=stage)
    smoke = {"seeds": 1, "masks": ("learned",), "beside": ("cpo",)}
    chains = ("margin", "pairwise_normalized", "one_sided")
    return experiment.presets(RemediesConfig(trial=trial), chains=chains, **smoke)


def config() -> TrialConfig:
    """The trial that the default sweep's overrides change.

    Example:
      >>> from experiments.remedies import config
      >>> config().pair_chain
      'margin'
    """
    return presets()["laptop"].trial


def sweep(settings: RemediesConfig | None = None) -> Iterator[Overrides]:
    """Objective by chain and by masks, and the objectives beside; by optimizer with its learning rate; by seed.

    Args:
      settings: the default sweep's by default.

    Raises:
      UserError: there are not as many learning rates as optimizers; masks would be learned by no objective; or a factor is
        of a method that the sweep does not have.

    Example:
      >>> from experiments.remedies import sweep
      >>> len(list(sweep())), list(next(sweep()).values())
      (66, ['dpo', 'margin', 'sgd', 0.05, 0])
    """
    settings = settings or presets()["laptop"]
    for name in (*settings.objectives, *settings.beside):
        losses.get_objective(name)  # a name that is none is told before what it lacks
    if len(settings.optimizers) != len(settings.learning_rates):
        counts = f"{len(settings.learning_rates)} for {len(settings.optimizers)}"
        raise UserError(f"--learning-rates: one is needed for every one of --optimizers, not {counts}")
    if "learned" in settings.masks and "dpo" not in settings.objectives:
        raise UserError("--masks learned: dpo trains them, and is not among --objectives")
    for name in settings.sgd_factors:
        if name not in (*settings.chains, *settings.masks, *settings.beside):
            raise UserError(f"--sgd-factors {name}: it is not among --chains, --masks or --beside")
    factors = {**SGD_FACTORS, **settings.sgd_factors}
    optimizers = list(
        zipped({f"{OPTIMIZER}.name": settings.optimizers, f"{OPTIMIZER}.learning_rate": settings.learning_rates})
    )
    methods = [
        *product({"objective": settings.objectives, "pair_chain": settings.chains}),
        *(
            method
            for method in product({"objective": settings.objectives, "pair_chain": ["margin"], "masks": settings.masks})
            if method["masks"] != "learned" or method["objective"] == "dpo"
        ),
        *product({"objective": settings.beside, "pair_chain": ["margin"]}),
    ]
    for method in methods:
        beside = method["objective"] not in settings.objectives
        name = method["objective"] if beside else method.get("masks", method["pair_chain"])
        factor = factors.get(name, 1.0)
        for optimizer in optimizers:
            rate = optimizer[f"{OPTIMIZER}.learning_rate"] * (factor if optimizer[f"{OPTIMIZER}.name"] == "sgd" else 1)
            yield from product(
                [method | optimizer | {f"{OPTIMIZER}.learning_rate": rate}], {"seed": range(settings.seeds)}
            )


def run(settings: RemediesConfig) -> list[Path]:
    """Run or continue the sweep, and draw its figures.

    Returns:
      The files that a reader wants.

    Raises:
      UserError: bad input; nothing has been overwritten.
    """
    experiment.need(settings, "chains", "objectives", "optimizers")
    return launch.run(settings, KIND, sweep(settings))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: ``python -m experiments.remedies --help``."""
    experiment.main(presets(), run, arguments, __doc__, SWEPT)


if __name__ == "__main__":
    command_line.run(main)
