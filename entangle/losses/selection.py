"""Several objectives in one compiled program: which one, and its hyperparameters, are numbers that the program is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from entangle.losses.objective import (
    BatchObjective,
    Objective,
    RunningObjective,
    across,
    as_objective,
    with_hyperparameters,
)
from entangle.losses.table import get_objective
from entangle.types import PairLogProbs


class Choice(NamedTuple):
    """One objective of a :class:`Selection`, as numbers; several are stacked along a leading axis.

    Attributes:
      branch: int32 scalar, which of the selection's functions.
      hyperparameters: ``[H]`` float32, its own first, padded with zeros.
    """

    branch: jax.Array
    hyperparameters: jax.Array


class _Branch(NamedTuple):
    objective: Objective
    names: tuple[str, ...]  # of the hyperparameters that are numbers of the program


class Selection:
    """Objectives that one compiled program can choose from by numbers.

    Under ``jax.vmap`` over choices all of them are evaluated, a few operations a pair each; under ``jax.lax.map`` only the
    chosen one is. Of each objective the hyperparameters that were given are numbers of the program, too, unless its code
    needs them while it is traced.

    Attributes:
      choices: one a setting, stacked: fields ``[K]`` and ``[K, H]``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> selection = losses.Selection([("dpo", {"beta": 0.1}), ("dpo", {"beta": 0.2}), ("rrhf", {})])
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> found = jax.vmap(lambda choice: selection.objective(choice)(lp))(selection.choices)
      >>> bool(jnp.allclose(found[1], losses.dpo(lp, beta=0.2))), bool(jnp.allclose(found[2], losses.rrhf(lp)))
      (True, True)
    """

    def __init__(self, settings: Sequence[tuple[str, Mapping[str, float]]]) -> None:
        """Look the objectives up.

        Args:
          settings: name (as for ``losses.get_objective``) and hyperparameters of each.

        Raises:
          UserError: see ``losses.get_objective``.
          ValueError: there is none; or one that remembers earlier batches is not the only one: what it remembers would
            have to be part of the others' training states.
        """
        if not settings:
            raise ValueError("no objective to choose from")
        self._branches: list[_Branch] = []
        places: dict[Any, int] = {}
        indices, values = [], []
        for name, given in settings:
            key: Any
            fixed, names = get_objective(name, **given), tuple(sorted(given))
            branch, key = _Branch(get_objective(name), names), (name, names)
            if not _traceable(branch.objective, names):
                branch, key = _Branch(fixed, ()), (name, tuple(sorted(given.items())))
            if key not in places:
                places[key] = len(self._branches)
                self._branches.append(branch._replace(objective=_alone(branch.objective)))
            indices.append(places[key])
            values.append([float(given[name]) for name in branch.names])
        most = max(map(len, values))
        padded = [[*row, *[0.0] * (most - len(row))] for row in values]
        self.choices = Choice(
            jnp.asarray(indices, jnp.int32), jnp.asarray(padded, jnp.float32).reshape(len(values), most)
        )
        if len(self._branches) > 1 and any(isinstance(b.objective, RunningObjective) for b in self._branches):
            raise ValueError("an objective that remembers earlier batches shares a program with itself alone")

    def objective(self, choice: Choice) -> Objective:
        """The chosen objective, of the type that its kind has.

        Args:
          choice: scalars, as inside of ``jax.vmap`` or ``jax.lax.map`` over ``choices``; they may be traced.
        """
        bound = [_bound(branch, choice.hyperparameters) for branch in self._branches]
        if len(bound) == 1:
            return bound[0]

        def chosen(lp: PairLogProbs) -> jax.Array:
            return jax.lax.switch(choice.branch, bound, lp)

        if any(isinstance(objective, BatchObjective) for objective in bound):
            return BatchObjective(chosen, ())
        return chosen


def _bound(branch: _Branch, values: jax.Array) -> Objective:
    return with_hyperparameters(branch.objective, **{name: values[i] for i, name in enumerate(branch.names)})


def _alone(objective: Objective) -> Objective:
    """One of the whole batch knows that it has all of it, also where trials lie on different devices."""
    objective = as_objective(objective)
    return across(objective, ()) if isinstance(objective, BatchObjective) else objective


def _traceable(objective: Objective, names: Sequence[str]) -> bool:
    """Whether its code takes these hyperparameters as traced numbers."""
    lp: Any = PairLogProbs(*[jax.ShapeDtypeStruct((2,), jnp.float32)] * len(PairLogProbs._fields))  # type: ignore[arg-type]

    def call(lp: PairLogProbs, values: jax.Array) -> jax.Array:
        return objective(lp, **{name: values[i] for i, name in enumerate(names)})

    try:
        jax.eval_shape(call, lp, jax.ShapeDtypeStruct((len(names),), jnp.float32))
    except (jax.errors.ConcretizationTypeError, TypeError):
        return False
    return True
