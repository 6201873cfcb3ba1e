"""What the geometry of a pair says about one step: predicted changes, Conditions 1 and 2, the cases.

All functions are elementwise: geometry and coefficients of one shape, ``[B]`` or scalars.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from entangle.geometry.pairs import count_pairs
from entangle.types import LogProbFn, PairGeometry, Params


class Case(enum.IntEnum):
    """What one small gradient step does to the two log-probabilities of a pair (arXiv 2410.13828, Table 1).

    With equal positive coefficients only the first three can occur. ``REVERSED`` needs unequal or negative
    coefficients. ``INACTIVE`` is a pair whose two coefficients are both zero (a hinge that is off).
    """

    IDEAL = 0
    BOTH_FALL = 1
    BOTH_RISE = 2
    REVERSED = 3
    INACTIVE = 4


class PairChanges(NamedTuple):
    """Changes of the two log-probabilities, in nats.

    Attributes:
      chosen: change of log pi_w.
      rejected: change of log pi_l.
    """

    chosen: jax.Array
    rejected: jax.Array


def predicted_changes(
    geometry: PairGeometry, d_w: jax.Array, d_l: jax.Array, learning_rate: float | jax.Array = 1.0
) -> PairChanges:
    """First-order changes of a pair under one plain gradient step on that pair alone.

    ``delta log pi_w = eta (d_w |g_w|^2 - d_l <g_w, g_l>)``, ``delta log pi_l = eta (d_w <g_w, g_l> - d_l |g_l|^2)``.

    Args:
      geometry: fields of any one shape.
      d_w: coefficient of the chosen side, any sign.
      d_l: coefficient of the rejected side, any sign.
      learning_rate: eta.

    Returns:
      PairChanges of the same shape.

    Raises:
      ValueError: a coefficient is neither a scalar nor of the geometry's shape.

    References:
      Yuan et al., arXiv 2410.13828, equations 4 and 5 (there with d_w = d_l).

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> s = geometry.PairGeometry(jnp.array(1.0), jnp.array(4.0), jnp.array(1.5))
      >>> change = geometry.predicted_changes(s, jnp.array(1.0), jnp.array(1.0))
      >>> float(change.chosen), float(change.rejected)
      (-0.5, -2.5)
    """
    shape = jnp.shape(geometry.inner_product)
    if not {jnp.shape(d_w), jnp.shape(d_l)} <= {shape, ()}:
        raise ValueError(f"d_w, d_l: the geometry has shape {shape}, got {jnp.shape(d_w)} and {jnp.shape(d_l)}")
    chosen = d_w * geometry.chosen_sq_norm - d_l * geometry.inner_product
    rejected = d_w * geometry.inner_product - d_l * geometry.rejected_sq_norm
    rate = jnp.asarray(learning_rate, chosen.dtype)
    return PairChanges(rate * chosen, rate * rejected)


def condition_1(geometry: PairGeometry) -> jax.Array:
    """The ideal case for equal coefficients: ``<g_w, g_l> <= min(|g_w|^2, |g_l|^2)``; boolean, elementwise.

    References:
      Yuan et al., arXiv 2410.13828, Condition 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> bool(geometry.condition_1(geometry.PairGeometry(jnp.array(1.0), jnp.array(4.0), jnp.array(1.5))))
      False
    """
    return geometry.inner_product <= jnp.minimum(geometry.chosen_sq_norm, geometry.rejected_sq_norm)


def condition_2(geometry: PairGeometry, d_w: jax.Array, d_l: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether the chosen log-probability does not fall, and whether the rejected one does not rise, to first order.

    The paper divides by coefficients it takes as positive; the two inequalities are kept undivided here, so that zero
    and negative coefficients are right too: ``d_l <g_w, g_l> <= d_w |g_w|^2`` and ``d_w <g_w, g_l> <= d_l |g_l|^2``.

    Returns:
      Two boolean arrays of the inputs' shape.

    References:
      Yuan et al., arXiv 2410.13828, Condition 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> s = geometry.PairGeometry(jnp.array(1.0), jnp.array(4.0), jnp.array(1.5))
      >>> [bool(holds) for holds in geometry.condition_2(s, jnp.array(2.0), jnp.array(1.0))]
      [True, True]
    """
    change = predicted_changes(geometry, d_w, d_l)
    return change.chosen >= 0, change.rejected <= 0


def case_of(geometry: PairGeometry, d_w: jax.Array, d_l: jax.Array) -> jax.Array:
    """The case of every pair, as int32 values of :class:`Case`; -1, which is none of them, where a number is not one.

    The inequalities are the paper's, equality included: a pair of zero gradients, which nothing moves, is ``IDEAL``.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> s = geometry.PairGeometry(jnp.array(1.0), jnp.array(4.0), jnp.array(1.5))
      >>> geometry.Case(int(geometry.case_of(s, jnp.array(1.0), jnp.array(1.0)))).name
      'BOTH_FALL'
    """
    change = predicted_changes(geometry, d_w, d_l)
    chosen_holds, rejected_holds = change.chosen >= 0, change.rejected <= 0
    case = jnp.where(
        chosen_holds,
        jnp.where(rejected_holds, Case.IDEAL, Case.BOTH_RISE),
        jnp.where(rejected_holds, Case.BOTH_FALL, Case.REVERSED),
    )
    case = jnp.where((d_w == 0) & (d_l == 0), Case.INACTIVE, case)
    return jnp.where(jnp.isnan(change.chosen) | jnp.isnan(change.rejected), -1, case).astype(jnp.int32)


def _safe_ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    zero = denominator == 0  # not `> 0`: a NaN must stay one
    return jnp.where(zero, 0, numerator / jnp.where(zero, 1, denominator))


def cosine(geometry: PairGeometry) -> jax.Array:
    """``cos(g_w, g_l)``, in [-1, 1] up to rounding; 0 where a gradient is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> float(geometry.cosine(geometry.PairGeometry(jnp.array(1.0), jnp.array(4.0), jnp.array(1.5))))
      0.75
    """
    norms = jnp.sqrt(geometry.chosen_sq_norm) * jnp.sqrt(geometry.rejected_sq_norm)
    return _safe_ratio(geometry.inner_product, norms)


def condition_ratio(geometry: PairGeometry) -> jax.Array:
    """``<g_w, g_l> / min(|g_w|^2, |g_l|^2)``: at most 1 exactly when Condition 1 holds; 0 where a gradient is zero.

    The analysis code of arXiv 2410.13828 takes ``|g_w|^2`` twice; this is the ratio that its text defines.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> float(geometry.condition_ratio(geometry.PairGeometry(jnp.array(1.0), jnp.array(4.0), jnp.array(1.5))))
      1.5
    """
    return _safe_ratio(geometry.inner_product, jnp.minimum(geometry.chosen_sq_norm, geometry.rejected_sq_norm))


def first_order_changes(log_prob_fn: LogProbFn, params: Params, updates: Params, batch: Any) -> PairChanges:
    """``<g, update>`` for every row: the true first-order change under an actual update, whatever made it.

    One forward-mode derivative for all rows at once. Unlike :func:`predicted_changes` it includes the optimizer's
    metric, momentum, weight decay and the other pairs of the batch.

    Args:
      log_prob_fn: see :func:`entangle.geometry.vjp_with_geometry`.
      params: parameters before the update.
      updates: what is added to them, a pytree like params; wider ones are rounded to the parameters' precision.
      batch: pytree of arrays with leading axes ``[B, 2]``.

    Returns:
      PairChanges of fields ``[B]``, in nats.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> features = jnp.array([[[1.0, 0.0], [1.0, 1.0]]])
      >>> change = geometry.first_order_changes(lambda p, x: x @ p, jnp.zeros(2), jnp.array([0.0, 0.5]), features)
      >>> change.chosen.tolist(), change.rejected.tolist()
      ([0.0], [0.5])
    """
    return _first_order(log_prob_fn, params, updates, batch)[1]


class StepChanges(NamedTuple):
    """What a step did to the log-probabilities of some pairs.

    Attributes:
      first_order: ``<g, update>`` of every row, see :func:`first_order_changes`.
      realised: log-probabilities after minus before.
    """

    first_order: PairChanges
    realised: PairChanges


def step_changes(
    log_prob_fn: LogProbFn, params: Params, updates: Params, new_params: Params, batch: Any
) -> StepChanges:
    """First-order and realised change of every row under an actual step: one forward-mode derivative and one forward.

    Args:
      log_prob_fn: see :func:`entangle.geometry.vjp_with_geometry`.
      params: parameters before the step.
      updates: what was added to them, a pytree like params.
      new_params: parameters after it, rounded as they are kept.
      batch: pytree of arrays with leading axes ``[B, 2]``.

    Returns:
      Both changes, fields ``[B]``, in nats.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> features = jnp.array([[[1.0, 0.0], [1.0, 1.0]]])
      >>> square, p, u = lambda p, x: (x @ p) ** 2, jnp.ones(2), jnp.array([0.0, 0.5])
      >>> changes = geometry.step_changes(square, p, u, p + u, features)
      >>> changes.first_order.rejected.tolist(), changes.realised.rejected.tolist()
      ([2.0], [2.25])
    """
    before, first_order = _first_order(log_prob_fn, params, updates, batch)
    change = log_prob_fn(new_params, batch) - before
    return StepChanges(first_order, PairChanges(change[:, 0], change[:, 1]))


def _first_order(log_prob_fn: LogProbFn, params: Params, updates: Params, batch: Any) -> tuple[jax.Array, PairChanges]:
    count_pairs(batch)
    # an optimizer may keep its moments, and so the update, wider than the parameters; a tangent may not be
    tangents = jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params)
    log_probs, changes = jax.jvp(lambda p: log_prob_fn(p, batch), (params,), (tangents,))
    return log_probs, PairChanges(changes[:, 0], changes[:, 1])
