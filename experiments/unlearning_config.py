"""The unlearning experiment's configuration as data: its variants, its flags and its presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import optax

from entangle import transforms
from entangle.training import OptimizerConfig, StageConfig
from experiments.pairs.sentiment_config import TWEETS, SentimentConfig
from experiments.pairs.sentiment_config import presets as sentiment_presets

OPTIMIZERS: Mapping[str, str] = MappingProxyType(
    {"sgd": "SGD", "adam": "Adam", "adam_b1_0": "Adam without momentum (b1 = 0)"}
)
"""Key of an optimizer -> what it is called."""

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "plain": "forget alone",
        "difference": "gradient difference",
        "project": "projection",
        "project_memory": "projection, memory",
        "joint": "projection, memory, joint",
        "metric": "projection, memory, Adam's metric",
        "invariant": "invariant update, memory",
    }
)
"""Key of a method -> what it is called."""


class Variant(NamedTuple):
    """How one run forgets.

    Attributes:
      optimizer: key of ``OPTIMIZERS``.
      method: key of ``METHODS``.
      rate: learning rate for the embedded data.
    """

    optimizer: str
    method: str
    rate: float

    @property
    def name(self) -> str:
        """Folder name, and what flags call it."""
        return f"{self.optimizer}-{self.method}"

    @property
    def remembers(self) -> bool:
        """Whether --memory is its."""
        return self.method in ("project_memory", "joint", "metric", "invariant")

    def transform(self, stage: StageConfig, memory: int) -> optax.GradientTransformation:
        """The whole optax chain.

        Args:
          stage: how many steps, with the optimizer that ``with_optimizer`` gave it.
          memory: earlier retained gradients that the projections with memory keep.
        """
        forget = transforms.combine_pair(transforms.fixed(chosen=0.0))
        heads = {
            "difference": lambda: transforms.combine_pair(transforms.margin()),
            "project": lambda: transforms.project_retain(memory=0),
            "project_memory": lambda: transforms.project_retain(memory),
            "joint": lambda: transforms.project_retain(memory, retain_weight=1.0),
            "metric": lambda: transforms.project_retain(memory, metric=transforms.AdamMetric()),
        }
        head = heads[self.method]() if self.method in heads else forget
        if self.optimizer == "adam_b1_0":
            chain = optax.chain(head, optax.adam(stage.optimizer.schedule(stage.steps), b1=0.0))
        else:
            chain = stage.optimizer.build(stage.steps, head)
        return transforms.retain_invariant(chain, memory) if self.method == "invariant" else chain


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        variant.name: variant
        for variant in (
            Variant("sgd", "plain", 2.9e-4),
            Variant("sgd", "difference", 0.01),
            Variant("sgd", "project", 4.5e-4),
            Variant("sgd", "project_memory", 1.0e-3),
            Variant("sgd", "joint", 7.5e-3),
            Variant("adam", "plain", 4.3e-5),
            Variant("adam", "difference", 8.5e-4),
            Variant("adam", "project", 5.8e-5),
            Variant("adam", "project_memory", 1.05e-4),
            Variant("adam", "metric", 8.8e-5),
            Variant("adam", "invariant", 1.95e-4),
            Variant("adam_b1_0", "plain", 3.6e-5),
            Variant("adam_b1_0", "metric", 9e-5),
        )
    }
)
"""Every variant by name; the rates were chosen so that each forgets about as much on the embedded data, see the module's
header."""

NOT_SET_HERE = (
    *("pair_chain", "pair_chain_args", "changes", "reference_cache"),
    *(f"preference.optimizer.{name}" for name in ("name", "learning_rate", "weight_decay", "clip_norm")),
)
"""Flags of other experiments that this one sets itself."""


@dataclasses.dataclass(frozen=True)
class UnlearningConfig(SentimentConfig):
    """Forgetting the rejected responses while the chosen ones are kept.

    Attributes:
      out: folder of the experiment; made, or continued when it holds the same configuration.
      preset: default or smoke: the defaults that the other flags override.
      data: "embedded", a folder in TweetEval's layout, or a preference file (.jsonl or .jsonl.gz; name --model, too).
      held_out: a second preference file to evaluate on; without it every eighth prompt of --data is held out.
      sets: one pair set: tweets (whole tweets of the second label are kept, of the first forgotten), or one of the sentiment
        experiment's.
      objective: its chosen side is kept, its rejected side forgotten: npo or ascent of
        experiments.unlearning_objectives, or any other.
      sft: supervised training on chosen and rejected completions alike, so that the model knows both.
      preference: forgetting; its optimizer's name and rate are the variants'.
      variants: those to run, by name.
      memory: earlier retained gradients that the projections with memory keep.
      rates: learning rate of a variant by name, in the place of the built-in one.
      rate_scale: factor on all built-in rates.
    """

    out: Path = Path("runs/unlearning")
    held_out: str = ""
    objective: str = "experiments.unlearning_objectives:npo"
    sets: tuple[str, ...] = (TWEETS,)
    variants: tuple[str, ...] = tuple(VARIANTS)
    memory: int = 8
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    rate_scale: float = 1.0

    @property
    def from_file(self) -> bool:
        """Whether the pairs are those of a preference file."""
        return self.data.endswith((".jsonl", ".jsonl.gz"))

    def rate(self, variant: Variant) -> float:
        """The learning rate of a variant."""
        return self.rates.get(variant.name, self.rate_scale * variant.rate)

    def stage(self, variant: Variant) -> StageConfig:
        """The forget stage of a variant."""
        name = "sgd" if variant.optimizer == "sgd" else "adamw"
        moved = dataclasses.replace(self.preference.optimizer, name=name, learning_rate=self.rate(variant))
        return dataclasses.replace(self.preference, optimizer=moved)


def presets() -> dict[str, UnlearningConfig]:
    """The named defaults: ``default`` for the embedded data, and ``smoke``, which takes a minute.

    Example:
      >>> from experiments.unlearning_config import presets
      >>> list(presets()), len(presets()["default"].variants)
      (['default', 'smoke'], 13)
    """
    embedded = sentiment_presets()["embedded"]
    default = UnlearningConfig(
        model=embedded.model,
        vocab_size=embedded.vocab_size,
        max_length=40,
        probe_pairs=0,
        base=dataclasses.replace(embedded.base, steps=400, checkpoint_every=400),
        sft=StageConfig(100, 32, OptimizerConfig(learning_rate=1e-3), checkpoint_every=100),
        preference=StageConfig(
            60, 16, OptimizerConfig(warmup_fraction=0.0, final_fraction=1.0), eval_every=5, checkpoint_every=60
        ),
    )
    smoke = dataclasses.replace(
        default,
        preset="smoke",
        seeds=1,
        train_pairs=512,
        held_out_pairs=32,
        base=dataclasses.replace(default.base, steps=40, checkpoint_every=40),
        sft=dataclasses.replace(default.sft, steps=30, checkpoint_every=30),
        preference=dataclasses.replace(default.preference, steps=12, eval_every=4, checkpoint_every=6),
        variants=("sgd-plain", "sgd-project", "adam-plain", "adam-invariant"),
    )
    return {preset.preset: preset for preset in (default, smoke)}
