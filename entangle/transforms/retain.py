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
from entangle.transforms.chains import AccumulatePairsState, naming_the_fix, require_combined
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
    remember: Callable[[str], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Geometric-disentanglement unlearning: the rejected gradient without its part in the span of retained gradients.

    With U the chosen gradient of this step and of up to ``memory`` steps before, and H the metric,
    ``P = I - U (U^T H U)^-1 U^T H``; the head of the chain gives ``P rejected - retain_weight chosen``. It stands where
    :func:`entangle.transforms.combine_pair` would.

    Scope: under a plain gradient step, with ``retain_weight`` 0, the chosen batch sum is unchanged to first order, and the
    chosen sums of earlier batches as far as their gradients are still what they were; with a weight they change by what
    the chosen gradient alone would change them. Where earlier gradients are nearly dependent on each other theirs holds to
    one part in a hundred, the current one's always. Under Adam it does not hold for the Euclidean metric; in Adam's, without
    momentum and weight decay, it holds up to how far the second moment after the step differs from the one that the
    projection foresees, which at the first steps is far. :func:`entangle.transforms.retain_invariant` holds it under any
    optimizer.

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
        zero = jnp.zeros((), accumulator_dtype(params))
        leaves = _Leaves(params, where, remember)
        second = [] if metric is None else [jnp.zeros_like(p, accumulator_dtype(p)) for p in leaves.trained(params)]
        return RetainState(leaves.empty(params, memory), jnp.zeros((), jnp.int32), second, zero)

    def update_fn(
        updates: PairGradients, state: RetainState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, RetainState]:
        del params, extra_args
        require_pair(updates, "project_retain")
        leaves = _Leaves(updates.chosen, where, remember)
        retain, forget = leaves.trained(updates.chosen), _wide(leaves.trained(updates.rejected))
        span = _Span(_wide(retain), state.earlier, leaves.remembered, None)
        if metric is not None:
            span = span._replace(weights=_adam_weights(metric, state.second_moment, state.seen))
        projected = span.remove(forget)
        measured = jnp.zeros_like(state.removed)
        if metric is not None:
            # a square that overflows in the second moment would weigh nothing, and so hide
            measured = inner_product(projected, projected).astype(measured.dtype)
            foreseen = [_moved(metric, v, f) for v, f in zip(state.second_moment, projected, strict=True)]
            span = span._replace(weights=_adam_weights(metric, foreseen, state.seen + 1))
            projected = span.remove(forget)
        before, after = span.square(forget), span.square(projected)
        # what is left of a gradient that lies in the span is rounding, and must not be brought to any length
        left = after > (_LEFT_OVER**2) * before
        scale = jnp.where(left, 1 if radius is None else radius * inverse(root(after)), 0).astype(after.dtype)
        finite = jnp.isfinite(after + span.square(span.now)) & jnp.isfinite(measured)
        scale = jnp.where(finite, scale, jnp.nan)
        mixed = [
            scale.astype(f.dtype) * f - jnp.asarray(retain_weight, f.dtype) * r.astype(f.dtype)
            for f, r in zip(projected, retain, strict=True)
        ]
        out = [m.astype(r.dtype) for m, r in zip(mixed, retain, strict=True)]
        second = (
            []
            if metric is None
            else [jnp.where(finite, _moved(metric, v, m), v) for v, m in zip(state.second_moment, mixed, strict=True)]
        )
        kept = [retain[i] for i in span.remembered]
        return leaves.back(updates.chosen, out, frozen=True), RetainState(
            _remember(state.earlier, state.seen, kept, finite),
            _next(state.seen, finite),
            second,
            _removed(before, after, state.removed),
        )

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
    remember: Callable[[str], bool] | None = None,
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
      where: a parameter's path to whether it is trained; what the chain does to the others is left alone, and counts for
        nothing. Name here what the chain freezes: else the projection would move it.
      remember: as for :func:`project_retain`.

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
        empty = _Leaves(params, where, remember).empty(params, memory)
        inside = inner.init(params)
        _refuse_accumulation(inside, "retain_invariant")
        return RetainInvariantState(inside, RetainState(empty, jnp.zeros((), jnp.int32), [], zero))

    def update_fn(
        updates: PairGradients, state: RetainInvariantState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, RetainInvariantState]:
        require_pair(updates, "retain_invariant")
        step, inside = _inner_step(inner, "retain_invariant", updates, state.inner, params, extra_args)
        leaves = _Leaves(updates.chosen, where, remember)
        retain, own = leaves.trained(updates.chosen), leaves.trained(step)
        given, kept = _wide(own), state.retain
        span = _Span(_wide(retain), kept.earlier, leaves.remembered, None)
        left = span.remove(given)
        after = span.square(left)
        finite = jnp.isfinite(after + span.square(span.now))
        # a step that the chain has passed over, as optax.apply_if_finite does, stays so
        passed = span.square(given) == 0
        out = [
            jnp.where(finite, a, jnp.where(passed, 0, jnp.nan)).astype(b.dtype) for a, b in zip(left, own, strict=True)
        ]
        earlier = _remember(kept.earlier, kept.seen, [retain[i] for i in span.remembered], finite)
        return leaves.back(step, out), RetainInvariantState(
            inside,
            RetainState(earlier, _next(kept.seen, finite), [], _removed(span.square(given), after, kept.removed)),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def protect_chosen(
    inner: optax.GradientTransformation, *, where: Callable[[str], bool] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Take from a whole chain's update what would lower the chosen batch sum, whatever optimizer is in the chain.

    Where ``<chosen, update>`` is negative, the update loses its component along ``chosen``; else it is left alone. It is
    :func:`entangle.transforms.one_sided` for the step that is really made: momentum, an adaptive metric and weight decay
    included.

    It stands around the whole chain, learning rate included, with nothing after it; micro-batches are accumulated around
    it: ``accumulate_pairs(protect_chosen(chain), every)``.

    Scope: the chosen batch sum does not fall to first order, whatever the optimizer, with positive coefficients. Second order
    is not touched: where the first order is held at 0 step after step, the sum still drifts down by curvature. Nothing is
    promised for single pairs, for the rejected side or for other batches.

    Args:
      inner: a chain that takes PairGradients, for example ``optax.chain(combine_pair(margin()), optax.adamw(1e-5))``.
      where: a parameter's path to whether it is trained; what the chain does to the others is left alone, and counts for
        nothing. Name here what the chain freezes: else the correction would move it.

    Returns:
      An optax transform whose updates are PairGradients going in and a tree like the parameters coming out; its state is
      the chain's.

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
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Params) -> Any:
        state = inner.init(params)
        _refuse_accumulation(state, "protect_chosen")
        return state

    def update_fn(
        updates: PairGradients, state: Any, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, Any]:
        require_pair(updates, "protect_chosen")
        step, state = _inner_step(inner, "protect_chosen", updates, state, params, extra_args)
        leaves = _Leaves(updates.chosen, where, None)
        chosen, own = leaves.trained(updates.chosen), leaves.trained(step)
        square = inner_product(chosen, chosen)
        share = jnp.minimum(inner_product(chosen, own), 0) * inverse(square)
        # a step that the chain has passed over, as optax.apply_if_finite does, stays so
        passed = inner_product(own, own) == 0
        share = jnp.where(jnp.isfinite(square), share, jnp.where(passed, 0, jnp.nan))

        def without(u: jax.Array, g: jax.Array) -> jax.Array:
            wide = accumulator_dtype(u)
            part = jnp.where(share == 0, 0, share.astype(wide) * g.astype(wide))
            return (u.astype(wide) - part).astype(u.dtype)

        return leaves.back(step, [without(u, g) for u, g in zip(own, chosen, strict=True)]), state

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
    kinds = (AccumulatePairsState, optax.MultiStepsState)
    if any(isinstance(node, kinds) for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))):
        raise ValueError(
            f"{name} knows the last micro-batch only: accumulate around it, as in accumulate_pairs({name}(chain), every)"
        )


def retained(opt_state: Any) -> list[RetainState]:
    """What the projections of a chain remember and removed, found in the chain's state, however deep.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from entangle import transforms
      >>> tx = optax.chain(transforms.project_retain(2), optax.adamw(1e-3))
      >>> [(state.earlier[0].shape, float(state.removed)) for state in transforms.retained(tx.init(jnp.zeros(3)))]
      [((2, 3), 0.0)]
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, RetainState))
    return [leaf for leaf in leaves if isinstance(leaf, RetainState)]


# Relative length below which what is left of a projected vector is rounding: it is larger where retained gradients are nearly
# dependent.
_LEFT_OVER = 1e-5
# Eigenvalue of the matrix of cosines, over the largest, below which a direction counts as dependent on the others. Products
# are good to about 1e-7: above it they are solved for to a hundredth, and to rounding by the second pass; below it, as pivots
# taken one after the other are not, nothing that rounding made is ever lengthened.
_DEPENDENT = 1e-5


class _Span(NamedTuple):
    """Retained gradients: the current one in full, earlier ones on some leaves; all vectors are lists of leaves.

    Attributes:
      now: the current one.
      earlier: arrays ``[memory, ...]``, on the remembered leaves.
      remembered: indices of these leaves.
      weights: of the metric, leaf by leaf; None for the Euclidean one.
    """

    now: list[jax.Array]
    earlier: list[jax.Array]
    remembered: list[int]
    weights: list[jax.Array] | None

    def lowered(self, vector: list[jax.Array]) -> list[jax.Array]:
        """H times a vector."""
        if self.weights is None:
            return vector
        return [w.astype(v.dtype) * v for w, v in zip(self.weights, vector, strict=True)]

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

    def remove(self, vector: list[jax.Array]) -> list[jax.Array]:
        """A vector without its part in the span; twice, so that what rounding left of it goes, too.

        Last comes the current gradient alone: it is left exactly as it is, however dependent the others are.
        """
        inverse_gram = _inverse_gram(self.gram())
        for _ in range(2):
            shares = jnp.matmul(inverse_gram, self.products(vector), precision=jax.lax.Precision.HIGHEST)
            vector = [v - shares[0].astype(v.dtype) * g for v, g in zip(vector, self.now, strict=True)]
            for i, rows in zip(self.remembered, self.earlier, strict=bool(self.earlier)):
                weights = shares[1:].astype(vector[i].dtype)
                back = jnp.tensordot(weights, rows.astype(weights.dtype), 1, precision=jax.lax.Precision.HIGHEST)
                vector[i] = vector[i] - back
        share = inner_product(self.now, self.lowered(vector)) * inverse(self.square(self.now))
        return [v - share.astype(v.dtype) * g for v, g in zip(vector, self.now, strict=True)]


def _inverse_gram(gram: jax.Array) -> jax.Array:
    """Pseudo-inverse of a Gram matrix, of its matrix of cosines: lengths do not decide about what is dependent."""
    scale = inverse(root(jnp.diagonal(gram)))
    cosines = gram * scale[:, None] * scale[None]
    return scale[:, None] * jnp.linalg.pinv(cosines, rtol=_DEPENDENT, hermitian=True) * scale[None]


def _check_memory(memory: int) -> None:
    if memory < 0:
        raise ValueError(f"memory: {memory} earlier gradients, 0 or more are needed")


def _wide(leaves: list[jax.Array]) -> list[jax.Array]:
    return [leaf.astype(accumulator_dtype(leaf)) for leaf in leaves]


class _Leaves:
    """Which leaves of a tree are trained, and which of these are remembered."""

    def __init__(
        self, tree: Params, where: Callable[[str], bool] | None, remember: Callable[[str], bool] | None
    ) -> None:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
        self._trained = [i for i, name in enumerate(names) if where is None or where(name)]
        if not self._trained:
            raise ValueError("no parameters are trained: the tree is empty, or where says so of all")
        # indices among the trained ones
        self.remembered = [n for n, i in enumerate(self._trained) if remember is None or remember(names[i])]

    def trained(self, tree: Params) -> list[jax.Array]:
        leaves = jax.tree.leaves(tree)
        return [leaves[i] for i in self._trained]

    def back(self, tree: Params, trained: list[jax.Array], *, frozen: bool = False) -> Params:
        """The tree with other trained leaves; the rest as they are, or frozen: zero."""
        leaves, structure = jax.tree.flatten(tree)
        leaves = [jnp.zeros_like(leaf) for leaf in leaves] if frozen else leaves
        for i, leaf in zip(self._trained, trained, strict=True):
            leaves[i] = leaf
        return jax.tree.unflatten(structure, leaves)

    def empty(self, params: Params, memory: int) -> list[jax.Array]:
        trained = self.trained(params)
        # stacked, so that they lie as the parameters do
        return [jnp.stack([jnp.zeros_like(trained[i])] * memory) for i in self.remembered] if memory else []


def _remember(
    earlier: list[jax.Array], count: jax.Array, retain: list[jax.Array], finite: jax.Array
) -> list[jax.Array]:
    """The ring of earlier gradients with this one in the place of the oldest; a step that is not finite leaves it."""

    def write(rows: jax.Array, new: jax.Array) -> jax.Array:
        place = count % rows.shape[0]
        old = jax.lax.dynamic_index_in_dim(rows, place, 0, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(rows, jnp.where(finite, new.astype(rows.dtype), old), place, 0)

    return [write(rows, new) for rows, new in zip(earlier, retain, strict=bool(earlier))]


def _next(count: jax.Array, finite: jax.Array) -> jax.Array:
    return jnp.where(finite, optax.safe_increment(count), count)


def _removed(before: jax.Array, after: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.where(before == 0, 0, 1 - after * inverse(before)).astype(like.dtype)


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
