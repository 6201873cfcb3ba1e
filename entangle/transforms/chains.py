"""Chains whose updates begin as PairGradients: what is out of order is named, micro-batches are averaged before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from entangle.geometry.products import accumulator_dtype
from entangle.transforms.combine import require_alike, require_pair
from entangle.transforms.weightings import check_count
from entangle.types import PairGradients, Params


def chain_pair(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``optax.chain`` for PairGradients, with a clear error where a transform stands in the wrong place.

    What ``optax.chain`` does with the same transforms it does too, with the same state: use either. Before
    :func:`entangle.transforms.combine_pair` may stand what takes any tree, for example ``optax.clip_by_global_norm``, which
    then clips the two gradients together, by one factor; what keeps a tree like the parameters (momentum, Adam, weight
    decay, ``MultiSteps``, ``masked``, ``multi_transform``) stands after it.

    Args:
      transforms: of which one makes a tree of PairGradients.

    Returns:
      An optax transform whose updates are PairGradients going in and a tree like the parameters coming out.

    Raises:
      TypeError: at trace time, naming the transform and what to do.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from entangle import transforms
      >>> from entangle.types import PairGradients
      >>> tx = transforms.chain_pair(optax.scale_by_adam(), transforms.combine_pair(transforms.pcgrad()))
      >>> params = {"w": jnp.ones(2)}
      >>> tx.update(PairGradients(params, params), tx.init(params), params)
      Traceback (most recent call last):
      TypeError: transform 0 of the chain (scale_by_adam) takes one gradient tree, but was given PairGradients: put ...
    """
    chained = optax.chain(*transforms)
    steps = [optax.with_extra_args_support(t) for t in transforms]

    def update_fn(updates: Any, state: Any, params: Params | None = None, **extra_args: Any) -> tuple[Params, Any]:
        if len(state) != len(steps):
            raise ValueError(f"the state is of a chain of {len(state)} transforms, this one has {len(steps)}")
        states = []
        for index, (step, before) in enumerate(zip(steps, state, strict=True)):
            with naming_the_fix(f"transform {index} of the chain ({_name(transforms[index])})"):
                updates, after = step.update(updates, before, params, **extra_args)
            states.append(after)
        require_combined(updates)
        return updates, tuple(states)

    return optax.GradientTransformationExtraArgs(chained.init, update_fn)


@contextlib.contextmanager
def naming_the_fix(what: str) -> Iterator[None]:
    """Turn JAX's error about the structure of PairGradients into one that says what to do.

    Args:
      what: was updated inside.

    Raises:
      TypeError: what was inside was given PairGradients and cannot take them.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        # JAX names the class, whichever of the two trees comes first
        if f"{PairGradients.__module__}.{PairGradients.__name__}" not in str(error):
            raise
        raise TypeError(
            f"{what} takes one gradient tree, but was given PairGradients: put combine_pair (or another head of "
            "entangle.transforms) before it; to mask or partition, give combine_pair a group and put masked or "
            "multi_transform after it; to accumulate micro-batches, wrap the chain in accumulate_pairs or put MultiSteps "
            "after combine_pair"
        ) from error


def require_combined(updates: Any) -> None:
    """Refuse updates that are still PairGradients.

    Raises:
      TypeError: they are.

    Example:
      >>> from entangle.transforms.chains import require_combined
      >>> require_combined({"w": 1.0})
    """
    if isinstance(updates, PairGradients):
        raise TypeError(
            "the chain's updates are still PairGradients: no transform combines them; put combine_pair first"
        )


def _name(transform: optax.GradientTransformation) -> str:
    name = getattr(transform.update, "__qualname__", type(transform).__name__).split(".")[0]
    # the functions that make optimizers leave no name behind
    return "a chain itself, as optax.adam is" if name == "chain" else name


class AccumulatePairsState(NamedTuple):
    """What is accumulated.

    Attributes:
      mini_step: int32, micro-batches in the mean so far.
      mean: PairGradients, the mean over these.
      inner: state of the chain inside.
    """

    mini_step: jax.Array
    mean: PairGradients
    inner: Any


def accumulate_pairs(inner: optax.GradientTransformation, every: int) -> optax.GradientTransformationExtraArgs:
    """Average PairGradients over micro-batches of one size, and only then let the chain combine them and step.

    ``optax.MultiSteps`` cannot hold PairGradients. Placed after :func:`entangle.transforms.combine_pair` it averages what was
    combined already: for rules that are not linear in the gradients that is another step than the large batch's, and the
    rule's promise is then for micro-batches. Around the chain, this keeps the promise for the large batch.

    Scope: that of the chain inside, for the mean over ``every`` micro-batches. In between updates are zero. Memory: two trees
    like the parameters, in float32 where they are narrower.

    Args:
      inner: a chain that takes PairGradients.
      every: micro-batches a step.

    Returns:
      An optax transform whose updates are PairGradients going in and a tree like the parameters coming out.

    Raises:
      ValueError: ``every`` is no whole number from 1 up; or, at trace time, when the gradients are not like the parameters.
      TypeError: at trace time, when the updates are not PairGradients of floating arrays.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from entangle import transforms
      >>> from entangle.types import PairGradients
      >>> tx = transforms.accumulate_pairs(optax.chain(transforms.combine_pair(transforms.margin()), optax.sgd(1.0)), 2)
      >>> params = jnp.zeros(1)
      >>> state = tx.init(params)
      >>> for chosen in (1.0, 3.0):
      ...     updates, state = tx.update(PairGradients(jnp.array([chosen]), jnp.zeros(1)), state, params)
      ...     print(updates.tolist())
      [0.0]
      [2.0]
    """
    every = check_count("every", every, 1)
    inner = optax.with_extra_args_support(inner)

    def zeros(params: Params) -> PairGradients:
        # arrays of their own for both: what shares a buffer cannot be donated
        return PairGradients(
            *(jax.tree.map(lambda leaf: jnp.zeros_like(leaf, accumulator_dtype(leaf)), params) for _ in range(2))
        )

    def init_fn(params: Params) -> AccumulatePairsState:
        return AccumulatePairsState(jnp.zeros((), jnp.int32), zeros(params), inner.init(params))

    def update_fn(
        updates: PairGradients, state: AccumulatePairsState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, AccumulatePairsState]:
        require_pair(updates, "accumulate_pairs")
        require_alike("accumulate_pairs", "gradients and the state's mean of them", updates.chosen, state.mean.chosen)
        seen = state.mini_step + 1

        def moved(mean: jax.Array, new: jax.Array) -> jax.Array:
            return mean + (new.astype(mean.dtype) - mean) / seen.astype(mean.dtype)

        mean = PairGradients(*(jax.tree.map(moved, m, u) for m, u in zip(state.mean, updates, strict=True)))
        like = updates.chosen

        def step(mean: PairGradients, inside: Any) -> tuple[Params, AccumulatePairsState]:
            narrow = PairGradients(*(jax.tree.map(lambda m, g: m.astype(g.dtype), side, like) for side in mean))
            out, after = inner.update(narrow, inside, params, **extra_args)
            require_combined(out)
            # as MultiSteps does where gradients are narrower or wider than parameters: the state keeps its dtypes
            after = jax.tree.map(lambda new, old: jnp.asarray(new).astype(jnp.asarray(old).dtype), after, inside)
            return out, AccumulatePairsState(jnp.zeros_like(seen), jax.tree.map(jnp.zeros_like, mean), after)

        def wait(mean: PairGradients, inside: Any) -> tuple[Params, AccumulatePairsState]:
            # like what a step gives, whatever dtype that is, and where the gradients' mean lies: gradients that are closed
            # over have no sharding in here
            given = jax.eval_shape(step, mean, inside)[0]
            out = jax.tree.map(lambda s, m: jnp.zeros_like(m, s.dtype), given, mean.chosen)
            return out, AccumulatePairsState(seen, mean, inside)

        return jax.lax.cond(seen == every, step, wait, mean, state.inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
