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

COPY_LIMIT = 2**20
"""Largest parameter, in numbers, of which every row is given a copy when no shorter form of its products is known."""

# Views keep inner products: the gradient with respect to the view has the parameter's gradient's every product.
_VIEWS = {
    primitives.convert_element_type_p,
    primitives.transpose_p,
    primitives.reshape_p,
    primitives.squeeze_p,
    primitives.copy_p,
    primitives.sharding_constraint_p,
    primitives.broadcast_in_dim_p,
}

# Views whose axes are the parameter's own.
_STILL = {primitives.convert_element_type_p, primitives.copy_p, primitives.sharding_constraint_p}


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


class Source(NamedTuple):
    """What a variable is a view of.

    Attributes:
      leaf: number of the parameter.
      lengths: of the scans around, outermost first.
      moved: whether its axes are no longer the parameter's.
      layered: see Place.
    """

    leaf: int
    lengths: tuple[int, ...] = ()
    moved: bool = False
    layered: bool = True


class Dense(NamedTuple):
    """An equation that multiplies a row's input with a weight; ``tied`` names the lookup into the same matrix."""

    place: int
    axes: DenseAxes
    tied: int | None


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
    return finder.scope(jaxpr, weights, {}, rows), finder.places


class _Finder:
    """The places found so far."""

    def __init__(self, names: Sequence[str], copy_limit: int) -> None:
        self.names, self.copy_limit = names, copy_limit
        self.places: list[Place] = []

    def add(self, source: Source, form: str, eqn: Any, sizes: tuple[int, ...] = ()) -> int:
        self.places.append(Place(source.leaf, form, source.lengths, sizes, jaxprs.where(eqn), source.layered))
        return len(self.places) - 1

    def scope(self, jaxpr: Any, weights: dict[Any, Any], derived: dict[Any, set[int]], rows: set[Any]) -> Scope:
        """Plan one jaxpr.

        Args:
          jaxpr: the program.
          weights: its variables that are views of a parameter.
          derived: its variables that depend on parameters only, in another way -> leaves.
          rows: its variables that depend on the row.
        """
        return _ScopeFinder(self, jaxpr, weights, derived, rows).find()


class _ScopeFinder:
    """Plans one jaxpr; see ``_Finder.scope``."""

    def __init__(
        self, finder: _Finder, jaxpr: Any, weights: dict[Any, Any], derived: dict[Any, set[int]], rows: set[Any]
    ) -> None:
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
        if weights is None:
            return
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
        self.equations[index] = self.finder.scope(inner, weights, derived, rows)

    def follow(self, var: Any, source: Source) -> None:
        """Find where a view of a parameter meets the row."""
        uses = self.uses.get(var, [])
        eqns: list[Any] = [self.jaxpr.eqns[index] if index >= 0 else None for index, _ in uses]
        if not uses:
            return
        if len(uses) > 1:
            if _disjoint_slices(eqns):
                for eqn in eqns:
                    self.follow(eqn.outvars[0], source._replace(moved=True))
            elif not self._tied(var, uses, source):
                self._copy(var, source, eqns)
            return
        (index, position), eqn = uses[0], eqns[0]
        if eqn is None:
            self._copy(var, source, eqns)
        elif eqn.primitive is primitives.stop_gradient_p:
            return
        elif is_view(eqn):
            moved = source.moved or eqn.primitive not in _STILL
            for out in eqn.outvars:
                self.follow(out, source._replace(moved=moved))
        elif eqn.primitive is primitives.remat_p:
            self.pending.setdefault(index, {})[eqn.params["jaxpr"].invars[position]] = source
        elif eqn.primitive is primitives.scan_p and position >= sum(jaxprs.scan_inputs(eqn)):
            inner = eqn.params["jaxpr"].jaxpr.invars[position]
            over = (*source.lengths, eqn.params["length"])
            layered = source.layered and not source.moved
            self.pending.setdefault(index, {})[inner] = source._replace(lengths=over, layered=layered)
        elif self._is_dense(eqn, position):
            axes = _dense_axes(eqn, position)
            place = self.finder.add(
                source, "dense", eqn, axes.sizes(eqn.invars[1 - position].aval.shape, var.aval.shape)
            )
            self.equations[index] = Dense(place, axes, None)
        elif self._is_lookup(eqn, position):
            self.equations[index] = Lookup(self.finder.add(source, "lookup", eqn), False)
        else:
            self._copy(var, source, eqns)

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
        """Whether a matrix is looked up in once and is a head once; if so both are planned."""
        ends = [end for end in (self._end(index, position) for index, position in uses) if end is not None]
        if not len(ends) == len(uses) == 2:
            return False
        found: dict[str, Any] = {}
        for index, position, order in ends:
            eqn = self.jaxpr.eqns[index]
            if order == (0, 1) and self._is_lookup(eqn, position):
                found["lookup"] = index, eqn
            elif self._is_dense(eqn, position):
                axes = _dense_axes(eqn, position)
                sizes = axes.sizes(eqn.invars[1 - position].aval.shape, eqn.invars[position].aval.shape)
                if sizes[0] == 1 and [order[axis] for axis in axes.free_axes()] == [0]:
                    found["head"] = index, eqn, axes, sizes
        if len(found) != 2 or found["lookup"][0] > found["head"][0]:
            return False
        index, eqn = found["lookup"]
        self.equations[index] = Lookup(self.finder.add(source, "tied lookup", eqn), True)
        head, eqn, axes, sizes = found["head"]
        self.equations[head] = Dense(self.finder.add(source, "tied head", eqn, sizes), axes, index)
        return True

    def _end(
        self, index: int, position: int, order: tuple[int, ...] = (0, 1)
    ) -> tuple[int, int, tuple[int, ...]] | None:
        """Follow a matrix through transposes and conversions: its last use, and which of its axes lies where."""
        eqn = self.jaxpr.eqns[index] if index >= 0 else None
        if eqn is None or len(eqn.invars[position].aval.shape) != 2:
            return None
        if eqn.primitive is primitives.transpose_p:
            order = tuple(order[axis] for axis in eqn.params["permutation"])
        elif eqn.primitive not in (primitives.convert_element_type_p, primitives.copy_p) or not is_view(eqn):
            return index, position, order
        (out,) = eqn.outvars
        uses = self.uses.get(out, [])
        return self._end(*uses[0], order) if len(uses) == 1 else None

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


def is_view(eqn: Any) -> bool:
    """Whether an equation's results are views of its first variable, parts of it that do not overlap included.

    The gradient with respect to a view has the entries of that with respect to the whole, which is zero elsewhere.
    """
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    if eqn.primitive is primitives.slice_p or eqn.primitive.name == "split":
        return True
    same = len(eqn.invars) == 1 and math.prod(before.shape) == math.prod(after.shape)
    return eqn.primitive in _VIEWS and same and bool(jnp.issubdtype(after.dtype, jnp.floating))


def _disjoint_slices(eqns: Sequence[Any]) -> bool:
    """Whether all are slices, and no entry is in two of them."""
    if any(eqn is None or eqn.primitive is not primitives.slice_p for eqn in eqns):
        return False
    boxes = [list(zip(eqn.params["start_indices"], eqn.params["limit_indices"], strict=True)) for eqn in eqns]
    apart = lambda a, b: any(p <= q or r <= s for (s, p), (q, r) in zip(a, b, strict=True))  # noqa: E731
    return all(apart(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


def _dense_axes(eqn: Any, position: int) -> DenseAxes:
    ranks = len(eqn.invars[1 - position].aval.shape), len(eqn.invars[position].aval.shape)
    return DenseAxes(eqn.params["dimension_numbers"], position, ranks)


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
