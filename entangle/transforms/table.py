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
      weights: x and y as Python expressions in n1 = |chosen|, n2 = |rejected|, both positive, the cosine k of chosen and
        -rejected, above -1, and the factory's arguments; of weightings with a memory those of the first step.
    """

    make: Callable[..., Weighting | RunningWeighting]
    promises: Promises
    weights: tuple[str, str]


_IDEAL = Promises(chosen=True, rejected=True, margin=True, symmetric=True, degree=1)
_MARGIN = _IDEAL._replace(chosen=False, rejected=False)
_NOTHING = _MARGIN._replace(margin=False)
_CENTRE = ("sqrt(n2/n1)", "sqrt(n1/n2)")
_PROJECTED = ("1 + max(-k, 0)*n2/n1", "1 + max(-k, 0)*n1/n2")
_BAND = "clip(n1/n2, (-k)**(1 - inset), (-k)**(inset - 1))"
_VACCINE = "where(k < target, target*sqrt((1 - k*k)/(1 - target*target)) - k, 0)"
_SHORTEST = "clip(n2*(n2 - k*n1)/(n1*n1 + n2*n2 - 2*k*n1*n2), 0, 1)"
# the smaller eigenvalue of the Gram over its determinant, times its trace and twice its volume
_ALIGNED = (
    "/(2*sqrt((n1*n1 + n2*n2 + sqrt((n1*n1 - n2*n2)**2 + (2*k*n1*n2)**2))/2)"
    "*sqrt(n1*n1 + n2*n2 + 2*n1*n2*sqrt(1 - k*k)))"
)

WEIGHTINGS: Mapping[str, Entry] = MappingProxyType(
    {
        "margin": Entry(weightings.margin, _MARGIN, ("1", "1")),
        "fixed": Entry(weightings.fixed, _MARGIN, ("chosen", "rejected")),
        "normalized": Entry(bisectors.normalized, _IDEAL._replace(degree=0), ("1/n1", "1/n2")),
        "scale_preserving": Entry(bisectors.scale_preserving, _IDEAL, _CENTRE),
        "reward_calibrated": Entry(bands.reward_calibrated, _NOTHING, _CENTRE),
        "band": Entry(
            bands.band,
            _IDEAL,
            (f"where(k < 0, sqrt({_BAND}*n2/n1), 1)", f"where(k < 0, sqrt(n1/n2/{_BAND}), 1)"),
        ),
        "pcgrad": Entry(surgery.pcgrad, _IDEAL, _PROJECTED),
        "upgrad": Entry(surgery.upgrad, _IDEAL, ("(1 + max(-k, 0)*n2/n1)/2", "(1 + max(-k, 0)*n1/n2)/2")),
        "one_sided": Entry(surgery.one_sided, _NOTHING._replace(chosen=True, symmetric=False), (_PROJECTED[0], "1")),
        "dual_projection": Entry(
            surgery.dual_projection,
            _IDEAL,
            ("where(n1 + k*n2 < 0, -k*n2/n1, 1)/2", "where(n2 + k*n1 < 0, -k*n1/n2, 1)/2"),
        ),
        "mgda": Entry(min_norm.mgda, _IDEAL, (_SHORTEST, f"1 - {_SHORTEST}")),
        "nash": Entry(bisectors.nash, _IDEAL._replace(degree=0), ("1/(n1*sqrt(1 + k))", "1/(n2*sqrt(1 + k))")),
        "imtl_g": Entry(bisectors.imtl_g, _IDEAL, ("n2/(n1 + n2)", "n1/(n1 + n2)")),
        "config": Entry(bisectors.config, _IDEAL, ("(n1 + n2)/(2*n1)", "(n1 + n2)/(2*n2)")),
        "gradvac": Entry(surgery.gradvac, _IDEAL, (f"1 + {_VACCINE}*n2/n1", f"1 + {_VACCINE}*n1/n2")),
        "gradvac_ema": Entry(surgery.gradvac_ema, _NOTHING, _PROJECTED),
        "cagrad": Entry(min_norm.cagrad, _MARGIN, ("1/2 + c*g0/gt*t", "1/2 + c*g0/gt*(1 - t)")),
        "aligned_mtl": Entry(
            min_norm.aligned_mtl,
            _MARGIN,
            (
                f"(n2*n2 + n1*n2*(sqrt(1 - k*k) - k)){_ALIGNED}",
                f"(n1*n1 + n1*n2*(sqrt(1 - k*k) - k)){_ALIGNED}",
            ),
        ),
    }
)
"""Name -> factory, promises and formula, at its default settings."""


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
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"unknown weighting {name!r}{hint}: choose one of {', '.join(WEIGHTINGS)}")
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
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: {error}") from None
