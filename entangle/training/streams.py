"""Streams of batches for the loop, made from the data's streams without touching their position; rows of several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from entangle import sharding

T = TypeVar("T")


class Batches(Protocol):
    """A seekable stream of batches: the data's side of the loop."""

    def __next__(self) -> tuple[Any, np.ndarray]:
        """The next batch, and the indices of its examples, ``[B]``, or of this process's alone."""

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-able."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position."""


class MappedBatches:
    """A stream whose batches are mapped by a function of the batch and its indices.

    Example:
      >>> from entangle.training.streams import MappedBatches
      >>> class Ones:
      ...     def __next__(self):
      ...         return 1, np.array([7])
      >>> next(MappedBatches(Ones(), lambda batch, index: batch + int(index[0])))[0]
      8
    """

    def __init__(self, inner: Batches, function: Callable[[Any, np.ndarray], Any]):
        """Map a stream.

        Args:
          inner: the stream.
          function: of the batch and its example indices ``[B]`` to the batch that the step takes.
        """
        self._inner, self._function = inner, function

    def __next__(self) -> tuple[Any, np.ndarray]:
        """The next batch, mapped, and its indices."""
        batch, index = next(self._inner)
        return self._function(batch, index), index

    def get_state(self) -> dict[str, Any]:
        """The position of the inner stream."""
        return self._inner.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position of the inner stream."""
        self._inner.set_state(state)


def process_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Rows of a batch of pairs that the devices of this process hold: what it has to load.

    Args:
      mesh: see ``sharding.make_mesh``.
      size: B, pairs of all processes.

    Returns:
      Their numbers in the batch, ascending.

    Raises:
      UserError: the pairs cannot be divided over the devices.

    Example:
      >>> import jax
      >>> from entangle import sharding
      >>> from entangle.training.streams import process_rows
      >>> process_rows(sharding.make_mesh("data=1", jax.devices()[:1]), 4).tolist()
      [0, 1, 2, 3]
    """
    sharding.check_pairs(mesh, size, "batch size")
    held = sharding.pair_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[rows] for rows in held]))


def global_rows(batch: T, mesh: Mesh, size: int) -> T:
    """The batch of all processes out of the rows of each: global arrays, pairs lying over the mesh as the table says.

    Args:
      batch: pytree of arrays, the rows ``process_rows(mesh, size)`` of each, on the host.
      mesh: see ``sharding.make_mesh``.
      size: B.

    Returns:
      A tree like it with leaves ``[B, ...]``.

    Raises:
      UserError: the pairs cannot be divided over the devices.

    Example:
      >>> import jax
      >>> from entangle import sharding
      >>> from entangle.training.streams import global_rows
      >>> global_rows(np.ones((4, 2)), sharding.make_mesh("data=1", jax.devices()[:1]), 4).sharding.spec
      P(('data', 'fsdp'),)
    """
    sharding.check_pairs(mesh, size, "batch size")
    lie = sharding.pair_sharding(mesh)

    def joined(leaf: Any) -> jax.Array:
        rows = np.asarray(leaf)
        return jax.make_array_from_process_local_data(lie, rows, (size, *rows.shape[1:]))

    return jax.tree.map(joined, batch)
