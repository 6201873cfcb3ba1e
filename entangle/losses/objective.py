"""What an objective is: a pure function of pair log-probabilities; types of their own for those that see the whole batch."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

Objective = Callable[..., jax.Array]
"""A pure function ``(PairLogProbs, **hyperparameters) -> [B]`` losses.

A plain function promises that the loss of a pair depends on that pair alone. One that looks at other pairs of the batch is
a :class:`BatchObjective`; one that also remembers earlier batches is a :class:`RunningObjective`.
"""

# Whether the whole batch is at hand, inside of ``jax.shard_map``; and whether a first step would be a memory forgotten.
_whole = contextvars.ContextVar("whole", default=False)
_remembering = contextvars.ContextVar("remembering", default=False)

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

    def __init__(self, function: Objective, axis_names: str | Sequence[str] | None = None) -> None:
        """Wrap a function of the global batch; with axis names it is for the inside of ``jax.shard_map``."""
        functools.update_wrapper(self, function)
        self.function, self.axis_names = function, axis_names

    def __call__(self, lp: Any, *args: Any, **hyperparameters: Any) -> jax.Array:
        """Losses of the global batch, ``[B]``.

        Raises:
          ValueError: called on a part of the batch, inside ``jax.shard_map``.
        """
        return on_whole_batch(
            lp, lambda whole: self.function(whole, *args, **hyperparameters), name_of(self), self.axis_names
        )

    def __repr__(self) -> str:
        """Its type and name."""
        return f"<{type(self).__name__} {name_of(self)}>"

    def with_hyperparameters(self, **hyperparameters: Any) -> BatchObjective:
        """The same objective with other defaults."""
        return BatchObjective(_named_partial(self.function, hyperparameters), self.axis_names)

    def across(self, axis_names: str | Sequence[str]) -> BatchObjective:
        """The same objective for the inside of ``jax.shard_map``."""
        return BatchObjective(self.function, axis_names)


def on_whole_batch(
    lp: Any,
    function: Callable[[Any], Any],
    name: str,
    axis_names: str | Sequence[str] | None = None,
    *,
    by_pair: bool = True,
) -> Any:
    """What a function gives of the global batch, whatever part of it this code has.

    Args:
      lp: pytree of arrays ``[B, ...]``.
      function: of the same for the global batch.
      name: what a message calls it.
      axis_names: mesh axes over which the pairs are spread, inside ``jax.shard_map``.
      by_pair: whether the result is one number a pair: then the device's own come back, and they lie as the pairs do.

    Raises:
      ValueError: inside ``jax.shard_map`` without axis names, where only a part of the batch may be at hand.
    """
    axis_types = jax.sharding.get_abstract_mesh().axis_types
    if _whole.get():
        return function(lp)
    if axis_names is not None:
        return _gathered(lp, function, axis_names, by_pair)
    if AxisType.Manual in axis_types:
        raise ValueError(
            f"{name} looks at the whole batch, and inside jax.shard_map a device has a part of it: "
            "use losses.across(objective, axis_names), with () where it has the whole"
        )
    lie = jax.typeof(jax.tree.leaves(lp)[0]).sharding
    if AxisType.Explicit not in axis_types or lie.mesh.empty:
        return function(lp)
    # A few numbers a pair: every device may have them all.
    found = function(jax.tree.map(lambda field: jax.sharding.reshard(jnp.asarray(field), P()), lp))
    return jax.sharding.reshard(found, lie) if by_pair else found


def _gathered(lp: Any, function: Callable[[Any], Any], axis_names: str | Sequence[str], by_pair: bool) -> Any:
    everywhere = jax.tree.map(lambda x: jax.lax.all_gather(x, axis_names, tiled=True) if axis_names else x, lp)
    token = _whole.set(True)
    try:
        found = function(everywhere)
    finally:
        _whole.reset(token)
    if not by_pair or not axis_names:
        return found
    count = jax.tree.leaves(lp)[0].shape[0]
    return jax.lax.dynamic_slice_in_dim(found, jax.lax.axis_index(axis_names) * count, count)


class RunningObjective(BatchObjective):
    """An objective with a memory of earlier batches: a running mean that its losses are held against.

    A training loop keeps ``memory = objective.init()``, and at every step first ``memory = objective.update(memory, lp)``,
    then takes the losses of ``objective.given(memory)``. Called like any other objective it is at its first step; inside
    :func:`memory_needed` such a call is refused.

    Args:
      loss: ``(lp, memory, **hyperparameters) -> [B]``; the memory carries no gradient.
      init: the memory before the first batch.
      update: ``(memory, lp, **hyperparameters) -> memory``; of the loss's hyperparameters it is given those it names.
      axis_names: as for :class:`BatchObjective`.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -4.0, -4.0, -4.0, 2.0, 2.0)))
      >>> memory = losses.bco_pair_shifted.update(losses.bco_pair_shifted.init(), lp)
      >>> memory.mean.tolist(), losses.bco_pair_shifted.given(memory)(lp).shape
      (0.5, (1,))
    """

    def __init__(
        self,
        loss: Objective,
        init: Callable[[], Memory],
        update: Callable[..., Memory],
        axis_names: str | Sequence[str] | None = None,
    ) -> None:
        """Keep the three parts."""

        @functools.wraps(loss)
        def first_step(lp: Any, **hyperparameters: Any) -> jax.Array:
            return loss(lp, self._updated(init(), lp, hyperparameters), **hyperparameters)

        super().__init__(first_step, axis_names)
        signature = inspect.signature(loss)
        first, _, *others = signature.parameters.values()
        self.__signature__ = signature.replace(parameters=[first, *others])
        self._loss, self.init, self._update = loss, init, update
        self._defaults = {p.name: p.default for p in others if p.default is not inspect.Parameter.empty}
        self._names = set(list(inspect.signature(update).parameters)[2:])

    def __call__(self, lp: Any, *args: Any, **hyperparameters: Any) -> jax.Array:
        """Losses at the first step, ``[B]``.

        Raises:
          ValueError: inside :func:`memory_needed`; or as for a BatchObjective.
        """
        if _remembering.get():
            raise ValueError(
                f"{name_of(self)} remembers earlier batches, and inside of another function its memory is lost: train with "
                "it itself, or make a losses.RunningObjective of your own"
            )
        names = list(self.__signature__.parameters)[1:]
        return super().__call__(lp, **dict(zip(names, args, strict=False)), **hyperparameters)

    def update(self, memory: Memory, lp: Any, **hyperparameters: Any) -> Memory:
        """The memory after one more global batch; a batch without pairs changes nothing.

        Raises:
          ValueError: called on a part of the batch, inside ``jax.shard_map``.
        """
        if not jax.tree.leaves(lp)[0].shape[0]:
            return memory
        return on_whole_batch(
            lp,
            lambda whole: self._updated(memory, whole, hyperparameters),
            name_of(self),
            self.axis_names,
            by_pair=False,
        )

    def _updated(self, memory: Memory, lp: Any, hyperparameters: Mapping[str, Any]) -> Memory:
        every = {**self._defaults, **hyperparameters}
        found = self._update(memory, lp, **{name: value for name, value in every.items() if name in self._names})
        found = jax.tree.map(lambda new, old: new.astype(jnp.asarray(old).dtype), found, memory)
        return jax.lax.stop_gradient(found)

    def given(self, memory: Memory) -> BatchObjective:
        """The objective at a memory."""

        @functools.wraps(self._loss)
        def losses(lp: Any, *args: Any, **hyperparameters: Any) -> jax.Array:
            return self._loss(lp, jax.lax.stop_gradient(memory), *args, **hyperparameters)

        losses.__signature__ = self.__signature__  # type: ignore[attr-defined]
        return BatchObjective(losses, self.axis_names)

    def with_hyperparameters(self, **hyperparameters: Any) -> RunningObjective:
        """The same objective with other defaults."""
        return RunningObjective(_named_partial(self._loss, hyperparameters), self.init, self._update, self.axis_names)

    def across(self, axis_names: str | Sequence[str]) -> RunningObjective:
        """The same objective for the inside of ``jax.shard_map``: its update gathers, too."""
        return RunningObjective(self._loss, self.init, self._update, axis_names)


@contextlib.contextmanager
def memory_needed() -> Iterator[None]:
    """Inside, a running objective called as at its first step is refused: training would forget what it should remember.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> with losses.memory_needed():
      ...     losses.beta_dpo(PairLogProbs(*(jnp.ones(1) for _ in range(6))))
      Traceback (most recent call last):
      ValueError: beta_dpo remembers earlier batches, and inside of another function its memory is lost: ...
    """
    token = _remembering.set(True)
    try:
        yield
    finally:
        _remembering.reset(token)


def whole_batch(function: Objective) -> BatchObjective:
    """Decorator: say that a function's losses depend on the whole batch, see :class:`BatchObjective`."""
    return function if isinstance(function, BatchObjective) else BatchObjective(function)


def running(init: Callable[[], Memory], update: Callable[..., Memory]) -> Callable[[Objective], RunningObjective]:
    """Decorator: make a function ``(lp, memory, **hyperparameters)`` a :class:`RunningObjective`."""
    return lambda loss: RunningObjective(loss, init, update)


def across(objective: Objective, axis_names: str | Sequence[str]) -> BatchObjective:
    """An objective for the inside of ``jax.shard_map``, where the pairs are spread over mesh axes.

    All devices' log-probabilities are gathered (six numbers a pair), the objective sees them all, and every device keeps the
    losses of its own pairs. Its gradient is that of the sum of all devices' losses.

    Args:
      objective: of the global batch; one of single pairs is right, too, and needs none of this.
      axis_names: of the mesh, in the order in which they cut the pairs; ``()`` where every device has the whole batch.

    Returns:
      An objective of the same type, of this device's pairs, fields ``[B / devices]``. The update of a
      ``RunningObjective`` gathers, too, so that all devices remember the same.

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
    objective = as_objective(objective)
    return (
        objective.across(axis_names) if isinstance(objective, BatchObjective) else BatchObjective(objective, axis_names)
    )


def as_objective(objective: Objective) -> Objective:
    """An objective whose type is not hidden by ``functools.partial``.

    Example:
      >>> import functools
      >>> from entangle import losses
      >>> from entangle.losses.objective import as_objective
      >>> isinstance(as_objective(functools.partial(losses.aot, beta=0.1)), losses.BatchObjective)
      True
    """
    if isinstance(objective, functools.partial) and isinstance(objective.func, BatchObjective) and not objective.args:
        return objective.func.with_hyperparameters(**objective.keywords)
    return objective


def with_hyperparameters(objective: Objective, **hyperparameters: Any) -> Objective:
    """The same objective, of the same type and name, with other defaults.

    Example:
      >>> import inspect
      >>> from entangle import losses
      >>> inspect.signature(losses.with_hyperparameters(losses.dpo, beta=0.3)).parameters["beta"].default
      0.3
    """
    objective = as_objective(objective)
    if isinstance(objective, BatchObjective):
        return objective.with_hyperparameters(**hyperparameters)
    return _named_partial(objective, hyperparameters)


def name_of(objective: Objective) -> str:
    """Its name, or what Python prints where it has none."""
    return getattr(objective, "__name__", None) or object.__repr__(objective)


def _named_partial(function: Objective, hyperparameters: dict[str, Any]) -> Objective:
    if not hyperparameters:
        return function
    fixed = functools.partial(function, **hyperparameters)
    fixed.__name__ = name_of(function)  # type: ignore[attr-defined]
    fixed.__doc__ = function.__doc__
    return fixed
