"""Views of a parameter: operations that only move its entries, and where the rows of a table come to lie in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
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
      rows: the view's shape, but 1 where D is: which row of the table lies there. Axes that scans run over come first.
      width: the axis along which D lies.
      scanned: how many leading axes scans run over.
      size: V.
    """

    rows: np.ndarray
    width: int
    scanned: int
    size: int

    @classmethod
    def of(cls, rows: int) -> TableView:
        """The table itself."""
        return cls(np.arange(rows, dtype=np.int32)[:, None], 1, 0, rows)

    def is_whole(self) -> bool:
        """Whether this is the table, or its transpose, as it is."""
        return self.rows.ndim == 2 and not self.scanned and np.array_equal(self.rows.reshape(-1), np.arange(self.size))

    def through(self, eqn: Any) -> TableView | None:
        """What an equation makes of the view; None where it is no view in which every row lies in one piece."""
        if not is_view(eqn):
            return None
        if not moves_axes(eqn):
            return self
        if eqn.primitive is primitives.transpose_p:
            order = eqn.params["permutation"]
            lead = range(self.scanned)
            moved = self.rows.transpose(*lead, *(self.scanned + axis for axis in order))
            return self._replace(rows=moved, width=self.scanned + order.index(self.width - self.scanned))
        before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        width = self.width - self.scanned
        if eqn.primitive is primitives.slice_p:
            bounds = zip(eqn.params["start_indices"], eqn.params["limit_indices"], strict=True)
            steps = eqn.params["strides"] or (1,) * len(before)
            taken = tuple(slice(*bound, step) for bound, step in zip(bounds, steps, strict=True))
            if after[width] != before[width]:
                return None
            taken = (*taken[:width], slice(None), *taken[width + 1 :])
            return self._replace(rows=self.rows[(*(slice(None),) * self.scanned, *taken)])
        if eqn.primitive.name == "split" or (eqn.primitive is primitives.reshape_p and eqn.params["dimensions"]):
            return None
        lies = [
            axis
            for axis, length in enumerate(after)
            if length == before[width] and math.prod(after[:axis]) == math.prod(before[:width])
        ]
        if not lies:
            return None
        shape = (*self.rows.shape[: self.scanned], *after[: lies[0]], 1, *after[lies[0] + 1 :])
        return self._replace(rows=self.rows.reshape(shape), width=self.scanned + lies[0])

    def over_scan(self) -> TableView | None:
        """What one iteration of a scan over the first axis sees; None where that axis is D."""
        return None if self.width == self.scanned else self._replace(scanned=self.scanned + 1)

    def columns(self, axes: DenseAxes, sizes: tuple[int, ...]) -> np.ndarray | None:
        """Where every row of the table is among the results of a product that contracts D.

        Args:
          axes: layout of the product.
          sizes: E, T, I and O of it.

        Returns:
          ``[V]``: number of the iteration times O, plus the column; -1 of rows that are not there. None where the product
          is another one.
        """
        free = [self.scanned + axis for axis in axes.free_axes()]
        if sizes[0] != 1 or sorted([*range(self.scanned), *free, self.width]) != list(range(self.rows.ndim)):
            return None
        found = np.full(self.size, -1, np.int32)
        found[self.rows.transpose(*range(self.scanned), *free, self.width).reshape(-1)] = np.arange(self.rows.size)
        return found
