"""What an objective is: a pure function of pair log-probabilities; types of their own for those that see the whole batch."""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from entangle.types import PairLogProbs

Objective = Callable[..., jax.Array]
"""A pure function ``(PairLogProbs, **hyperparameters) -> [B]`` losses.

A plain function promises that the loss of a pair depends on that pair alone. One that looks at other pairs of the batch is
a :class:`BatchObjective`; one that also remembers earlier batches is a :class:`RunningObjective`.
"""

_gathered = contextvars.ContextVar("gathered", default=False)  # whether ``across`` has the whole batch at hand

Memory = Any
"""What a running objective remembers: a pytree of scalars."""


class BatchObjective:
    """An objective in which the loss of a pair depends on the rest of the batch, which has to be the global one.

    Under ``jax.jit`` arrays are global: the value is the same on one device and on many, however the pairs lie. Inside
    ``jax.shard_map`` every device holds a part of the batch, so a call there is refused: see :func:`across`. A batch that
    is cut up to accumulate gradients is seen part by part.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> @losses.whole_batch
      ... def centred(lp, beta=0.1):
      ...     margin = lp.chosen - lp.rejected
      ...     return beta * (jnp.mean(margin) - margin)
      >>> isinstance(centred, losses.BatchObjective), isinstance(losses.aot, losses.BatchObjective)
      (True, True)
      >>> lp = PairLogProbs(*(jnp.array([0.0, 2.0]) for _ in range(6)))._replace(rejected=jnp.zeros(2))
      >>> centred(lp).tolist()
      [0.10000000149011612, -0.10000000149011612]
    """

    def __init__(self, function: Objective) -> None:
        """Wrap a function of the global batch."""
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, lp: PairLogProbs, **hyperparameters: Any) -> jax.Array:
        """Losses of the global batch, ``[B]``.

        Raises:
          ValueError: called on a part of the batch, inside ``jax.shard_map``.
        """
        axis_types = jax.sharding.get_abstract_mesh().axis_types
        if AxisType.Manual in axis_types and not _gathered.get():
            raise ValueError(
                f"{name_of(self)} looks at the whole batch, and inside jax.shard_map a device has a part of it: "
                "use losses.across(objective, axis_names)"
            )
        if AxisType.Explicit not in axis_types or _gathered.get():
            return self.function(lp, **hyperparameters)
        # Six numbers a pair: every device may have them all. The losses lie as the pairs do.
        lie = jax.typeof(lp.chosen).sharding
        everywhere = PairLogProbs(*(jax.sharding.reshard(jnp.asarray(field), P()) for field in lp))
        return jax.sharding.reshard(self.function(everywhere, **hyperparameters), lie)

    def with_hyperparameters(self, **hyperparameters: Any) -> BatchObjective:
        """The same objective with other defaults."""
        return BatchObjective(_named_partial(self.function, hyperparameters))


class RunningObjective(BatchObjective):
    """An objective with a memory of earlier batches: a running mean that its losses are held against.

    A training loop keeps ``memory = objective.init()``, and at every step first ``memory = objective.update(memory, lp)``,
    then takes the losses of ``objective.given(memory)``. Called like any other objective it is at its first step.

    Args:
      loss: ``(lp, memory, **hyperparameters) -> [B]``; the memory carries no gradient.
      init: the memory before the first batch.
      update: ``(memory, lp, **hyperparameters) -> memory``; of the hyperparameters it is given those it names.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -4.0, -4.0, -4.0, 2.0, 2.0)))
      >>> memory = losses.bco_pair_shifted.update(losses.bco_pair_shifted.init(), lp)
      >>> memory.mean.tolist(), losses.bco_pair_shifted.given(memory)(lp).shape
      (0.5, (1,))
    """

    def __init__(self, loss: Objective, init: Callable[[], Memory], update: Callable[..., Memory]) -> None:
        """Keep the three parts."""

        @functools.wraps(loss)
        def first_step(lp: PairLogProbs, **hyperparameters: Any) -> jax.Array:
            return loss(lp, self.update(init(), lp, **hyperparameters), **hyperparameters)

        super().__init__(first_step)
        signature = inspect.signature(loss)
        parameters = [p for name, p in signature.parameters.items() if name != "memory"]
        self.__signature__ = signature.replace(parameters=parameters)
        self._loss, self.init, self._update = loss, init, update
        self._defaults = {p.name: p.default for p in parameters[1:]}
        self._names = list(inspect.signature(update).parameters)[2:]

    def update(self, memory: Memory, lp: PairLogProbs, **hyperparameters: Any) -> Memory:
        """The memory after one more global batch."""
        every = self._defaults | hyperparameters
        return jax.lax.stop_gradient(self._update(memory, lp, **{name: every[name] for name in self._names}))

    def given(self, memory: Memory) -> BatchObjective:
        """The objective at a memory."""

        @functools.wraps(self._loss)
        def losses(lp: PairLogProbs, **hyperparameters: Any) -> jax.Array:
            return self._loss(lp, jax.lax.stop_gradient(memory), **hyperparameters)

        return BatchObjective(losses)

    def with_hyperparameters(self, **hyperparameters: Any) -> RunningObjective:
        """The same objective with other defaults."""
        return RunningObjective(_named_partial(self._loss, hyperparameters), self.init, self._update)


def whole_batch(function: Objective) -> BatchObjective:
    """Decorator: say that a function's losses depend on the whole batch, see :class:`BatchObjective`."""
    return BatchObjective(function)


def running(init: Callable[[], Memory], update: Callable[..., Memory]) -> Callable[[Objective], RunningObjective]:
    """Decorator: make a function ``(lp, memory, **hyperparameters)`` a :class:`RunningObjective`."""
    return lambda loss: RunningObjective(loss, init, update)


def across(objective: Objective, axis_names: str | Sequence[str]) -> Objective:
    """An objective for the inside of ``jax.shard_map``, where the pairs are spread over mesh axes.

    All devices' log-probabilities are gathered (six numbers a pair), the objective sees them all, and every device keeps the
    losses of its own pairs. Its gradient is that of the sum of all devices' losses.

    Args:
      objective: of the global batch; one of single pairs is right, too, and needs none of this.
      axis_names: of the mesh, in the order in which they cut the pairs.

    Returns:
      A function of this device's pairs, fields ``[B / devices]``, to their losses.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([-3.0, -5.0]) for _ in range(6)))
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> pairs = jax.sharding.PartitionSpec("data")
      >>> inside = jax.shard_map(losses.across(losses.aot, "data"), mesh=mesh, in_specs=(pairs,), out_specs=pairs)
      >>> bool((jax.jit(inside)(lp) == losses.aot(lp)).all())
      True
    """
    function = objective.function if isinstance(objective, BatchObjective) else objective

    @functools.wraps(function)
    def local(lp: PairLogProbs, **hyperparameters: Any) -> jax.Array:
        count = lp.chosen.shape[0]
        everywhere = jax.tree.map(lambda field: jax.lax.all_gather(field, axis_names, tiled=True), lp)
        token = _gathered.set(True)
        try:
            values = function(everywhere, **hyperparameters)
        finally:
            _gathered.reset(token)
        return jax.lax.dynamic_slice_in_dim(values, jax.lax.axis_index(axis_names) * count, count)

    return local


def with_hyperparameters(objective: Objective, **hyperparameters: Any) -> Objective:
    """The same objective, of the same type and name, with other defaults.

    Example:
      >>> import inspect
      >>> from entangle import losses
      >>> inspect.signature(losses.with_hyperparameters(losses.dpo, beta=0.3)).parameters["beta"].default
      0.3
    """
    if isinstance(objective, BatchObjective):
        return objective.with_hyperparameters(**hyperparameters)
    return _named_partial(objective, hyperparameters)


def name_of(objective: Objective) -> str:
    """Its name, or what Python prints where it has none."""
    return getattr(objective, "__name__", repr(objective))


def _named_partial(function: Objective, hyperparameters: dict[str, Any]) -> Objective:
    if not hyperparameters:
        return function
    fixed = functools.partial(function, **hyperparameters)
    fixed.__name__ = name_of(function)  # type: ignore[attr-defined]
    fixed.__doc__ = function.__doc__
    return fixed
