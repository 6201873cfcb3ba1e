"""Projections with memory: steps that leave what earlier gradients retain as it is, to first order.

The retained side is ``chosen``, the side to forget ``rejected``: descending along PairGradients.rejected lowers the rejected
log-probabilities. A step changes the retained sum by its inner product with ``chosen``, so a step orthogonal to the span of
retained gradients leaves it unchanged to first order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from entangle.geometry.products import accumulator_dtype, inner_product
from entangle.transforms.combine import require_pair
from entangle.transforms.span import Leaves, RetainState, Span, counted, remember_now, share_removed, wide
from entangle.transforms.weightings import check, check_count, check_function, inverse, root
from entangle.types import PairGradients, Params


class AdamMetric(NamedTuple):
    """The metric in which Adam measures a gradient: products are weighed by ``1 / (sqrt(v) + eps)``.

    Attributes:
      b2: decay of the second moment, as the optimizer after the projection has it.
      eps: as the optimizer has it.
    """

    b2: float = 0.999
    eps: float = 1e-8


def project_retain(
    memory: int = 8,
    *,
    retain_weight: float = 0.0,
    radius: float | None = None,
    metric: AdamMetric | None = None,
    where: Callable[[str], bool] | None = None,
    remember: Callable[[str], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Geometric-disentanglement unlearning: the rejected gradient without its part in the span of retained gradients.

    With U the chosen gradient of this step and of up to ``memory`` steps before, and H the metric,
    ``P = I - U (U^T H U)^-1 U^T H``; the head of the chain gives ``P rejected - retain_weight chosen``. It stands where
    :func:`entangle.transforms.combine_pair` would.

    Scope: under a plain gradient step, with ``retain_weight`` 0, the chosen batch sum, that of ``d_w log pi_w`` with the
    coefficients held, is unchanged to first order, and the chosen sums of earlier batches as far as their gradients are
    still what they were; with a weight they change by what the chosen gradient alone would change them. Where earlier
    gradients are nearly dependent on each other theirs holds to one part in a hundred, the current one's always. Under
    Adam it does not hold for the Euclidean metric; in Adam's, without momentum and weight decay, it holds up to how far
    the second moment after the step differs from the one that the projection foresees, which at the first steps is far.
    :func:`entangle.transforms.retain_invariant` holds it under any optimizer.

    Where a gradient is not finite the update is NaN and the state stays as it was, so that ``optax.apply_if_finite`` around
    the optimizer after it passes over the step as a whole.

    State: ``memory`` times the remembered parameters, sharded as they are, in their dtype; in Adam's metric once the
    parameters more.

    Args:
      memory: earlier retained gradients that are kept beside the current one.
      retain_weight: of the chosen gradient itself in the step, 0 or more: the joint step.
      radius: length, in the metric, to which the projected forget gradient is brought: the boundary of a trust region.
        None leaves its length as it is.
      metric: in which P projects and lengths are measured; None is the Euclidean one, right for plain gradient steps.
      where: a parameter's path, as ``jax.tree_util.keystr(path, simple=True, separator="/")`` writes it, to whether it is
        trained; the others get zero. None trains all.
      remember: path to whether a trained parameter's share of earlier gradients is remembered; None remembers all. The
        current one always counts in full.

    Returns:
      An optax transform whose updates are PairGradients going in and a tree like the parameters coming out.

    References:
      Zhou et al., Geometric-disentanglement Unlearning, arXiv 2511.17100. There the second moment is the optimizer's before
      the step; here what goes out is projected once more, with the second moment that it itself leads to.

    Raises:
      ValueError: a setting is outside of its range; or, at trace time, when the gradients are not like the parameters.
      TypeError: a setting is of another type; or, at trace time, when the updates are not PairGradients of floating arrays.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from entangle import transforms
      >>> from entangle.types import PairGradients
      >>> tx = optax.chain(transforms.project_retain(memory=1), optax.sgd(1.0))
      >>> params = jnp.zeros(3)
      >>> retain = jnp.array([1.0, 0.0, 0.0]), jnp.array([1.0, 1.0, 0.0])
      >>> state = tx.init(params)
      >>> for g in retain:
      ...     updates, state = tx.update(PairGradients(chosen=g, rejected=jnp.array([3.0, 2.0, 1.0])), state, params)
      >>> [round(x, 6) + 0.0 for x in updates.tolist()]  # orthogonal to both
      [0.0, 0.0, -1.0]
    """
    memory = check_count("memory", memory, 0)
    for name, function in ("where", where), ("remember", remember):
        check_function(name, function, "a parameter's path")
    check("retain_weight", retain_weight, 0.0, float("inf"), with_low=True)
    if radius is not None:
        check("radius", radius, 0.0, float("inf"))
    if metric is not None:
        if not isinstance(metric, AdamMetric):
            raise TypeError(f"metric: AdamMetric(), with the optimizer's b2 and eps, or None; got {metric!r}")
        check("b2", metric.b2, 0.0, 1.0, with_low=True)
        check("eps", metric.eps, 0.0, float("inf"), with_low=True)

    def init_fn(params: Params) -> RetainState:
        zero = jnp.zeros((), accumulator_dtype(params))
        leaves = Leaves(params, where, remember)
        second = () if metric is None else leaves.second_moment(params)
        return RetainState(leaves.empty(params, memory), jnp.zeros((), jnp.int32), second, zero)

    def update_fn(
        updates: PairGradients, state: RetainState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, RetainState]:
        del params, extra_args
        require_pair(updates, "project_retain")
        leaves = Leaves(updates.chosen, where, remember)
        leaves.require("project_retain", updates.chosen, state)
        seconds, structure = jax.tree.flatten(state.second_moment)
        retain, forget = leaves.trained(updates.chosen), wide(leaves.trained(updates.rejected))
        span = Span(wide(retain), jax.tree.leaves(state.earlier), leaves.remembered, None)
        if metric is not None:
            span = span._replace(weights=_adam_weights(metric, seconds, state.seen))
        projected = span.remove(forget)
        measured = jnp.zeros_like(state.removed)
        if metric is not None:
            # a square that overflows in the second moment would weigh nothing, and so hide
            measured = inner_product(projected, projected).astype(measured.dtype)
            foreseen = [_moved(metric, v, f) for v, f in zip(seconds, projected, strict=True)]
            span = span._replace(weights=_adam_weights(metric, foreseen, state.seen + 1))
            projected = span.remove(forget)
        before, after = span.square(forget), span.square(projected)
        # what is left of a gradient that lies in the span is rounding, and must not be brought to any length
        left = after > (LEFT_OVER**2) * before
        length = 1 if radius is None else jnp.asarray(radius, after.dtype) * inverse(root(after))
        scale = jnp.where(left, length, 0).astype(after.dtype)
        finite = jnp.isfinite(after + span.square(span.now)) & jnp.isfinite(measured)
        scale = jnp.where(finite, scale, jnp.nan)
        mixed = [
            scale.astype(f.dtype) * f - jnp.asarray(retain_weight, f.dtype) * r.astype(f.dtype)
            for f, r in zip(projected, retain, strict=True)
        ]
        out = [m.astype(r.dtype) for m, r in zip(mixed, retain, strict=True)]
        if metric is not None:
            seconds = [jnp.where(finite, _moved(metric, v, m), v) for v, m in zip(seconds, mixed, strict=True)]
        kept = [retain[i] for i in span.remembered]
        return leaves.back(updates.chosen, out, frozen=True), RetainState(
            remember_now(state, kept, finite),
            counted(state.seen, finite),
            jax.tree.unflatten(structure, seconds),
            share_removed(before, after, state.removed),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# Relative length below which what is left of a projected vector is rounding: it is larger where retained gradients are nearly
# dependent.
LEFT_OVER = 1e-5


def _adam_weights(metric: AdamMetric, second_moment: list[jax.Array], steps: jax.Array) -> list[jax.Array]:
    """``1 / (sqrt(v) + eps)`` of the second moment after so many steps; before the first one, the Euclidean metric."""

    def weight(v: jax.Array) -> jax.Array:
        begun = steps > 0
        debias = 1 - jnp.asarray(metric.b2, v.dtype) ** jnp.where(begun, steps, 1).astype(v.dtype)
        return jnp.where(begun, inverse(root(v / debias) + jnp.asarray(metric.eps, v.dtype)), 1)

    return [weight(v) for v in second_moment]


def _moved(metric: AdamMetric, v: jax.Array, f: jax.Array) -> jax.Array:
    share = jnp.asarray(metric.b2, v.dtype)
    return share * v + (1 - share) * f.astype(v.dtype) ** 2
