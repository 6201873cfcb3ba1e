"""How the two gradients become one, by name, for command lines: the head of the optax chain and a rule on every pair."""

from __future__ import annotations

import difflib
from typing import NamedTuple

import optax

from entangle import transforms
from entangle.errors import UserError
from entangle.training.gradients import PairRule
from entangle.transforms import WEIGHTINGS, RunningWeighting
from entangle.transforms.table import made

_PAIRWISE = "pairwise_"


def _project_retain(memory: float = 8, retain_weight: float = 0.0) -> optax.GradientTransformation:
    # the command line's settings are floats
    if memory != int(memory):
        raise ValueError(f"memory: {memory:g} is no whole number")
    return transforms.project_retain(int(memory), retain_weight=retain_weight)


_HEADS = {"project_retain": _project_retain}


class PairChain(NamedTuple):
    """What a name stands for.

    Attributes:
      head: first in the optax chain; PairGradients in, one update tree out.
      rule: on the coefficients of every pair, before the mean over pairs; it needs their geometry.
    """

    head: optax.GradientTransformation
    rule: PairRule | None = None


def pair_chains() -> list[str]:
    """All names: every weighting of the two batch gradients, those without memory pair by pair, and other heads.

    Example:
      >>> from entangle.training.pair_chains import pair_chains
      >>> [name for name in pair_chains() if "normalized" in name]
      ['normalized', 'pairwise_normalized']
    """
    alone = [n for n, entry in WEIGHTINGS.items() if n != "margin" and not isinstance(entry.make(), RunningWeighting)]
    return [*WEIGHTINGS, *(_PAIRWISE + name for name in alone), *_HEADS]


def pair_chain(name: str, **settings: float) -> PairChain:
    """A pair chain by name.

    Args:
      name: of ``pair_chains()``. ``pairwise_normalized`` is the paper's rule, which keeps the coefficients' size
        (``transforms.normalize_coefficients``).
      settings: arguments of the weighting or head.

    Raises:
      UserError: there is no such chain or setting, or a setting is outside of its range.

    Example:
      >>> from entangle.training import pair_chain
      >>> pair_chain("pairwise_pcgrad").rule is None, pair_chain("pcgrad").rule is None
      (False, True)
    """
    if name not in pair_chains():
        near = difflib.get_close_matches(name, pair_chains(), 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"unknown pair chain {name!r}{hint}: choose one of {', '.join(pair_chains())}")
    if name in _HEADS:
        return PairChain(made(_HEADS[name], f"pair chain {name!r}", settings))
    plain = name.removeprefix(_PAIRWISE)
    weighting = transforms.get_weighting(plain, **settings)
    if plain == name:
        return PairChain(transforms.combine_pair(weighting))
    head = transforms.combine_pair(transforms.margin())
    if plain == "normalized":
        return PairChain(head, transforms.normalize_coefficients)
    assert not isinstance(weighting, RunningWeighting)
    return PairChain(head, transforms.per_pair(weighting))
