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

from entangle.geometry.products import accumulator_dtype, inner_product, row_gram, row_products
from entangle.transforms.combine import require_pair
from entangle.transforms.weightings import check, inverse, root
from entangle.types import PairGradients, Params


class AdamMetric(NamedTuple):
    """The metric in which Adam measures a gradient: products are weighed by ``1 / (sqrt(v) + eps)``.

    Attributes:
      b2: decay of the second moment, as the optimizer after the projection has it.
      eps: as the optimizer has it.
    """

    b2: float = 0.999
    eps: float = 1e-8


class RetainState(NamedTuple):
    """What a projection remembers.

    Attributes:
      earlier: earlier retained gradients, arrays ``[memory, ...]`` for the parameters that are remembered, a list.
      seen: int32, retained gradients so far.
      second_moment: of what went out, as Adam keeps it, a list; ``()`` in the Euclidean metric.
      removed: of the last step: share of the forget gradient's squared norm, in the metric, that lay in the span.
    """

    earlier: list[jax.Array]
    seen: jax.Array
    second_moment: Any
    removed: jax.Array


def project_retain(
    memory: int = 8,
    *,
    retain_weight: float = 0.0,
    radius: float | None = None,
    metric: AdamMetric | None = None,
    where: Callable[[str], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Geometric-disentanglement unlearning: the rejected gradient without its part in the span of retained gradients.

    With U the chosen gradient of this step and of up to ``memory`` steps before, and H the metric,
    ``P = I - U (U^T H U)^-1 U^T H``; the head of the chain gives ``P rejected - retain_weight chosen``. It stands where
    :func:`entangle.transforms.combine_pair` would.

    Scope: under a plain gradient step, with ``retain_weight`` 0, the chosen batch sum is unchanged to first order, and the
    chosen sums of earlier batches as far as their gradients are still what they were; with a weight they change by what
    the chosen gradient alone would change them. Gradients that are combinations of newer ones to one part in a thousand
    count as these. In Adam's metric the same holds under Adam without momentum and weight decay, up to how far the second
    moment after the step differs from the one that the projection foresees: it is exact for
    :func:`entangle.transforms.retain_invariant` only.

    State: ``memory`` times the remembered parameters, sharded as they are, in their dtype; in Adam's metric once the
    parameters more.

    Args:
      memory: earlier retained gradients that are kept beside the current one.
      retain_weight: of the chosen gradient itself in the step, 0 or more: the joint step.
      radius: length, in the metric, to which the projected forget gradient is brought: the boundary of a trust region.
        None leaves its length as it is.
      metric: in which P projects and lengths are measured; None is the Euclidean one, right for plain gradient steps.
      where: a parameter's path, as ``jax.tree_util.keystr(path, simple=True, separator="/")`` writes it, to whether its
        share of earlier gradients is remembered; None remembers all. The current one always counts in full.

    Returns:
      An optax transform whose updates are PairGradients going in and a tree like the parameters coming out.

    References:
      Zhou et al., Geometric-disentanglement Unlearning, arXiv 2511.17100. There the second moment is the optimizer's before
      the step; here the forget gradient of the step is in it.

    Raises:
      ValueError: a setting is outside of its range.
      TypeError: at trace time, when the updates are not PairGradients.

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
    _check_memory(memory)
    check("retain_weight", retain_weight, 0.0, float("inf"), with_low=True)
    if radius is not None:
        check("radius", radius, 0.0, float("inf"))
    if metric is not None:
        check("b2", metric.b2, 0.0, 1.0, with_low=True)
        check("eps", metric.eps, 0.0, float("inf"), with_low=True)

    def init_fn(params: Params) -> RetainState:
        leaves = jax.tree.leaves(params)
        second = [] if metric is None else [jnp.zeros_like(leaf, accumulator_dtype(leaf)) for leaf in leaves]
        zero = jnp.zeros((), accumulator_dtype(params))
        return RetainState(_empty(params, memory, where), jnp.zeros((), jnp.int32), second, zero)

    def update_fn(
        updates: PairGradients, state: RetainState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, RetainState]:
        del params, extra_args
        require_pair(updates, "project_retain")
        tree = jax.tree.structure(updates.chosen)
        retain, forget = jax.tree.leaves(updates.chosen), _wide(jax.tree.leaves(updates.rejected))
        weights = None if metric is None else _adam_weights(metric, state.second_moment, state.seen, forget)
        span = _Span(_wide(retain), state.earlier, _remembered(updates.chosen, where), state.seen, weights)
        projected = span.remove(forget)
        before, after = span.square(forget), span.square(projected)
        # what is left of a gradient that lies in the span is rounding, and must not be brought to any length
        left = after > (_LEFT_OVER**2) * before
        scale = jnp.where(left, 1 if radius is None else radius * inverse(root(after)), 0).astype(after.dtype)
        mixed = [
            scale.astype(f.dtype) * f - jnp.asarray(retain_weight, f.dtype) * r.astype(f.dtype)
            for f, r in zip(projected, retain, strict=True)
        ]
        out = [m.astype(r.dtype) for m, r in zip(mixed, retain, strict=True)]
        second = (
            [] if metric is None else [_moved(metric, v, m) for v, m in zip(state.second_moment, mixed, strict=True)]
        )
        removed = jnp.where(before > 0, 1 - after * inverse(before), 0)
        earlier = _remember(state.earlier, state.seen, retain, _remembered(updates.chosen, where))
        return jax.tree.unflatten(tree, out), RetainState(earlier, _next(state.seen), second, removed)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
) -> optax.GradientTransformationExtraArgs:
    """Take from a whole chain's update what would change the retained sums, whatever optimizer is in the chain.

    The guarantee of :func:`project_retain` is for the gradient and breaks where an optimizer rescales it, adds momentum or
    decays weights. Here the last word is had after the optimizer: its update loses, in the Euclidean metric, its part in
    the span of the chosen gradients of this step and of up to ``memory`` steps before.

    Scope: the chosen batch sum is unchanged to first order by the step that is made, exactly, for any optimizer; earlier
    batches' as far as their gradients are still what they were.

    State: that of the chain and ``memory`` times the remembered parameters, sharded as they are, in their dtype.

    Args:
      inner: a chain that takes PairGradients, for example ``optax.chain(combine_pair(fixed(chosen=0)), optax.adam(1e-3))``.
      memory: earlier retained gradients that are kept beside the current one.
      where: as for :func:`project_retain`.

    Returns:
      An optax transform whose updates are PairGradients going in and a tree like the parameters coming out.

    Raises:
      ValueError: memory is negative.
      TypeError: at trace time, when the updates are not PairGradients.

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
    _check_memory(memory)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Params) -> RetainInvariantState:
        zero = jnp.zeros((), accumulator_dtype(params))
        kept = RetainState(_empty(params, memory, where), jnp.zeros((), jnp.int32), [], zero)
        return RetainInvariantState(inner.init(params), kept)

    def update_fn(
        updates: PairGradients, state: RetainInvariantState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, RetainInvariantState]:
        require_pair(updates, "retain_invariant")
        step, inside = inner.update(updates, state.inner, params, **extra_args)
        tree, retain = jax.tree.structure(step), jax.tree.leaves(updates.chosen)
        given = _wide(jax.tree.leaves(step))
        kept = state.retain
        span = _Span(_wide(retain), kept.earlier, _remembered(updates.chosen, where), kept.seen, None)
        left = span.remove(given)
        removed = 1 - span.square(left) * inverse(span.square(given))
        out = [a.astype(b.dtype) for a, b in zip(left, jax.tree.leaves(step), strict=True)]
        earlier = _remember(kept.earlier, kept.seen, retain, _remembered(updates.chosen, where))
        return jax.tree.unflatten(tree, out), RetainInvariantState(
            inside, RetainState(earlier, _next(kept.seen), [], removed)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def protect_chosen(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Take from a whole chain's update what would lower the chosen batch sum, whatever optimizer is in the chain.

    Where ``<chosen, update>`` is negative, the update loses its component along ``chosen``; else it is left alone. It is
    :func:`entangle.transforms.one_sided` for the step that is really made: momentum, an adaptive metric and weight decay
    included.

    Scope: the chosen batch sum does not fall to first order, exactly, for any optimizer, with positive coefficients. Nothing
    is promised for single pairs, for the rejected side or for other batches.

    Args:
      inner: a chain that takes PairGradients, for example ``optax.chain(combine_pair(margin()), optax.adamw(1e-5))``.

    Returns:
      An optax transform whose updates are PairGradients going in and a tree like the parameters coming out; its state is
      the chain's.

    Raises:
      TypeError: at trace time, when the updates are not PairGradients.

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
    inner = optax.with_extra_args_support(inner)

    def update_fn(
        updates: PairGradients, state: Any, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, Any]:
        require_pair(updates, "protect_chosen")
        step, state = inner.update(updates, state, params, **extra_args)
        change = inner_product(updates.chosen, step)
        share = jnp.minimum(change, 0) * inverse(inner_product(updates.chosen, updates.chosen))

        def without(u: jax.Array, g: jax.Array) -> jax.Array:
            wide = accumulator_dtype(u)
            return (u.astype(wide) - share.astype(wide) * g.astype(wide)).astype(u.dtype)

        return jax.tree.map(without, step, updates.chosen), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


# Relative length below which what is left of a projected vector is rounding.
_LEFT_OVER = 1e-6
# Squared sine between a retained gradient and the newer ones below which it counts as their combination. Products are
# good to about 1e-7, so that what is solved for is still good to a tenth; the second pass brings it to rounding.
_DEPENDENT = 1e-6


class _Span(NamedTuple):
    """Retained gradients: the current one in full, earlier ones on some leaves; all vectors are lists of leaves.

    Attributes:
      now: the current one.
      earlier: arrays ``[memory, ...]``, on the remembered leaves.
      remembered: indices of these leaves.
      seen: how many retained gradients there were before the current one.
      weights: of the metric, leaf by leaf; None for the Euclidean one.
    """

    now: list[jax.Array]
    earlier: list[jax.Array]
    remembered: list[int]
    seen: jax.Array
    weights: list[jax.Array] | None

    def lowered(self, vector: list[jax.Array]) -> list[jax.Array]:
        """H times a vector."""
        return vector if self.weights is None else [w * v for w, v in zip(self.weights, vector, strict=True)]

    def square(self, vector: list[jax.Array]) -> jax.Array:
        """Squared length of a vector in the metric."""
        return inner_product(vector, self.lowered(vector))

    def products(self, vector: list[jax.Array]) -> jax.Array:
        """With the current one and every earlier one, in the metric: ``[1 + memory]``."""
        low = self.lowered(vector)
        now = inner_product(self.now, low)[None]
        if not self.earlier:
            return now
        return jnp.concatenate([now, row_products(self.earlier, [low[i] for i in self.remembered]).astype(now.dtype)])

    def gram(self) -> jax.Array:
        """Of all retained gradients in the metric: ``[1 + memory, 1 + memory]``."""
        first = self.products(self.now)
        if not self.earlier:
            return first[None]
        scaled = self.earlier
        if self.weights is not None:
            # leaf by leaf: the temporary is one leaf's memory, not all parameters'
            halves = [root(self.weights[i]) for i in self.remembered]
            scaled = [rows.astype(half.dtype) * half[None] for rows, half in zip(self.earlier, halves, strict=True)]
        inside = row_gram(scaled).astype(first.dtype)
        return jnp.concatenate([first[None], jnp.concatenate([first[1:, None], inside], 1)], 0)

    def order(self) -> jax.Array:
        """Indices of all retained gradients, newest first."""
        memory = self.earlier[0].shape[0] if self.earlier else 0
        return jnp.concatenate([jnp.zeros(1, jnp.int32), 1 + (self.seen - 1 - jnp.arange(memory)) % max(memory, 1)])

    def remove(self, vector: list[jax.Array]) -> list[jax.Array]:
        """A vector without its part in the span; twice, so that what rounding left of it goes, too."""
        solve = _solver(self.gram(), self.order())
        for _ in range(2):
            shares = solve(self.products(vector))
            vector = [v - shares[0].astype(v.dtype) * g for v, g in zip(vector, self.now, strict=True)]
            for i, rows in zip(self.remembered, self.earlier, strict=bool(self.earlier)):
                weights = shares[1:].astype(vector[i].dtype)
                back = jnp.tensordot(weights, rows.astype(weights.dtype), 1, precision=jax.lax.Precision.HIGHEST)
                vector[i] = vector[i] - back
        return vector


def _solver(gram: jax.Array, order: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Solves ``gram x = b``; vectors that depend on those before them in the order, and zero ones, get no share.

    A Cholesky factorisation of the matrix of cosines; skipping a vector leaves the newer ones' equations exact.
    """
    size = gram.shape[0]
    gram = gram[order][:, order]
    scale = inverse(root(jnp.diagonal(gram)))
    cosines = gram * scale[:, None] * scale[None]
    columns: list[jax.Array] = []
    rest = cosines
    for j in range(size):
        pivot = rest[j, j]
        keep = pivot > _DEPENDENT  # false for zero vectors, and for NaN, which comes back through b
        column = jnp.where(keep, rest[:, j] * inverse(root(jnp.where(keep, pivot, 1))), 0)
        column = jnp.where(jnp.arange(size) < j, 0, column)
        columns.append(column)
        rest = rest - column[:, None] * column[None]
    lower = jnp.stack(columns, 1)
    skipped = jnp.diagonal(lower) == 0
    # a skipped vector's row and column become those of the identity, and its right-hand side zero
    lower = jnp.where(skipped[:, None] | skipped[None], 0, lower) + jnp.diag(skipped.astype(gram.dtype))

    def solve(b: jax.Array) -> jax.Array:
        shares = scale * jax.scipy.linalg.cho_solve((lower, True), jnp.where(skipped, 0, b[order] * scale))
        return jnp.zeros_like(shares).at[order].set(shares)

    return solve


def _check_memory(memory: int) -> None:
    if memory < 0:
        raise ValueError(f"memory: {memory} earlier gradients, 0 or more are needed")


def _wide(leaves: list[jax.Array]) -> list[jax.Array]:
    return [leaf.astype(accumulator_dtype(leaf)) for leaf in leaves]


def _remembered(params: Params, where: Callable[[str], bool] | None) -> list[int]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    return [i for i, name in enumerate(names) if where is None or where(name)]


def _empty(params: Params, memory: int, where: Callable[[str], bool] | None) -> list[jax.Array]:
    leaves = jax.tree.leaves(params)
    if not memory:
        return []
    # stacked, so that they lie as the parameters do
    return [jnp.stack([jnp.zeros_like(leaves[i])] * memory) for i in _remembered(params, where)]


def _remember(
    earlier: list[jax.Array], count: jax.Array, retain: list[jax.Array], remembered: list[int]
) -> list[jax.Array]:
    return [
        jax.lax.dynamic_update_index_in_dim(rows, retain[i].astype(rows.dtype), count % rows.shape[0], 0)
        for rows, i in zip(earlier, remembered, strict=False)
    ]


def _next(count: jax.Array) -> jax.Array:
    return optax.safe_increment(count)


def _adam_weights(
    metric: AdamMetric, second_moment: list[jax.Array], count: jax.Array, forget: list[jax.Array]
) -> list[jax.Array]:
    """``1 / (sqrt(v) + eps)`` with the second moment that Adam would have were this the gradient."""

    def weight(v: jax.Array, f: jax.Array) -> jax.Array:
        debias = 1 - jnp.asarray(metric.b2, v.dtype) ** (count + 1).astype(v.dtype)
        return inverse(root(_moved(metric, v, f) / debias) + jnp.asarray(metric.eps, v.dtype))

    return [weight(v, f) for v, f in zip(second_moment, forget, strict=True)]


def _moved(metric: AdamMetric, v: jax.Array, f: jax.Array) -> jax.Array:
    share = jnp.asarray(metric.b2, v.dtype)
    return share * v + (1 - share) * f.astype(v.dtype) ** 2
