"""Wrappers of whole chains that have the last word on the update, so that their promise holds under any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from entangle.geometry.products import accumulator_dtype, inner_product
from entangle.paths import nodes_of
from entangle.transforms.chains import AccumulatePairsState, naming_the_fix, require_combined
from entangle.transforms.combine import require_pair
from entangle.transforms.span import Leaves, RetainState, Span, counted, remember_now, share_removed, wide
from entangle.transforms.weightings import check_count, check_function, inverse, root
from entangle.types import PairGradients, Params


class ProtectChosenState(NamedTuple):
    """What :func:`protect_chosen` did.

    Attributes:
      inner: state of the chain inside.
      removed: of the last step: share of the update's squared norm that was taken; 0 where it was left alone.
    """

    inner: Any
    removed: jax.Array


class RetainInvariantState(NamedTuple):
    """What :func:`retain_invariant` remembers.

    Attributes:
      inner: state of the chain inside.
      retain: earlier gradients, and the share of the update that was removed.
    """

    inner: Any
    retain: RetainState


def retain_invariant(
    inner: optax.GradientTransformation,
    memory: int = 8,
    *,
    where: Callable[[str], bool] | None = None,
    remember: Callable[[str], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Take from a whole chain's update what would change the retained sums, whatever optimizer is in the chain.

    The guarantee of :func:`project_retain` is for the gradient and breaks where an optimizer rescales it, adds momentum or
    decays weights. Here the last word is had after the optimizer: its update loses, in the Euclidean metric, its part in
    the span of the chosen gradients of this step and of up to ``memory`` steps before.

    Scope: the chosen batch sum, that of ``d_w log pi_w`` with the coefficients held, is unchanged to first order by the
    step that is made, for any optimizer, to the rounding of updates and parameters; earlier batches' as far as their
    gradients are still what they were. In bfloat16 a parameter's own rounding of the step can be larger than what is
    removed: keep parameters in float32, for a promise about the step that they make.

    State: that of the chain and ``memory`` times the remembered parameters, sharded as they are, in their dtype.

    Args:
      inner: a chain that takes PairGradients, for example ``optax.chain(combine_pair(fixed(chosen=0)), optax.adam(1e-3))``.
      memory: earlier retained gradients that are kept beside the current one.
      where: a parameter's path to whether it is trained; what the chain does to the others is left alone, and counts for
        nothing. Name here what the chain freezes: else the projection would move it.
      remember: as for :func:`project_retain`.

    Returns:
      An optax transform whose updates are PairGradients going in and a tree like the parameters coming out.

    Raises:
      ValueError: memory is no whole number from 0 up; or, at init, when micro-batches are accumulated inside; or, at trace
        time, when the gradients are not like the parameters.
      TypeError: an argument is of another type; or, at trace time, when the updates are not PairGradients of floating arrays.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from entangle import transforms
      >>> from entangle.types import PairGradients
      >>> forget = optax.chain(transforms.combine_pair(transforms.fixed(chosen=0.0)), optax.sign_sgd(0.5))
      >>> tx = transforms.retain_invariant(forget, memory=0)
      >>> params = jnp.zeros(2)
      >>> gradients = PairGradients(chosen=jnp.array([2.0, 0.0]), rejected=jnp.array([1.0, 3.0]))
      >>> updates, state = tx.update(gradients, tx.init(params), params)
      >>> [round(x, 3) for x in updates.tolist()], round(float(state.retain.removed), 3)
      ([0.0, -0.5], 0.5)
    """
    memory = check_count("memory", memory, 0)
    for name, function in ("where", where), ("remember", remember):
        check_function(name, function, "a parameter's path")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Params) -> RetainInvariantState:
        zero = jnp.zeros((), accumulator_dtype(params))
        empty = Leaves(params, where, remember).empty(params, memory)
        inside = inner.init(params)
        _refuse_accumulation(inside, "retain_invariant")
        return RetainInvariantState(inside, RetainState(empty, jnp.zeros((), jnp.int32), (), zero))

    def update_fn(
        updates: PairGradients, state: RetainInvariantState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, RetainInvariantState]:
        require_pair(updates, "retain_invariant")
        step, inside = _inner_step(inner, "retain_invariant", updates, state.inner, params, extra_args)
        leaves = Leaves(updates.chosen, where, remember)
        leaves.require("retain_invariant", updates.chosen, state.retain)
        retain, own = leaves.trained(updates.chosen), leaves.trained(step)
        given, kept = wide(own), state.retain
        span = Span(wide(retain), jax.tree.leaves(kept.earlier), leaves.remembered, None)
        left = span.remove(given)
        after = span.square(left)
        finite = jnp.isfinite(after + span.square(span.now))
        # a step that the chain has passed over, as optax.apply_if_finite does, stays so
        passed = span.square(given) == 0
        out = [
            jnp.where(finite, a, jnp.where(passed, 0, jnp.nan)).astype(b.dtype) for a, b in zip(left, own, strict=True)
        ]
        earlier = remember_now(kept, [retain[i] for i in span.remembered], finite)
        return leaves.back(step, out), RetainInvariantState(
            inside,
            RetainState(
                earlier, counted(kept.seen, finite), (), share_removed(span.square(given), after, kept.removed)
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def protect_chosen(
    inner: optax.GradientTransformation, *, where: Callable[[str], bool] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Take from a whole chain's update what would lower the chosen batch sum, whatever optimizer is in the chain.

    Where ``<chosen, update>`` is negative, the update loses its component along ``chosen``; else it is left alone. It is
    :func:`entangle.transforms.one_sided` for the step that is really made: momentum, an adaptive metric and weight decay
    included.

    It stands around the whole chain, learning rate included; micro-batches are accumulated around it:
    ``accumulate_pairs(protect_chosen(chain), every)``. Where a gradient, or the square of its norm, is not finite the update
    is NaN, whatever the chain inside made of it; ``optax.apply_if_finite(optax.identity(), 5)`` after it, in a chain, passes
    over such steps.

    Scope: the chosen batch sum does not fall to first order, whatever the optimizer, with positive coefficients, to the
    rounding of updates and parameters: in bfloat16 that can be larger than what is removed, so keep both in float32. It is
    the sum of ``d_w log pi_w`` with the coefficients held, whose gradient ``chosen`` is; the plain sum of log pi_w, in
    which pairs count in full that the loss has almost done with, can fall. Second order is not touched: where the first
    order is held at 0 step after step, the sum still drifts down by curvature. Nothing is promised for single pairs, for
    the rejected side or for other batches.

    Args:
      inner: a chain that takes PairGradients, for example ``optax.chain(combine_pair(margin()), optax.adamw(1e-5))``.
      where: a parameter's path to whether it is trained; what the chain does to the others is left alone, and counts for
        nothing. Name here what the chain freezes: else the correction would move it.

    Returns:
      An optax transform whose updates are PairGradients going in and a tree like the parameters coming out; its state is a
      ProtectChosenState.

    Raises:
      TypeError: at trace time, when the updates are not PairGradients.
      ValueError: at init, when micro-batches are accumulated inside.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from entangle import transforms
      >>> from entangle.types import PairGradients
      >>> plain = optax.chain(transforms.combine_pair(transforms.margin()), optax.sign_sgd(0.5))
      >>> tx = transforms.protect_chosen(plain)
      >>> params = jnp.zeros(2)
      >>> gradients = PairGradients(chosen=jnp.array([1.0, 0.0]), rejected=jnp.array([2.0, 1.0]))
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> [round(x, 3) for x in updates.tolist()]  # alone [-0.5, -0.5], which lowers the chosen response
      [0.0, -0.5]
    """
    check_function("where", where, "a parameter's path")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Params) -> ProtectChosenState:
        state = inner.init(params)
        _refuse_accumulation(state, "protect_chosen")
        return ProtectChosenState(state, jnp.zeros((), accumulator_dtype(params)))

    def update_fn(
        updates: PairGradients, state: ProtectChosenState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, ProtectChosenState]:
        require_pair(updates, "protect_chosen")
        step, inside = _inner_step(inner, "protect_chosen", updates, state.inner, params, extra_args)
        leaves = Leaves(updates.chosen, where, None)
        chosen, own = leaves.trained(updates.chosen), leaves.trained(step)
        square, length = inner_product(chosen, chosen), inner_product(own, own)
        against = jnp.minimum(inner_product(chosen, own), 0)
        # a step that the chain has passed over, as optax.apply_if_finite does, stays so
        bad = jnp.where(length == 0, 0, jnp.nan)
        share = jnp.where(jnp.isfinite(square), against * inverse(square), bad)
        cosine = against * inverse(root(square)) * inverse(root(length))
        removed = jnp.where(jnp.isfinite(square), jnp.minimum(cosine**2, 1), bad)

        def without(u: jax.Array, g: jax.Array) -> jax.Array:
            wide = accumulator_dtype(u)
            part = jnp.where(share == 0, 0, share.astype(wide) * g.astype(wide))
            return (u.astype(wide) - part).astype(u.dtype)

        out = leaves.back(step, [without(u, g) for u, g in zip(own, chosen, strict=True)])
        return out, ProtectChosenState(inside, removed.astype(state.removed.dtype))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _inner_step(
    inner: optax.GradientTransformationExtraArgs,
    name: str,
    updates: PairGradients,
    state: Any,
    params: Params | None,
    extra_args: dict[str, Any],
) -> tuple[Params, Any]:
    with naming_the_fix(f"the chain inside of {name}"):
        step, state = inner.update(updates, state, params, **extra_args)
    require_combined(step)
    return step, state


def _refuse_accumulation(state: Any, name: str) -> None:
    """What is made of many micro-batches cannot be held to what the last one says."""
    if nodes_of(state, AccumulatePairsState) or nodes_of(state, optax.MultiStepsState):
        raise ValueError(
            f"{name} knows the last micro-batch only: accumulate around it, as in accumulate_pairs({name}(chain), every)"
        )
