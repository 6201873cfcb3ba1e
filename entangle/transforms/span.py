"""What projections with memory share: their state, the span of retained gradients, and which leaves take part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from entangle.geometry.products import accumulator_dtype, inner_product, row_gram, row_products
from entangle.paths import named_leaves, nodes_of
from entangle.transforms.weightings import inverse, root
from entangle.types import Params


class RetainState(NamedTuple):
    """What a projection remembers.

    Attributes:
      earlier: earlier retained gradients, a tree like the parameters of arrays ``[memory, ...]``, with ``optax.MaskedNode()``
        for what is not remembered; ``()`` without memory.
      seen: int32, retained gradients so far.
      second_moment: of what went out, as Adam keeps it, a tree like the parameters, with ``optax.MaskedNode()`` for what is
        not trained; ``()`` in the Euclidean metric.
      removed: of the last step: share of the forget gradient's squared norm, in the metric, that lay in the span.
    """

    earlier: Any
    seen: jax.Array
    second_moment: Any
    removed: jax.Array


def retained(opt_state: Any) -> list[RetainState]:
    """What the projections of a chain remember and removed, found in the chain's state, however deep.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from entangle import transforms
      >>> tx = optax.chain(transforms.project_retain(2), optax.adamw(1e-3))
      >>> [(state.earlier.shape, float(state.removed)) for state in transforms.retained(tx.init(jnp.zeros(3)))]
      [((2, 3), 0.0)]
    """
    return nodes_of(opt_state, RetainState)


# Eigenvalue of the matrix of cosines, over the largest, below which a direction counts as dependent on the others. Products
# are good to about 1e-7: above it they are solved for to a hundredth, and to rounding by the second pass; below it, as pivots
# taken one after the other are not, nothing that rounding made is ever lengthened.
_DEPENDENT = 1e-5


class Span(NamedTuple):
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


def wide(leaves: list[jax.Array]) -> list[jax.Array]:
    """Leaves in their accumulators' dtype."""
    return [leaf.astype(accumulator_dtype(leaf)) for leaf in leaves]


class Leaves:
    """Which leaves of a tree are trained, and which of these are remembered."""

    def __init__(
        self, tree: Params, where: Callable[[str], bool] | None, remember: Callable[[str], bool] | None
    ) -> None:
        names = [name for name, _ in named_leaves(tree)]
        self._trained = [i for i, name in enumerate(names) if where is None or where(name)]
        # a tree without any is what optax.tree.map_params asks with
        if names and not self._trained:
            raise ValueError("no parameters are trained: where says so of all")
        # indices among the trained ones
        self.remembered = [n for n, i in enumerate(self._trained) if remember is None or remember(names[i])]

    def trained(self, tree: Params) -> list[jax.Array]:
        """The trained leaves of a tree."""
        leaves = jax.tree.leaves(tree)
        return [leaves[i] for i in self._trained]

    def require(self, name: str, tree: Params, state: RetainState) -> None:
        """Refuse gradients that are not like the parameters for which the state was made, as far as the state tells."""
        earlier, second_moment = jax.tree.leaves(state.earlier), jax.tree.leaves(state.second_moment)
        shapes = [leaf.shape for leaf in self.trained(tree)]
        remembered = [shapes[i] for i in self.remembered]
        for found, kept in (
            (remembered, [rows.shape[1:] for rows in earlier]),
            (shapes, [v.shape for v in second_moment]),
        ):
            if kept and found != kept:
                raise ValueError(
                    f"{name}: gradients of shapes {found}, but the state was made for parameters of {kept}"
                )

    def back(self, tree: Params, trained: list[jax.Array], *, frozen: bool = False) -> Params:
        """The tree with other trained leaves; the rest as they are, or frozen: zero."""
        leaves, structure = jax.tree.flatten(tree)
        leaves = [jnp.zeros_like(leaf) for leaf in leaves] if frozen else leaves
        for i, leaf in zip(self._trained, trained, strict=True):
            leaves[i] = leaf
        return jax.tree.unflatten(structure, leaves)

    def empty(self, params: Params, memory: int) -> Any:
        """A memory of zeros for the remembered leaves; ``()`` of none."""
        if not memory:
            return ()
        trained = self.trained(params)
        # stacked, so that they lie as the parameters do
        rows = [jnp.stack([jnp.zeros_like(trained[i])] * memory) for i in self.remembered]
        return _with_holes(params, [self._trained[i] for i in self.remembered], rows)

    def second_moment(self, params: Params) -> Any:
        """Zeros for the trained leaves, in their accumulators' dtype."""
        zeros = [jnp.zeros_like(leaf, accumulator_dtype(leaf)) for leaf in self.trained(params)]
        return _with_holes(params, self._trained, zeros)


def _with_holes(tree: Params, places: list[int], leaves: list[jax.Array]) -> Any:
    structure: Any = jax.tree.structure(tree)
    found: list[Any] = [optax.MaskedNode()] * structure.num_leaves
    for place, leaf in zip(places, leaves, strict=True):
        found[place] = leaf
    return jax.tree.unflatten(structure, found)


def remember_now(state: RetainState, retain: list[jax.Array], finite: jax.Array) -> Any:
    """The ring of earlier gradients with this one in the place of the oldest; a step that is not finite leaves it."""
    rows, structure = jax.tree.flatten(state.earlier)

    def write(rows: jax.Array, new: jax.Array) -> jax.Array:
        place = state.seen % rows.shape[0]
        old = jax.lax.dynamic_index_in_dim(rows, place, 0, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(rows, jnp.where(finite, new.astype(rows.dtype), old), place, 0)

    return jax.tree.unflatten(structure, [write(old, new) for old, new in zip(rows, retain, strict=bool(rows))])


def counted(count: jax.Array, finite: jax.Array) -> jax.Array:
    """One step more, if it was finite."""
    return jnp.where(finite, optax.safe_increment(count), count)


def share_removed(before: jax.Array, after: jax.Array, like: jax.Array) -> jax.Array:
    """Share of a squared length that is gone; 0 of nothing."""
    return jnp.where(before == 0, 0, jnp.maximum(1 - after * inverse(before), 0)).astype(like.dtype)
