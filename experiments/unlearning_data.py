"""What the unlearning experiment is made from: sentiment pairs, or those of a preference file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from entangle import models
from entangle.data import PAIR_SETS, EncodedPairs
from entangle.errors import UserError
from entangle.types import Params
from experiments import preferences
from experiments.pairs import sentiment_data, stages
from experiments.pairs.base_models import base_model
from experiments.pairs.pair_config import PairConfig
from experiments.pairs.pair_data import Checkpoint
from experiments.pairs.sentiment_config import TWEETS
from experiments.unlearning_config import VARIANTS, UnlearningConfig


class Materials(NamedTuple):
    """What the runs are made from.

    Attributes:
      model: the policy.
      base: makes the parameters to start from; it pretrains the base model where there is no checkpoint.
      name: of the pair set.
      pairs: both splits, encoded.
      report: split -> lines that tell what became of its pairs.
    """

    model: models.LanguageModel
    base: Callable[[stages.TrackerFactory], Params]
    name: str
    pairs: stages.PreferenceData
    report: dict[str, list[str]]


def gather(settings: UnlearningConfig) -> Materials:
    """Read, check and encode everything that a wrong flag or file can spoil, before anything is written.

    Raises:
      UserError: bad input.
    """
    _check(settings)
    if settings.from_file:
        return _from_file(settings)
    found = sentiment_data.gather(settings, (*PAIR_SETS, TWEETS))

    def base(tracker: stages.TrackerFactory) -> Params:
        return base_model(settings.out / "base", settings.base, settings.max_length, found, tracker)

    (name,) = settings.sets
    return Materials(found.model, base, name, found.pairs[name], found.report[name])


def both_sides(pairs: EncodedPairs) -> EncodedPairs:
    """Twice as many pairs, the second half with its sides exchanged: what supervision on the chosen side then sees is both.

    Example:
      >>> import numpy as np
      >>> from entangle.data import EncodedPairs
      >>> from experiments.unlearning_data import both_sides
      >>> tokens = np.array([[[1], [2]]], np.int32)
      >>> both_sides(EncodedPairs(tokens, tokens > 0, ["x"])).tokens[:, 0].tolist()
      [[1], [2]]
    """
    tokens, mask = (np.concatenate([x, x[:, ::-1]]) for x in (pairs.tokens, pairs.completion_mask))
    return EncodedPairs(tokens, mask, [*pairs.sources, *pairs.sources])


def _check(settings: UnlearningConfig) -> None:
    for what, names in (("--variants", settings.variants), ("--rates", settings.rates)):
        if unknown := [name for name in names if name not in VARIANTS]:
            raise UserError(f"{what} {unknown[0]}: no such variant; choose from {', '.join(VARIANTS)}")
    if not settings.variants:
        raise UserError("--variants: at least one is needed")
    if len(set(settings.variants)) < len(settings.variants):
        raise UserError("--variants: one is named twice")
    if idle := [name for name in settings.rates if name not in settings.variants]:
        raise UserError(f"--rates {idle[0]} has no effect: it is none of --variants")
    if settings.memory < 0:
        raise UserError(f"--memory {settings.memory}: 0 or more are needed")
    rates = {f"--rates {name}": rate for name, rate in settings.rates.items()}
    for name, value in {"--rate-scale": settings.rate_scale, **rates}.items():
        if not (np.isfinite(value) and value > 0):
            raise UserError(f"{name} {value}: it must be positive")
    if len(settings.sets) != 1:
        raise UserError("--sets: one pair set is needed")


def _from_file(settings: UnlearningConfig) -> Materials:
    if settings.model in models.PRESETS:
        raise UserError(f"--data {settings.data}: name a Hugging Face checkpoint folder with --model")
    shared = {field.name: getattr(settings, field.name) for field in dataclasses.fields(PairConfig)}
    own = {"data": settings.data, "held_out": settings.held_out, "model": settings.model}
    found = preferences.gather(preferences.PreferencesConfig(**(shared | own)))
    checkpoint: Checkpoint = found.checkpoint
    return Materials(
        checkpoint.model, lambda tracker: checkpoint.params, preferences.PAIR_SET, found.pairs, found.report
    )
