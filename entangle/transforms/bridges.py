"""To and from the leading-axis convention of ``optax.experimental.aggregating``: leaves ``[2, ...]``, a row an objective."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.experimental import aggregating

from entangle.transforms.combine import AnyWeighting, combine_pair, require_pair
from entangle.types import PairGradients, Params


def stack_pair(gradients: PairGradients) -> Params:
    """The two objectives' descent gradients as rows: ``-chosen``, ``rejected``.

    Args:
      gradients: two trees of one structure.

    Returns:
      A tree of leaves ``[2, ...]``; the sum over the rows is the gradient of the mean loss.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGradients
      >>> transforms.stack_pair(PairGradients(jnp.array([1.0]), jnp.array([3.0]))).tolist()
      [[-1.0], [3.0]]
    """
    return jax.tree.map(lambda w, l: jnp.stack([-w, l]), gradients.chosen, gradients.rejected)


def unstack_pair(rows: Params) -> PairGradients:
    """What :func:`stack_pair` was made of.

    Args:
      rows: tree of leaves ``[2, ...]``.

    Raises:
      TypeError: the rows are PairGradients already.
      ValueError: a leaf has another leading axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> transforms.unstack_pair(jnp.array([[-1.0], [3.0]])).chosen.tolist()
      [1.0]
    """
    if isinstance(rows, PairGradients):
        raise TypeError("unstack_pair takes leaves [2, ...]: stack_pair(gradients) makes them of PairGradients")
    shapes = sorted({leaf.shape[:1] for leaf in jax.tree.leaves(rows)} - {(2,)})
    if shapes:
        raise ValueError(f"unstack_pair: leaves need the leading axis of 2 rows, -chosen and rejected; got {shapes}")
    return PairGradients(jax.tree.map(lambda x: -x[0], rows), jax.tree.map(lambda x: x[1], rows))


def pair_aggregator(weighting: AnyWeighting, **options: Any) -> aggregating.Aggregator:
    """A weighting as an aggregator of optax: from rows ``-chosen`` and ``rejected`` to the combined descent gradient.

    Args:
      weighting: as for :func:`entangle.transforms.combine_pair`.
      options: ``group`` and ``stacked``, as for :func:`entangle.transforms.combine_pair`.

    Returns:
      For ``optax.experimental.aggregating.process``, in the place of ``average_per_element_updates``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax.experimental import aggregating
      >>> from entangle import transforms
      >>> tx = aggregating.process(optax.identity(), transforms.pair_aggregator(transforms.margin()), optax.sgd(1.0))
      >>> params = jnp.zeros(2)
      >>> updates, _ = tx.update(jnp.array([[-1.0, 0.0], [0.0, 1.0]]), tx.init(params), params)
      >>> updates.tolist()
      [1.0, -1.0]
    """
    head = combine_pair(weighting, **options)

    def update_fn(updates: Params, state: Any, params: Params | None = None, **extra_args: Any) -> tuple[Params, Any]:
        return head.update(unstack_pair(updates), state, params, **extra_args)

    return aggregating.Aggregator(head.init, update_fn)


def aggregate_pair(aggregator: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Somebody else's aggregator as the head of a pair chain.

    Args:
      aggregator: of leaves ``[2, ...]``, for example ``aggregating.average_per_element_updates()`` or
        :func:`entangle.transforms.combine_groups`.

    Returns:
      An optax transform whose updates are PairGradients going in and a tree like the parameters coming out.

    Raises:
      TypeError: at trace time, when the updates are not PairGradients.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax.experimental import aggregating
      >>> from entangle import transforms
      >>> from entangle.types import PairGradients
      >>> tx = optax.chain(transforms.aggregate_pair(aggregating.average_per_element_updates()), optax.sgd(1.0))
      >>> params = jnp.zeros(1)
      >>> tx.update(PairGradients(jnp.array([1.0]), jnp.array([4.0])), tx.init(params), params)[0].tolist()
      [-1.5]
    """
    inner = optax.with_extra_args_support(aggregator)

    def update_fn(
        updates: PairGradients, state: Any, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, Any]:
        require_pair(updates, "aggregate_pair")
        return inner.update(stack_pair(updates), state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
