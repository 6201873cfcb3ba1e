"""What one trial of a sweep over objectives, remedies, models or pair sets is configured by."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import tyro

from experiments.pairs.pair_config import identity
from experiments.pairs.sentiment_config import TWEETS, CorpusSettings
from experiments.sweep.trials import fingerprint


@dataclasses.dataclass(frozen=True)
class TrialConfig(CorpusSettings):
    """One run: a base model, SFT on the chosen responses, preference optimisation.

    Attributes:
      data: "embedded" (the package's grammar), a folder in TweetEval's layout, "sentiment140" (through TFDS), or a
        preference file (.jsonl or .jsonl.gz).
      pair_set: single_token, short_suffix, long_suffix, tweets (whole tweets of either label) or spliced (the same, with last
        words in common); a preference file has its own pairs.
      held_out: a second preference file to evaluate on; without it every eighth prompt is held out.
      sft_first: whether SFT on the chosen responses comes before; else the base model is start and reference.
      seed: order of the SFT and preference batches.
      masks: tokens of a response that are left out in training: none; oracle, those that both responses have at one place;
        learned, what sparse masks leave out that are trained with the policy by DPO (the paper's second remedy).
      sparsity: weight of the L1 term on learned masks, a token.
      layers: whether evaluations also tell the geometry of every layer.
    """

    model: str = "tiny"
    pair_set: str = TWEETS
    held_out: str = ""
    sft_first: Annotated[bool, tyro.conf.FlagCreatePairsOff] = True
    seed: int = 0
    masks: str = "none"
    sparsity: float = 1e-3
    layers: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    @property
    def from_file(self) -> bool:
        """Whether the pairs come from a preference file."""
        return self.data.endswith((".jsonl", ".jsonl.gz"))


STARTS = "starts"
"""Folder of a sweep that holds the base and SFT models."""
BASE = ("data", "held_out", "labels", "label_words", "model", "vocab_size", "max_length", "base")
"""What a base model depends on; of a preference file the number of training pairs, too."""
SFT = ("pair_set", "train_pairs", "held_out_pairs", "sft", "sft_first", "seed")
"""What an SFT model depends on besides."""


def base_fingerprint(config: TrialConfig) -> str:
    """Trials with the same one start from the same base model.

    Example:
      >>> import dataclasses
      >>> from experiments.sweep.trial_config import TrialConfig, base_fingerprint
      >>> base_fingerprint(TrialConfig()) == base_fingerprint(TrialConfig(seed=1, objective="ipo"))
      True
    """
    return fingerprint(_part(config, (*BASE, "train_pairs") if config.from_file else BASE))


def data_fingerprint(config: TrialConfig) -> str:
    """Trials with the same one have the same pairs and base model, and the same head."""
    return fingerprint(_part(config, (*BASE, "pair_set", "train_pairs", "held_out_pairs", "head_chunk")))


def start_fingerprint(config: TrialConfig) -> str:
    """Trials with the same one start from the same model, which is their reference."""
    return fingerprint(_part(config, (*BASE, *SFT)))


def _part(config: TrialConfig, names: tuple[str, ...]) -> dict[str, Any]:
    whole = identity(config)
    return {name: whole[name] for name in names}
