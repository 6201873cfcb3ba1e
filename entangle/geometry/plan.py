"""What is to be done in a program so that its geometry comes with the backward: found by ``uses``, run by ``program``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from entangle.geometry.dense_axes import DenseAxes


class Place(NamedTuple):
    """One place where a parameter meets the rows.

    Attributes:
      leaf: number of the parameter among the flattened ones.
      form: ``dense``, ``lookup``, ``tied lookup``, ``tied head`` or ``copy``.
      lengths: lengths of the scans around it, outermost first.
      sizes: E, T, I and O of a dense place, else ().
      where: file and line of the model's code.
      layered: whether the scans run over the parameter's own leading axes, whole and as they are.
    """

    leaf: int
    form: str
    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    where: str
    layered: bool


class Tied(NamedTuple):
    """What a head that is also looked up in knows of the lookup.

    Attributes:
      lookup: its place.
      columns: see ``TableView.columns``; None where the columns are the table's rows.
    """

    lookup: int
    columns: Sequence[int] | None


class Dense(NamedTuple):
    """An equation that multiplies a row's input with a weight, which may be ``tied``."""

    place: int
    axes: DenseAxes
    tied: Tied | None


class Lookup(NamedTuple):
    """An equation that reads rows of a table; ``tied`` says that the table is a head, too."""

    place: int
    tied: bool


class Scope(NamedTuple):
    """One jaxpr (the model, the body of a scan, a checkpointed part) and what is to be done in it.

    Attributes:
      jaxpr: the program.
      live: numbers of the equations that the result depends on.
      copies: variable to the place whose copies replace it.
      equations: number of an equation to what stands for it.
    """

    jaxpr: Any
    live: frozenset[int]
    copies: dict[Any, int]
    equations: dict[int, Dense | Lookup | Scope]
