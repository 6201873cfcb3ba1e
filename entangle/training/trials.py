"""Many trials in one program: their states stacked along a leading axis, one after another or side by side on each device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

AXIS = "trial"
"""Name of the mesh axis over which trials are spread."""

T = TypeVar("T")


def stacked(trees: Sequence[T], multiple: int = 1) -> T:
    """Trees of K trials as one, every leaf with a leading axis of K; on the host where all leaves are numpy arrays.

    Args:
      trees: one a trial.
      multiple: the last one is repeated until their number is a multiple of this, so that as many devices share them.

    Example:
      >>> import numpy as np
      >>> from entangle.training.trials import stacked
      >>> stacked([{"x": np.ones(2)}, {"x": np.zeros(2)}, {"x": np.zeros(2)}], multiple=2)["x"].shape
      (4, 2)
    """
    trees = [*trees, *[trees[-1]] * (-len(trees) % multiple)]

    def stack(*leaves: Any) -> Any:
        return np.stack(leaves) if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp.stack(leaves)

    return jax.tree.map(stack, *trees)


def trial(tree: T, place: int) -> T:
    """One trial's tree out of a stacked one.

    Example:
      >>> import numpy as np
      >>> from entangle.training.trials import trial
      >>> trial({"x": np.arange(4).reshape(2, 2)}, 1)["x"].tolist()
      [2, 3]
    """
    return jax.tree.map(lambda leaf: leaf[place], tree)


def trial_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, ``trial``, over these devices; by default all that this process sees.

    Example:
      >>> from entangle import training
      >>> training.trial_mesh().axis_names
      ('trial',)
    """
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (AXIS,))


def trial_sharding(mesh: Mesh | None = None) -> Sharding:
    """How stacked trees lie: the trials spread over the mesh's devices, or all on the one device.

    Example:
      >>> from entangle import training
      >>> training.trials.trial_sharding(training.trial_mesh()).spec[0]
      'trial'
    """
    return SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, P(AXIS))


def map_trials(
    function: Callable[..., Any], *, mesh: Mesh | None = None, side_by_side: int | None = None
) -> Callable[..., Any]:
    """A function of one trial as a function of K stacked ones, to be jitted by the caller.

    The devices of the mesh share the trials and send one another nothing. On each device they run in turn, or several at
    once as one batched program: more of a large device is used so, and memory grows with their number.

    Args:
      function: ``(shared, *own)`` to a pytree; shared is what all trials have in common.
      mesh: with an axis ``trial``, whose size divides K (see ``stacked``); None for one device.
      side_by_side: trials at once on a device; None takes 1 on CPUs, where batched small products are slow, and all of the
        device's on accelerators.

    Returns:
      A function of shared and stacked arguments (leaves ``[K, ...]``) to stacked results.

    Raises:
      ValueError: side_by_side is below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from entangle import training
      >>> double = jax.jit(training.map_trials(lambda shared, own: shared + 2 * own, mesh=training.trial_mesh()))
      >>> double(jnp.array(1), jnp.arange(8)).tolist()
      [1, 3, 5, 7, 9, 11, 13, 15]
    """
    if side_by_side is not None and side_by_side < 1:
        raise ValueError(f"side_by_side {side_by_side}: at least one trial runs at a time")
    devices = 1 if mesh is None else mesh.shape[AXIS]

    def here(shared: Any, *own: Any) -> Any:
        count = jax.tree.leaves(own)[0].shape[0]
        at_once = side_by_side or (1 if jax.default_backend() == "cpu" else count)
        if at_once >= count > 1:
            return jax.vmap(lambda *one: function(shared, *one))(*own)
        return jax.lax.map(lambda one: function(shared, *one), own, batch_size=at_once if at_once > 1 else None)

    if devices == 1:
        return here

    def spread(shared: Any, *own: Any) -> Any:
        specs = (P(), *[P(AXIS)] * len(own))
        return jax.shard_map(here, mesh=mesh, in_specs=specs, out_specs=P(AXIS), check_vma=False)(shared, *own)

    return spread
