"""What every experiment on preference pairs is configured by."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Annotated, Any

import tyro

from entangle import losses
from entangle.training import OptimizerConfig, StageConfig

NOT_EVALUATED = (("base.eval_every", "sft.eval_every"), "only preference optimisation is evaluated")
"""Flags that every stage has and that change nothing, and why; for ``command_line.refuse_unused``."""


@dataclasses.dataclass(frozen=True)
class PairSettings:
    """SFT and preference optimisation on pairs: what makes a run the run that it is.

    Attributes:
      objective: margin objective: a name of entangle/losses/README.md (dpo, ipo, simpo, kto, ...), or module:function for
        your own.
      objective_args: hyperparameters of the objective by name, e.g. beta 0.2.
      pair_chain: how the two gradients are combined: a name of entangle/transforms/README.md (margin, normalized, pcgrad,
        band, ...) for the two batch gradients, or one with pairwise_ before it, for every pair by itself; or
        protect_chosen (whatever the optimizer makes of plain margin, the chosen batch sum does not fall to first order),
        project_retain or retain_invariant (forget the rejected responses, without a step towards the chosen ones, and keep
        these as they are).
      pair_chain_args: settings of the combination by name, e.g. c 0.4 for cagrad.
      max_length: T, tokens of a row.
      train_pairs: at most so many training pairs; of whole tweets (pair sets tweets, spliced) texts, two a pair.
      held_out_pairs: at most so many held-out pairs, counted likewise; all are evaluated.
      probe_pairs: held-out pairs on which first-order and realised changes are compared at every step; 0 for none.
      changes: whether the same is done on the batch's own pairs, beside the prediction from the geometry; it makes a step
        about twice as long.
      eval_batch: pairs at a time in scores and evaluations; less takes less memory.
      head_chunk: entries of the vocabulary that the head multiplies at a time; less takes less memory. A vocabulary larger
        than this meets the positions in front of completion tokens alone; one up to this is multiplied at once.
      sft: supervised fine-tuning on the chosen completions.
      preference: preference optimisation.
      data_dir: where TFDS keeps the prepared pair sets; by default its own folder.
    """

    objective: str = "dpo"
    objective_args: dict[str, float] = dataclasses.field(default_factory=dict)
    pair_chain: str = "margin"
    pair_chain_args: dict[str, float] = dataclasses.field(default_factory=dict)
    max_length: int = 64
    train_pairs: int = 8192
    held_out_pairs: int = 128
    probe_pairs: int = 16
    changes: Annotated[bool, tyro.conf.FlagCreatePairsOff] = True
    eval_batch: int = 8
    head_chunk: int = 8192
    sft: StageConfig = StageConfig(100, 32, OptimizerConfig(learning_rate=1e-3), checkpoint_every=100)
    preference: StageConfig = StageConfig(
        120, 32, OptimizerConfig(learning_rate=2e-5), eval_every=20, checkpoint_every=40
    )
    data_dir: Path | None = None


@dataclasses.dataclass(frozen=True)
class PairConfig(PairSettings):
    """An experiment on preference pairs: where it writes, and one run for every seed.

    Attributes:
      out: folder of the experiment; made, or continued when it holds the same configuration.
      preset: the defaults that the other flags override.
      seeds: number of seeds: order of the SFT and preference batches.
      reference_cache: folder in which the reference's log-probabilities are kept and found again, one file for every pair
        set (and seed, where SFT comes first) and --eval-batch; a file of another model, tokenizer, data or length is
        refused.
      track: whether the runs are mirrored in W&B: offline, or online when a key is configured.
    """

    out: Path = Path("runs/pairs")
    preset: str = "default"
    seeds: int = 3
    reference_cache: Path | None = None
    track: Annotated[bool, tyro.conf.FlagCreatePairsOff] = True


def identity(settings: PairSettings) -> dict[str, Any]:
    """What makes two runs of an experiment the same: everything but where it reads and writes, and what it mirrors.

    Example:
      >>> from experiments.pairs.pair_config import PairConfig, identity
      >>> sorted(set(vars(PairConfig())) - set(identity(PairConfig())))
      ['data_dir', 'out', 'reference_cache', 'track']
    """
    left_out = ("out", "reference_cache", "data_dir", "track", "mesh")
    return {k: v for k, v in dataclasses.asdict(settings).items() if k not in left_out} | objective_identity(settings)


def objective_identity(settings: PairSettings) -> dict[str, Any]:
    """What the objective's name does not say: of one of your own, a digest of the module that it comes from.

    Example:
      >>> from experiments.pairs.pair_config import PairConfig, objective_identity
      >>> objective_identity(PairConfig()), list(objective_identity(PairConfig(objective="entangle.losses.logistic:dpo")))
      ({}, ['objective_source'])
    """
    source = losses.objective_source(settings.objective)
    return {} if source is None else {"objective_source": hashlib.sha256(source.encode()).hexdigest()}
