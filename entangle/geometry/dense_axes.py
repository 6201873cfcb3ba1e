"""The layout of a product between a row's input and a weight, and the one layout in which its gradient is formed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class DenseAxes(NamedTuple):
    """How the axes of a ``dot_general`` between a row's input and a weight are laid out.

    Attributes:
      dimension_numbers: those of the operation.
      side: which operand is the weight.
      ranks: rank of the input and of the weight.
    """

    dimension_numbers: Any
    side: int
    ranks: tuple[int, int]

    def _split(self) -> tuple[tuple[int, ...], ...]:
        contracted, batch = self.dimension_numbers
        x_contracted, u_contracted = contracted[1 - self.side], contracted[self.side]
        x_batch, u_batch = batch[1 - self.side], batch[self.side]
        x_free = tuple(d for d in range(self.ranks[0]) if d not in (*x_contracted, *x_batch))
        u_free = tuple(d for d in range(self.ranks[1]) if d not in (*u_contracted, *u_batch))
        return tuple(map(tuple, (x_batch, x_free, x_contracted, u_batch, u_contracted, u_free)))

    def free_axes(self) -> tuple[int, ...]:
        """The weight's axes that the operation does not contract."""
        return self._split()[5]

    def sizes(self, x: tuple[int, ...], u: tuple[int, ...]) -> tuple[int, int, int, int]:
        """E, T, I and O of shapes of one row's input and of the weight."""
        batch, free, contracted, _, _, u_free = self._split()
        product = lambda shape, axes: math.prod(shape[a] for a in axes)  # noqa: E731
        return product(x, batch), product(x, free), product(x, contracted), product(u, u_free)

    def canonical(self, x: jax.Array, g: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Input and cotangent of all rows as ``[B, 2, E, T, I]`` and ``[B, 2, E, T, O]``."""
        batch, free, contracted, _, _, u_free = self._split()
        e, t, i, o = self.sizes(x.shape[2:], u.shape)
        x = jnp.transpose(x, (0, 1, *(2 + a for a in (*batch, *free, *contracted))))
        parts = (len(batch), len(free), len(u_free)) if self.side else (len(batch), len(u_free), len(free))
        place = [2 + sum(parts[:k]) for k in range(3)]
        axes = [tuple(range(place[k], place[k] + parts[k])) for k in range(3)]
        order = axes if self.side else [axes[0], axes[2], axes[1]]
        g = jnp.transpose(g, (0, 1, *(a for group in order for a in group)))
        return x.reshape(*x.shape[:2], e, t, i), g.reshape(*g.shape[:2], e, t, o)

    def weight_shaped(self, array: jax.Array, u: jax.Array) -> jax.Array:
        """``[E, I, O]`` in the weight's own layout."""
        _, _, _, batch, contracted, free = self._split()
        order = (*batch, *contracted, *free)
        inverse = tuple(order.index(axis) for axis in range(u.ndim))
        return jnp.transpose(array.reshape([u.shape[axis] for axis in order]), inverse).astype(u.dtype)


class DenseForm(NamedTuple):
    """How a dense place is computed.

    Attributes:
      axes: layout of its ``dot_general``.
      by_rows: form every row's gradient, which is then summed into the weight's, instead of two ``T x T`` matrices.
      precision: of the ``dot_general``, which all products of its gradients have, too.
    """

    axes: DenseAxes
    by_rows: bool
    precision: Any
