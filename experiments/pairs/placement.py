"""Where an experiment's arrays lie: on this process's first device, or over a mesh of the devices of all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from entangle import distributed, sharding, training
from entangle.errors import UserError
from entangle.training import TrainState
from entangle.types import Params

T = TypeVar("T")


class Placement(NamedTuple):
    """Where everything lies.

    Attributes:
      mesh: see ``sharding.make_mesh``; None leaves everything on the first device.

    Example:
      >>> from experiments.pairs.placement import Placement
      >>> Placement().rows(4) is None, Placement().jit(lambda x: x + 1)(2).tolist()
      (True, 3)
    """

    mesh: Mesh | None = None

    def jit(self, function: Callable[..., Any], places: Any = None, donate: tuple[int, ...] = ()) -> Callable[..., Any]:
        """Compile, the mesh being set; results lie as places say, whole on every device where these are None.

        Results take the place of the arguments with the numbers in ``donate``.
        """
        if self.mesh is None:
            return jax.jit(function, donate_argnums=donate)
        mesh = self.mesh
        lie = NamedSharding(mesh, P()) if places is None else places
        compiled = jax.jit(function, out_shardings=lie, donate_argnums=donate)

        def on_mesh(*arguments: Any) -> Any:
            with jax.set_mesh(mesh):
                return compiled(*arguments)

        return on_mesh

    def jit_step(self, step: Callable[..., Any], begin: Callable[[jax.Array], TrainState]) -> Callable[..., Any]:
        """Compile a training step, a function of frozen parameters, state and more.

        The next state lies where the state before lay, and takes its place; ``begin`` is only asked for shapes.
        """
        if self.mesh is None:
            return self.jit(step, donate=(1,))
        state = sharding.shardings(jax.eval_shape(begin, jax.random.key(0)), self.mesh)
        return self.jit(step, (state, NamedSharding(self.mesh, P())), donate=(1,))

    def begin(self, start: Params, make: Callable[[Params], TrainState]) -> TrainState:
        """The state that a run begins with, from parameters on the host, which stay as they are."""
        if self.mesh is None:
            return make(jax.tree.map(jnp.copy, start))
        places = sharding.shardings(jax.eval_shape(make, start), self.mesh)
        return jax.jit(make, out_shardings=places)(self.params(start))

    def params(self, start: Params) -> Params:
        """Parameters on the host, every process having all of them, where they lie in training."""
        if self.mesh is None:
            return start

        def placed(leaf: Any, place: NamedSharding) -> jax.Array:
            whole = np.asarray(leaf)
            return jax.make_array_from_callback(whole.shape, place, lambda part: whole[part])

        return jax.tree.map(placed, start, sharding.shardings(start, self.mesh))

    def host(self, params: Params) -> Params:
        """Parameters as :meth:`params` and everything else take them."""
        return params if self.mesh is None else distributed.to_host(params)

    def same(self, tree: Any) -> Any:
        """Arrays that every process has, as arguments of what :meth:`jit` made."""
        return jax.tree.map(jnp.asarray if self.mesh is None else np.asarray, tree)

    def rows(self, size: int) -> np.ndarray | None:
        """Rows of a batch of that size which this process loads; None for all."""
        return None if self.mesh is None else training.process_rows(self.mesh, size)

    def joined(self, batch: T, size: int) -> T:
        """The batch of all processes out of this one's rows."""
        return batch if self.mesh is None else training.global_rows(batch, self.mesh, size)


FIRST_DEVICE = Placement()


def place(mesh: str) -> Placement:
    """The placement that ``--mesh`` asks for.

    Args:
      mesh: as ``sharding.make_mesh`` takes it; empty for the first device, of several processes for a part of every
        parameter on every device.

    Raises:
      UserError: it names other axes than there are, or another number of devices.

    Example:
      >>> from experiments.pairs.placement import place
      >>> place("").mesh is None, place(f"data={jax.device_count()}").mesh.axis_names
      (True, ('data', 'fsdp', 'tensor'))
    """
    if not mesh and not distributed.several():
        return FIRST_DEVICE
    try:
        return Placement(sharding.make_mesh(mesh or {"fsdp": jax.device_count()}))
    except UserError as error:
        raise UserError(f"--{error}") from None
