"""The theory study's configuration as data: how far its sweep goes, its flags and its presets."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from entangle import losses
from entangle.errors import UserError
from experiments.theorems.theory_measure import objective_of


@dataclasses.dataclass(frozen=True)
class TheoryConfig:
    """The study.

    Attributes:
      out: folder of the study; made, or left as it is when it holds the same one.
      preset: default or smoke: the defaults that the other flags override.
      seeds: draws of hidden states, heads, logits and tokens.
      tokens: M of Theorem 1: numbers of tokens that share all the probability.
      prefixes: of the corollary: numbers of tokens before the last one.
      overlaps: of the corollary: expected cosines of the hidden states of two positions.
      suffix: the longest suffix of the toy; all lengths from 0 to it are measured.
      gaps: of the toy: nats by which the suffix token's logit is lower in the rejected context; the toy itself, 1, is always
        measured.
      steps: sizes C of the step for its orders; everything else is measured at 1e-6.
      objectives: names, with hyperparameters as in cpo,nll_weight=0.02.
      fallen: nats by which the chosen log-probability has fallen below the reference's, for --objectives.
    """

    out: Path = Path("runs/theory")
    preset: str = "default"
    seeds: int = 100
    tokens: tuple[int, ...] = (2, 3, 4, 6, 8, 16, 32, 64, 128)
    prefixes: tuple[int, ...] = (1, 4, 16)
    overlaps: tuple[float, ...] = (0.0, 0.5, 0.9)
    suffix: int = 64
    gaps: tuple[float, ...] = (-3.0, -2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 6.0)
    steps: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    objectives: tuple[str, ...] = (
        *("dpo", "simpo", "ipo", "sppo", "dpop", "dpop,penalty=0.25", "cpo", "cpo,nll_weight=0.02"),
        *("slic_hf", "slic_hf,delta=50,nll_weight=0.25", "rrhf", "orpo"),
    )
    fallen: float = 0.1


def presets() -> dict[str, TheoryConfig]:
    """The named defaults: ``default``, and ``smoke``, which takes seconds.

    Example:
      >>> from experiments.theorems.theory_config import presets
      >>> presets()["smoke"].tokens
      (2, 8)
    """
    smoke = TheoryConfig(
        preset="smoke",
        seeds=4,
        tokens=(2, 8),
        prefixes=(4,),
        overlaps=(0.9,),
        suffix=10,
        gaps=(-1.0, 2.0),
        steps=(1e-3, 3e-3, 1.0),
        objectives=("dpo", "dpop", "cpo,nll_weight=0.02"),
    )
    return {preset.preset: preset for preset in (TheoryConfig(), smoke)}


def check(settings: TheoryConfig) -> None:
    """Refuse what cannot be measured, before anything is written.

    Raises:
      UserError: it cannot.

    Example:
      >>> import dataclasses
      >>> from experiments.theorems.theory_config import TheoryConfig, check
      >>> check(TheoryConfig(tokens=(1,)))
      Traceback (most recent call last):
      entangle.errors.UserError: --tokens 1: a number from 2 to 1024 is needed
    """
    counts = (
        ("seeds", (settings.seeds,), 1, 10_000),
        ("tokens", settings.tokens, 2, 1024),
        ("prefixes", settings.prefixes, 1, 256),
        ("suffix", (settings.suffix,), 0, 256),
    )
    for flag, values, least, most in counts:
        for value in values:
            if not least <= value <= most:
                raise UserError(f"--{flag} {value}: a number from {least} to {most} is needed")
    for overlap in settings.overlaps:
        if not 0 <= overlap <= 1:
            raise UserError(f"--overlaps {overlap:g}: a cosine from 0 to 1 is needed")
    for step in settings.steps:
        if not 1e-5 < step <= 100:
            raise UserError(f"--steps {step:g}: a size above 1e-05 and at most 100 is needed")
    for flag, number in (*(("gaps", gap) for gap in settings.gaps), ("fallen", settings.fallen)):
        if not abs(number) <= 100:
            raise UserError(f"--{flag} {number:g}: a number of nats from -100 to 100 is needed")
    for flag in ("tokens", "prefixes", "overlaps", "gaps", "steps", "objectives"):
        if not getattr(settings, flag):
            raise UserError(f"--{flag}: name at least one")
    for words in settings.objectives:
        objective_of(words)


def identity(settings: TheoryConfig) -> dict[str, Any]:
    """What makes two studies the same: everything but where they are written.

    Example:
      >>> from experiments.theorems.theory_config import TheoryConfig, identity
      >>> sorted(set(vars(TheoryConfig())) ^ set(identity(TheoryConfig())))
      ['objective_sources', 'out']
    """
    names = [words.split(",")[0] for words in settings.objectives]
    sources = {name: source for name in names if (source := losses.objective_source(name)) is not None}
    digests = {name: hashlib.sha256(source.encode()).hexdigest() for name, source in sources.items()}
    fields = {k: v for k, v in dataclasses.asdict(settings).items() if k != "out"}
    return {**fields, "objective_sources": digests}
