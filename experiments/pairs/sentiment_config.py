"""The sentiment experiment's configuration as data, and its presets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from entangle.data import LABELS, PAIR_SETS
from entangle.training import OptimizerConfig, StageConfig
from experiments.pairs.pair_config import PairConfig, PairSettings

TWEETS = "tweets"
"""The pair set of whole tweets: one with the second label is chosen, one with the first rejected."""
SPLICED = "spliced"
"""The same, but every rejected tweet ends with words of the chosen one, as many as its place says: from none to most."""


@dataclasses.dataclass(frozen=True)
class CorpusSettings(PairSettings):
    """Runs on pairs that are made from labelled texts, and a base model that may be pretrained on the corpus.

    Attributes:
      data: "embedded" (the package's grammar), a folder in TweetEval's layout, or "sentiment140" (through TFDS).
      labels: the two labels that are contrasted, by name; both equally often.
      label_words: what the responses say for the two labels; by default their names.
      model: tiny, mini, small or gpt2, pretrained here first, or a local Hugging Face checkpoint folder.
      vocab_size: tokens of the BPE trained on the corpus (a checkpoint brings its own).
      base: pretraining of the base model.
    """

    data: str = "embedded"
    labels: tuple[str, str] = LABELS
    label_words: tuple[str, str] | None = None
    model: str = "small"
    vocab_size: int = 4096
    base: StageConfig = StageConfig(1500, 32, OptimizerConfig(learning_rate=1e-3), checkpoint_every=100)


@dataclasses.dataclass(frozen=True)
class SentimentConfig(CorpusSettings, PairConfig):
    """The sentiment experiment.

    Attributes:
      out: folder of the experiment; made, or continued when it holds the same configuration.
      preset: default, embedded, smoke or paper: the defaults that the other flags override.
      sets: pair sets, in the figures' order.
    """

    out: Path = Path("runs/sentiment")
    sets: tuple[str, ...] = tuple(PAIR_SETS)


def presets() -> dict[str, SentimentConfig]:
    """The named defaults.

    ``default`` is for real tweets, ``embedded`` is the same line at the embedded data's scale, ``smoke`` takes a minute,
    ``paper`` is GPT-2 small with the learning rates and batch sizes of arXiv 2410.13828, section 4.3, for an accelerator;
    its one epoch is 250 steps for 8,000 pairs.

    Example:
      >>> from experiments.pairs.sentiment_config import presets
      >>> list(presets())
      ['default', 'embedded', 'smoke', 'paper']
    """
    default = SentimentConfig()
    embedded = dataclasses.replace(
        default,
        preset="embedded",
        model="tiny",
        vocab_size=1024,
        max_length=48,
        base=StageConfig(1500, 32, OptimizerConfig(learning_rate=3e-3), checkpoint_every=250),
        sft=StageConfig(60, 32, OptimizerConfig(learning_rate=3e-3), checkpoint_every=60),
        preference=StageConfig(120, 16, OptimizerConfig(learning_rate=5e-5), eval_every=10, checkpoint_every=60),
    )
    smoke = dataclasses.replace(
        embedded,
        preset="smoke",
        seeds=1,
        train_pairs=512,
        held_out_pairs=32,
        base=dataclasses.replace(embedded.base, steps=60, checkpoint_every=60),
        sft=dataclasses.replace(embedded.sft, steps=40, checkpoint_every=40),
        preference=dataclasses.replace(embedded.preference, steps=30, checkpoint_every=15),
    )
    paper = dataclasses.replace(
        default,
        preset="paper",
        model="gpt2",
        max_length=128,
        train_pairs=1_000_000,
        held_out_pairs=512,
        base=StageConfig(
            20_000, 64, OptimizerConfig(learning_rate=6e-4, weight_decay=0.1, clip_norm=1.0), checkpoint_every=500
        ),
        sft=StageConfig(64, 16, OptimizerConfig(learning_rate=1.41e-5), checkpoint_every=64),
        preference=StageConfig(250, 32, OptimizerConfig(learning_rate=5e-6), eval_every=10, checkpoint_every=50),
    )
    return {preset.preset: preset for preset in (default, embedded, smoke, paper)}


def config() -> SentimentConfig:
    """The default configuration.

    Example:
      >>> from experiments.pairs.sentiment_config import config
      >>> config().objective
      'dpo'
    """
    return presets()["default"]
