"""Views of a parameter: operations that only move its entries, and where the rows of a table come to lie in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import primitives

from entangle.geometry.dense_axes import DenseAxes

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


def is_view(eqn: Any) -> bool:
    """Whether an equation's results are views of its first variable, parts of it that do not overlap included.

    The gradient with respect to a view has the entries of that with respect to the whole, which is zero elsewhere.
    """
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    if eqn.primitive is primitives.slice_p or eqn.primitive.name == "split":
        return True
    same = len(eqn.invars) == 1 and math.prod(before.shape) == math.prod(after.shape)
    return eqn.primitive in _VIEWS and same and bool(jnp.issubdtype(after.dtype, jnp.floating))


def moves_axes(eqn: Any) -> bool:
    """Whether the axes of a view are no longer those of what it is a view of."""
    return eqn.primitive not in _STILL


def are_disjoint_slices(eqns: Sequence[Any]) -> bool:
    """Whether all are slices, and no entry is in two of them."""
    if any(eqn is None or eqn.primitive is not primitives.slice_p for eqn in eqns):
        return False
    boxes = [list(zip(eqn.params["start_indices"], eqn.params["limit_indices"], strict=True)) for eqn in eqns]
    apart = lambda a, b: any(p <= q or r <= s for (s, p), (q, r) in zip(a, b, strict=True))  # noqa: E731
    return all(apart(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


class TableView(NamedTuple):
    """Where the rows of a table ``[V, D]`` lie in a view of it.

    Attributes:
      rows: which row of the table lies where, the view's last axis running fastest, D left out.
      shape: of the view, but 1 where D is. Axes that scans run over come first.
      width: the axis along which D lies.
      scanned: how many leading axes scans run over.
      size: V.
    """

    rows: Sequence[int]
    shape: tuple[int, ...]
    width: int
    scanned: int
    size: int

    @classmethod
    def of(cls, size: int) -> TableView:
        """The table itself, of so many rows."""
        return cls(range(size), (size, 1), 1, 0, size)

    def is_whole(self) -> bool:
        """Whether this is the table, or its transpose, as it is."""
        return len(self.shape) == 2 and not self.scanned and list(self.rows) == list(range(self.size))

    def through(self, eqn: Any) -> TableView | None:
        """What an equation makes of the view; None where it is no view in which every row lies in one piece."""
        if not is_view(eqn):
            return None
        if not moves_axes(eqn):
            return self
        before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        width = self.width - self.scanned
        if eqn.primitive is primitives.transpose_p:
            order = eqn.params["permutation"]
            whole = [range(length) for length in self.shape[self.scanned :]]
            return self._taken(order, whole)._replace(width=self.scanned + order.index(width))
        if eqn.primitive is primitives.slice_p:
            steps = eqn.params["strides"] or (1,) * len(before)
            bounds = zip(eqn.params["start_indices"], eqn.params["limit_indices"], steps, strict=True)
            taken = [range(*bound) for bound in bounds]
            if after[width] != before[width]:
                return None
            taken[width] = range(1)
            return self._taken(range(len(before)), taken)
        if eqn.primitive.name == "split" or (eqn.primitive is primitives.reshape_p and eqn.params["dimensions"]):
            return None
        lies = [
            axis
            for axis, length in enumerate(after)
            if length == before[width] and math.prod(after[:axis]) == math.prod(before[:width])
        ]
        if not lies:
            return None
        shape = (*self.shape[: self.scanned], *after[: lies[0]], 1, *after[lies[0] + 1 :])
        return self._replace(shape=shape, width=self.scanned + lies[0])

    def _taken(self, order: Sequence[int], taken: Sequence[range]) -> TableView:
        """Some indices of every axis but the scanned ones, and these axes in another order."""
        axes = (*range(self.scanned), *(self.scanned + axis for axis in order))
        every = [*(range(length) for length in self.shape[: self.scanned]), *taken]
        places = [0]
        for axis in axes:
            stride = math.prod(self.shape[axis + 1 :])
            places = [place + index * stride for place in places for index in every[axis]]
        shape = tuple(len(every[axis]) for axis in axes)
        return self._replace(rows=[self.rows[place] for place in places], shape=shape)

    def over_scan(self) -> TableView | None:
        """What one iteration of a scan over the first axis sees; None where that axis is D."""
        return None if self.width == self.scanned else self._replace(scanned=self.scanned + 1)

    def columns(self, axes: DenseAxes, sizes: tuple[int, ...]) -> list[int] | None:
        """Where every row of the table is among the results of a product that contracts D.

        Args:
          axes: layout of the product.
          sizes: E, T, I and O of it.

        Returns:
          V numbers: that of the iteration times O, plus the column; -1 of rows that are not there. None where the product
          is another one.
        """
        free = [self.scanned + axis for axis in axes.free_axes()]
        if sizes[0] != 1 or sorted([*range(self.scanned), *free, self.width]) != list(range(len(self.shape))):
            return None
        found = [-1] * self.size
        for place, row in enumerate(self.rows):  # the product's free axes are in the view's own order
            found[row] = place
        return found
