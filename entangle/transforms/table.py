"""The weightings by name, with what each promises; command lines, the reference page and the tests read it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from entangle.errors import UserError
from entangle.transforms import bands, bisectors, min_norm, surgery, weightings
from entangle.transforms.weightings import RunningWeighting, Weighting


class Promises(NamedTuple):
    """What a weighting keeps at every Gram, to first order, under a plain gradient step with positive coefficients.

    Attributes:
      chosen: the chosen batch sum does not fall.
      rejected: the rejected batch sum does not rise.
      margin: the batch's weighted margin does not fall, that is the loss does not rise.
      symmetric: exchanging the two sides exchanges the weights.
      degree: the step's degree in the gradients: 1 scales with them, 0 has a length of its own.
    """

    chosen: bool
    rejected: bool
    margin: bool
    symmetric: bool
    degree: int


class Entry(NamedTuple):
    """A weighting.

    Attributes:
      make: its factory; every argument has a default.
      promises: what it keeps.
    """

    make: Callable[..., Weighting | RunningWeighting]
    promises: Promises


_IDEAL = Promises(chosen=True, rejected=True, margin=True, symmetric=True, degree=1)
_MARGIN = _IDEAL._replace(chosen=False, rejected=False)
_NOTHING = _MARGIN._replace(margin=False)

WEIGHTINGS: Mapping[str, Entry] = MappingProxyType(
    {
        "margin": Entry(weightings.margin, _MARGIN),
        "fixed": Entry(weightings.fixed, _MARGIN),
        "normalized": Entry(bisectors.normalized, _IDEAL._replace(degree=0)),
        "scale_preserving": Entry(bisectors.scale_preserving, _IDEAL),
        "reward_calibrated": Entry(bands.reward_calibrated, _NOTHING),
        "band": Entry(bands.band, _IDEAL),
        "pcgrad": Entry(surgery.pcgrad, _IDEAL),
        "upgrad": Entry(surgery.upgrad, _IDEAL),
        "one_sided": Entry(surgery.one_sided, _NOTHING._replace(chosen=True, symmetric=False)),
        "dual_projection": Entry(surgery.dual_projection, _IDEAL),
        "mgda": Entry(min_norm.mgda, _IDEAL),
        "nash": Entry(bisectors.nash, _IDEAL._replace(degree=0)),
        "imtl_g": Entry(bisectors.imtl_g, _IDEAL),
        "config": Entry(bisectors.config, _IDEAL),
        "gradvac": Entry(surgery.gradvac, _IDEAL),
        "gradvac_ema": Entry(surgery.gradvac_ema, _NOTHING),
        "cagrad": Entry(min_norm.cagrad, _MARGIN),
        "aligned_mtl": Entry(min_norm.aligned_mtl, _MARGIN),
    }
)
"""Name -> factory and promises, at its default settings."""


def get_weighting(name: str, **settings: float) -> Weighting | RunningWeighting:
    """A weighting by name, for command lines.

    Args:
      name: a key of WEIGHTINGS.
      settings: arguments of its factory.

    Raises:
      UserError: there is no such weighting or setting, or a setting is outside of its range.

    Example:
      >>> from entangle import transforms
      >>> transforms.get_weighting("cagrad", c=2.0)
      Traceback (most recent call last):
      entangle.errors.UserError: weighting 'cagrad': c: 2 is not in [0, 1)
    """
    if name not in WEIGHTINGS:
        near = difflib.get_close_matches(name, WEIGHTINGS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown weighting {name!r}{hint} There are {', '.join(WEIGHTINGS)}")
    return made(WEIGHTINGS[name].make, f"weighting {name!r}", settings)


Made = TypeVar("Made")


def made(make: Callable[..., Made], what: str, settings: Mapping[str, float]) -> Made:
    """What a factory makes of a user's settings.

    Args:
      make: the factory; it raises ValueError where a setting is outside of its range.
      what: the message calls it so.
      settings: arguments by name.

    Raises:
      UserError: there is no such setting, or it is outside of its range.

    Example:
      >>> from entangle import transforms
      >>> from entangle.transforms.table import made
      >>> made(transforms.band, "the band", {"width": 1.0})
      Traceback (most recent call last):
      entangle.errors.UserError: the band: no setting 'width'; it has inset
    """
    known = inspect.signature(make).parameters
    for setting in settings:
        if setting not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"{what}: no setting {setting!r}; {has}")
    try:
        return make(**settings)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from None
