"""How a model uses its parameters: read off its traced program, once, before anything is computed.

The geometry of a pair is a sum over the places where a parameter meets a row. This module finds these places and says
for each which exact form its products have; what it does not know is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from entangle import jaxprs
from entangle.errors import UnsupportedModelError
from entangle.geometry.dense_axes import DenseAxes
from entangle.geometry.plan import Dense, Lookup, Place, Scope, Tied
from entangle.geometry.views import TableView, are_disjoint_slices, is_view, moves_axes

COPY_LIMIT = 2**20
"""Largest parameter, in numbers, of which every row is given a copy when no shorter form of its products is known."""


class Source(NamedTuple):
    """What a variable is a view of.

    Attributes:
      leaf: number of the parameter.
      lengths: of the scans around, outermost first.
      moved: whether its axes are no longer the parameter's.
      layered: see Place.
      lookup: place of the lookup into the same table, of which this is a part of the head.
      table: where the table's rows lie in this part.
    """

    leaf: int
    lengths: tuple[int, ...] = ()
    moved: bool = False
    layered: bool = True
    lookup: int | None = None
    table: TableView | None = None


def find_uses(jaxpr: Any, names: Sequence[str], copy_limit: int = COPY_LIMIT) -> tuple[Scope, list[Place]]:
    """Find every place where one of the first variables of a program, the parameters, meets a row.

    Args:
      jaxpr: of one row, from ``flat_jaxpr``; its first ``len(names)`` variables are the parameters.
      names: of the parameters, for messages.
      copy_limit: see ``COPY_LIMIT``.

    Returns:
      What to do in the program, and the list of places that it refers to.

    Raises:
      UnsupportedModelError: a parameter larger than the limit is used in a way that has no known form.
    """
    finder = _Finder(names, copy_limit)
    weights = {var: Source(leaf) for leaf, var in enumerate(jaxpr.invars[: len(names)])}
    rows = set(jaxpr.invars[len(names) :])
    return _ScopeFinder(finder, jaxpr, weights, {}, rows).find(), finder.places


class _Finder:
    """The places found so far."""

    def __init__(self, names: Sequence[str], copy_limit: int) -> None:
        self.names, self.copy_limit = names, copy_limit
        self.places: list[Place] = []

    def add(self, source: Source, form: str, eqn: Any, sizes: tuple[int, ...] = ()) -> int:
        self.places.append(Place(source.leaf, form, source.lengths, sizes, jaxprs.where(eqn), source.layered))
        return len(self.places) - 1


class _End(NamedTuple):
    """Where a view of a table ends: equation, and the head's columns, or None of a lookup."""

    equation: int
    columns: Sequence[int] | None


class _ScopeFinder:
    """Plans one jaxpr."""

    def __init__(
        self, finder: _Finder, jaxpr: Any, weights: dict[Any, Any], derived: dict[Any, set[int]], rows: set[Any]
    ) -> None:
        """See who uses what; nothing is planned yet.

        Args:
          finder: the places found so far.
          jaxpr: the program.
          weights: its variables that are views of a parameter.
          derived: its variables that depend on parameters only, in another way -> leaves.
          rows: its variables that depend on the row.
        """
        self.finder, self.jaxpr, self.weights = finder, jaxpr, weights
        self.live = jaxprs.live_equations(jaxpr)
        self.rows = set(rows)
        self.given = derived
        self.derived = {var: {source.leaf} for var, source in weights.items()} | derived
        self.uses: dict[Any, list[tuple[int, int]]] = {}
        self.copies: dict[Any, int] = {}
        self.equations: dict[int, Dense | Lookup | Scope] = {}
        self.pending: dict[int, dict[Any, Any]] = {}
        for index, eqn in enumerate(jaxpr.eqns):
            if index in self.live:
                self._classify(index, eqn)
        for atom in jaxpr.outvars:
            if isinstance(atom, core.Var):
                self.uses.setdefault(atom, []).append((-1, 0))

    def _classify(self, index: int, eqn: Any) -> None:
        """Note who uses what, and what depends on rows, on parameters only, or on neither."""
        atoms = [a for a in eqn.invars if isinstance(a, core.Var)]
        for position, atom in enumerate(eqn.invars):
            if isinstance(atom, core.Var):
                self.uses.setdefault(atom, []).append((index, position))
        if any(a in self.rows for a in atoms):
            self.rows.update(eqn.outvars)
        elif any(a in self.derived for a in atoms) and eqn.primitive is not primitives.stop_gradient_p:
            leaves = set().union(*(self.derived.get(a, set()) for a in atoms))
            self.derived.update((var, leaves) for var in eqn.outvars)

    def find(self) -> Scope:
        for var, source in self.weights.items():
            self.follow(var, source)
        for index, eqn in enumerate(self.jaxpr.eqns):
            if index in self.live and eqn.primitive in (primitives.scan_p, primitives.remat_p):
                self._enter(index, eqn)
        self._refuse_large_combinations()
        return Scope(self.jaxpr, self.live, self.copies, self.equations)

    def _enter(self, index: int, eqn: Any) -> None:
        """Plan the jaxpr inside of an equation, if a parameter goes in."""
        weights = self.pending.get(index)
        if weights is not None:
            self.equations[index] = self._inside(eqn, weights).find()

    def _inside(self, eqn: Any, weights: dict[Any, Any]) -> _ScopeFinder:
        inner = eqn.params["jaxpr"]
        inner = inner if isinstance(inner, core.Jaxpr) else inner.jaxpr
        consts, carried = jaxprs.scan_inputs(eqn) if eqn.primitive is primitives.scan_p else (0, 0)
        carries = range(consts, consts + carried)
        derived, rows = {}, set()
        for position, (outer, var) in enumerate(zip(eqn.invars, inner.invars, strict=True)):
            if var in weights:
                continue
            if position in carries or (isinstance(outer, core.Var) and outer in self.rows):
                rows.add(var)
            elif isinstance(outer, core.Var) and outer in self.derived:
                derived[var] = self.derived[outer]
        return _ScopeFinder(self.finder, inner, weights, derived, rows)

    def follow(self, var: Any, source: Source) -> None:
        """Find where a view of a parameter meets the row."""
        uses = self.uses.get(var, [])
        if len(uses) == 1:
            self._follow_use(*uses[0], var, source)
        elif uses:
            eqns = [self._equation(index) for index, _ in uses]
            if are_disjoint_slices(eqns):
                for use in uses:
                    self._follow_use(*use, var, source)
            elif not self._tied(var, uses, source):
                self._copy(var, source, eqns)

    def _equation(self, index: int) -> Any:
        return self.jaxpr.eqns[index] if index >= 0 else None

    def _follow_use(self, index: int, position: int, var: Any, source: Source) -> None:
        eqn = self._equation(index)
        if eqn is None:
            self._copy(var, source, [eqn])
        elif eqn.primitive is primitives.stop_gradient_p:
            return
        elif is_view(eqn):
            table = None if source.table is None else source.table.through(eqn)
            moved = source._replace(moved=source.moved or moves_axes(eqn), table=table)
            for out in eqn.outvars:
                self.follow(out, moved)
        elif eqn.primitive is primitives.remat_p:
            self.pending.setdefault(index, {})[eqn.params["jaxpr"].invars[position]] = source
        elif _is_sliced(eqn, position):
            inner = eqn.params["jaxpr"].jaxpr.invars[position]
            over = (*source.lengths, eqn.params["length"])
            layered = source.layered and not source.moved
            table = None if source.table is None else source.table.over_scan()
            self.pending.setdefault(index, {})[inner] = source._replace(lengths=over, layered=layered, table=table)
        elif self._is_dense(eqn, position):
            axes, sizes = _dense_axes(eqn, position)
            tied, form = None, "dense"
            if source.lookup is not None and source.table is not None:
                columns = source.table.columns(axes, sizes)
                tied, form = Tied(source.lookup, None if source.table.is_whole() else columns), "tied head"
            self.equations[index] = Dense(self.finder.add(source, form, eqn, sizes), axes, tied)
        elif self._is_lookup(eqn, position):
            self.equations[index] = Lookup(self.finder.add(source, "lookup", eqn), False)
        else:
            self._copy(var, source, [eqn])

    def _is_dense(self, eqn: Any, position: int) -> bool:
        other = eqn.invars[1 - position] if eqn.primitive is primitives.dot_general_p else None
        return other is not None and other not in self.derived and jnp.issubdtype(other.aval.dtype, jnp.floating)

    def _is_lookup(self, eqn: Any, position: int) -> bool:
        if eqn.primitive is not primitives.gather_p or position != 0 or eqn.invars[1] in self.derived:
            return False
        table, indices = (atom.aval for atom in eqn.invars)
        numbers = eqn.params["dimension_numbers"]
        return (
            len(table.shape) == 2
            and tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (0,)
            and not numbers.operand_batching_dims
            and tuple(numbers.offset_dims) == (len(indices.shape) - 1,)
            and tuple(eqn.params["slice_sizes"]) == (1, table.shape[1])
            and eqn.params["mode"] in _VALID
        )

    def _tied(self, var: Any, uses: Sequence[tuple[int, int]], source: Source) -> bool:
        """Whether a table is looked up in once and then is a head, in one piece or in parts; if so all of it is planned."""
        if len(var.aval.shape) != 2:
            return False
        table = TableView.of(var.aval.shape[0])
        ends = [self._ends(*use, table) for use in uses]
        found = [end for some in ends for end in some or []]
        lookups = [end for end in found if end.columns is None]
        heads = [end for end in found if end.columns is not None]
        if None in ends or len(lookups) != 1 or not heads or any(head.equation < lookups[0].equation for head in heads):
            return False
        if any(
            sum(place >= 0 for place in row) > 1 for row in zip(*(head.columns or () for head in heads), strict=True)
        ):
            return False  # what two heads have in common is looked up in three times
        (lookup,) = lookups
        eqn = self.jaxpr.eqns[lookup.equation]
        place = self.finder.add(source, "tied lookup", eqn)
        self.equations[lookup.equation] = Lookup(place, True)
        for use, some in zip(uses, ends, strict=True):
            if some is not None and some[0].columns is not None:
                self._follow_use(*use, var, source._replace(lookup=place, table=table))
        return True

    def _ends(self, index: int, position: int, table: TableView) -> list[_End] | None:
        """The lookup and the heads that one use of a view leads to; None where it leads to anything else."""
        eqn = self._equation(index)
        if eqn is None or eqn.primitive is primitives.stop_gradient_p:
            return None
        if is_view(eqn):
            through = table.through(eqn)
            return None if through is None else self._all_ends(eqn.outvars[0], through)
        sliced = _is_sliced(eqn, position)
        if sliced or eqn.primitive is primitives.remat_p:
            seen = table.over_scan() if sliced else table
            inner = eqn.params["jaxpr"]
            var = (inner.jaxpr if sliced else inner).invars[position]
            ends = None if seen is None else self._inside(eqn, {var: Source(0)})._all_ends(var, seen)
            if ends is None or any(end.columns is None for end in ends):
                return None  # a lookup inside of another program is none that a head outside could be tied to
            return [end._replace(equation=index) for end in ends]
        if self._is_dense(eqn, position):
            columns = table.columns(*_dense_axes(eqn, position))
            return None if columns is None else [_End(index, columns)]
        return [_End(index, None)] if self._is_lookup(eqn, position) and table.is_whole() and table.width == 1 else None

    def _all_ends(self, var: Any, table: TableView) -> list[_End] | None:
        uses = self.uses.get(var, [])
        if len(uses) > 1 and not are_disjoint_slices([self._equation(index) for index, _ in uses]):
            return None
        found: list[_End] = []
        for use in uses:
            ends = self._ends(*use, table)
            if ends is None:
                return None
            found += ends
        return found

    def _copy(self, var: Any, source: Source, eqns: Sequence[Any]) -> None:
        size = math.prod(var.aval.shape)
        if size > self.finder.copy_limit:
            users = ", ".join(
                sorted({f"{eqn.primitive.name} at {jaxprs.where(eqn)}" for eqn in eqns if eqn is not None})
            )
            raise UnsupportedModelError(
                f"parameter {self.finder.names[source.leaf]}: no short exact form of the geometry is known for its "
                f"{'uses' if len(eqns) > 1 else 'use'} ({users or 'as a result'}), and {size} numbers are too many to "
                f"copy for every row (copy_limit={self.finder.copy_limit})"
            )
        self.copies[var] = self.finder.add(source, "copy", next((eqn for eqn in eqns if eqn is not None), None))

    def _refuse_large_combinations(self) -> None:
        """What is made from copies alone exists once a row, so it must be small, too."""
        made = {var: self.derived[var] for var in (*self.copies, *self.given)}
        for index in sorted(self.live):
            eqn = self.jaxpr.eqns[index]
            from_copies = [made[a] for a in eqn.invars if isinstance(a, core.Var) and a in made]
            planned = isinstance(self.equations.get(index), Dense | Lookup)
            if planned or not from_copies or eqn.outvars[0] in self.rows:
                continue
            leaves: set[int] = set().union(*from_copies)
            for var in eqn.outvars:
                size = math.prod(getattr(var.aval, "shape", ()))
                if size > self.finder.copy_limit:
                    names = ", ".join(self.finder.names[leaf] for leaf in sorted(leaves))
                    raise UnsupportedModelError(
                        f"parameters {names}: combined into {size} numbers before they meet a row "
                        f"({eqn.primitive.name} at {jaxprs.where(eqn)}), which is too many to hold for every row "
                        f"(copy_limit={self.finder.copy_limit}); apply them to the row one after the other"
                    )
                made[var] = leaves


def _is_sliced(eqn: Any, position: int) -> bool:
    """Whether a scan runs over what is in this position."""
    return eqn.primitive is primitives.scan_p and position >= sum(jaxprs.scan_inputs(eqn))


def _dense_axes(eqn: Any, position: int) -> tuple[DenseAxes, tuple[int, int, int, int]]:
    """Layout of a product, and E, T, I and O."""
    x, u = (eqn.invars[place].aval.shape for place in (1 - position, position))
    axes = DenseAxes(eqn.params["dimension_numbers"], position, (len(x), len(u)))
    return axes, axes.sizes(x, u)


_MODE = jax.lax.GatherScatterMode
_VALID = (_MODE.FILL_OR_DROP, _MODE.CLIP, _MODE.PROMISE_IN_BOUNDS)


def read_ids(eqn: Any, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ids ``[T]`` that a gather with these indices reads, and which of them lie in the table."""
    rows = eqn.invars[0].aval.shape[0]
    ids = indices.reshape(-1)
    if ids.dtype.itemsize < 4:  # the table's length may be more than they can hold
        ids = ids.astype(jnp.int32)
    if eqn.params["mode"] == _MODE.CLIP:
        ids = jnp.clip(ids, 0, rows - 1)
    return ids, (ids >= 0) & (ids < rows)
