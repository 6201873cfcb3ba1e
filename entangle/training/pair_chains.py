"""How the two gradients become a step, by name, for command lines: head and wrapper of the optax chain, a rule on pairs."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import NamedTuple

import optax

from entangle import transforms
from entangle.errors import UserError
from entangle.training.gradients import PairRule
from entangle.transforms import WEIGHTINGS, RunningWeighting
from entangle.transforms.table import made
from entangle.transforms.weightings import check_count

_PAIRWISE = "pairwise_"


def _unchanged(chain: optax.GradientTransformation) -> optax.GradientTransformation:
    return chain


class PairChain(NamedTuple):
    """What a name stands for: ``around(optax.chain(head, ...))`` is the optax chain.

    Attributes:
      head: first in the optax chain; PairGradients in, one update tree out.
      rule: on the coefficients of every pair, before the mean over pairs; it needs their geometry.
      around: wraps the whole chain, learning rate included, and has the last word on its update.
    """

    head: optax.GradientTransformation
    rule: PairRule | None = None
    around: Callable[[optax.GradientTransformation], optax.GradientTransformation] = _unchanged


def _project_retain(memory: int = 8, retain_weight: float = 0.0) -> PairChain:
    return PairChain(transforms.project_retain(memory, retain_weight=retain_weight))


def _retain_invariant(memory: int = 8) -> PairChain:
    kept = check_count("memory", memory, 0)
    forget = transforms.combine_pair(transforms.fixed(chosen=0.0))
    return PairChain(forget, around=lambda chain: transforms.retain_invariant(chain, kept))


def _protect_chosen() -> PairChain:
    return PairChain(transforms.combine_pair(transforms.margin()), around=transforms.protect_chosen)


_OTHERS = {
    "protect_chosen": _protect_chosen,
    "project_retain": _project_retain,
    "retain_invariant": _retain_invariant,
}


def pair_chains() -> list[str]:
    """All names: every weighting of the two batch gradients, those without memory pair by pair, projections and wrappers.

    Example:
      >>> from entangle.training.pair_chains import pair_chains
      >>> [name for name in pair_chains() if "normalized" in name]
      ['normalized', 'pairwise_normalized']
    """
    alone = [n for n, entry in WEIGHTINGS.items() if n != "margin" and not isinstance(entry.make(), RunningWeighting)]
    return [*WEIGHTINGS, *(_PAIRWISE + name for name in alone), *_OTHERS]


def pair_chain(name: str, **settings: float) -> PairChain:
    """A pair chain by name.

    Args:
      name: of ``pair_chains()``. ``pairwise_normalized`` is the paper's rule, which keeps the coefficients' size
        (``transforms.normalize_coefficients``); ``protect_chosen`` holds plain margin's step, whatever the optimizer, to
        what does not lower the chosen batch sum; ``project_retain`` and ``retain_invariant`` keep the chosen responses and
        forget the rejected ones.
      settings: arguments of the weighting, projection or wrapper.

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
    if name in _OTHERS:
        return made(_OTHERS[name], f"pair chain {name!r}", settings)
    plain = name.removeprefix(_PAIRWISE)
    weighting = transforms.get_weighting(plain, **settings)
    if plain == name:
        return PairChain(transforms.combine_pair(weighting))
    head = transforms.combine_pair(transforms.margin())
    if plain == "normalized":
        return PairChain(head, transforms.normalize_coefficients)
    assert not isinstance(weighting, RunningWeighting)
    return PairChain(head, transforms.per_pair(weighting))
