"""Many gradients into one: groups of pairs, or of losses, stacked along a leading axis.

The convention is that of ``optax.experimental.aggregating``: row i of every leaf ``[N, ...]`` is the descent gradient of group
i. A rule for groups is a pure function of their N x N Gram (and of their losses) to N weights; the combined update is the
weighted sum of the rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from entangle.geometry.products import accumulator_dtype, row_gram
from entangle.transforms.weightings import check, check_count, inverse, root
from entangle.types import PairGradients, Params

GroupWeighting = Callable[[jax.Array, jax.Array | None], jax.Array]
"""Gram ``[N, N]`` and losses ``[N]`` (None where they were not given) to weights ``[N]``."""


class CombineGroupsState(NamedTuple):
    """What the head saw at its last step, for logging.

    Attributes:
      gram: ``[N, N]``.
      weights: ``[N]``.
    """

    gram: jax.Array
    weights: jax.Array


def combine_groups(weighting: GroupWeighting, groups: int) -> optax.GradientTransformationExtraArgs:
    """Combine the descent gradients of N groups into one; first in a chain.

    Args:
      weighting: from the Gram of the groups' gradients, and their losses, to N weights.
      groups: N.

    Returns:
      An optax transform whose updates are a tree like the parameters with leaves ``[N, ...]`` going in and like the
      parameters coming out, leaf dtypes kept. ``update`` takes the extra argument ``group_losses`` ``[N]``.

    Raises:
      ValueError: at trace time, when a leaf has another leading axis, or when the rule needs losses that are not given.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from entangle import transforms
      >>> tx = optax.chain(transforms.combine_groups(transforms.adaptive_balance(), 2), optax.sgd(1.0))
      >>> params = jnp.zeros(2)
      >>> updates, _ = tx.update(jnp.eye(2), tx.init(params), params, group_losses=jnp.array([3.0, 1.0]))
      >>> updates.tolist()  # the group with the larger loss weighs more
      [-0.75, -0.25]
    """
    if not callable(weighting) or len(inspect.signature(weighting).parameters) != 2:
        raise TypeError(
            "combine_groups takes a rule for groups, a function of Gram and losses, such as soft_aggregation(); "
            "weightings of pairs are for combine_pair"
        )
    groups = check_count("groups", groups, 1)

    def init_fn(params: Params) -> CombineGroupsState:
        dtype = accumulator_dtype(params)
        return CombineGroupsState(jnp.zeros((groups, groups), dtype), jnp.zeros(groups, dtype))

    def update_fn(
        updates: Params,
        state: CombineGroupsState,
        params: Params | None = None,
        *,
        group_losses: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[Params, CombineGroupsState]:
        del params, extra_args
        if isinstance(updates, PairGradients):
            raise TypeError(
                "combine_groups takes leaves [N, ...], a row a group, not PairGradients: a group's row is rejected - chosen; "
                "stack_pair(gradients) makes a row of each side"
            )
        shapes = {leaf.shape[:1] for leaf in jax.tree.leaves(updates)}
        if shapes != {(groups,)}:
            raise ValueError(f"combine_groups: leaves need the leading axis of {groups} groups, got {sorted(shapes)}")
        gram = row_gram(updates)
        losses = None if group_losses is None else jnp.asarray(group_losses)
        weights = jnp.asarray(weighting(gram, losses), gram.dtype)
        if weights.shape != (groups,):
            raise ValueError(f"combine_groups: the rule gave weights of shape {list(weights.shape)}, not {[groups]}")

        def combine(rows: jax.Array) -> jax.Array:
            wide = weights.astype(accumulator_dtype(rows))
            summed = jnp.tensordot(wide, rows.astype(wide.dtype), 1, precision=jax.lax.Precision.HIGHEST)
            return summed.astype(rows.dtype)

        # in the dtype of the state, which is the parameters', where gradients are narrower or wider
        seen = CombineGroupsState(*(new.astype(old.dtype) for new, old in zip((gram, weights), state, strict=True)))
        return jax.tree.map(combine, updates), seen

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def group_mean() -> GroupWeighting:
    """Every group weighs 1/N.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> transforms.group_mean()(jnp.eye(4), None).tolist()
      [0.25, 0.25, 0.25, 0.25]
    """
    return lambda gram, losses: jnp.full(gram.shape[0], 1 / gram.shape[0], gram.dtype)


def soft_aggregation(temperature: float = 1.0) -> GroupWeighting:
    """SplitFlow's aggregation: weights ``softmax_i(sum_{j != i} cos(g_i, g_j) / temperature)``.

    Groups that agree with the others weigh more; with two groups both weigh 1/2. A zero gradient has cosine 0 with all.

    Args:
      temperature: positive; the published rule is 1.

    References:
      Yoon et al., SplitFlow, arXiv 2510.25970 (velocity field aggregation; there the rows are velocity fields of sub-prompts).

    Raises:
      ValueError: the temperature is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> g = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
      >>> [round(w, 3) for w in transforms.soft_aggregation()(g @ g.T, None).tolist()]
      [0.422, 0.422, 0.155]
    """
    check("temperature", temperature, 0.0, float("inf"))

    def weighting(gram: jax.Array, losses: jax.Array | None) -> jax.Array:
        norm = inverse(root(jnp.diagonal(gram)))
        cosines = gram * norm[:, None] * norm[None]
        agreement = jnp.sum(cosines, 1) - jnp.diagonal(cosines)
        return jax.nn.softmax(agreement / jnp.asarray(temperature, gram.dtype))

    return weighting


def projected_on_last() -> GroupWeighting:
    """SplitFlow's projection: the last row is the full target, the others are projected on it and averaged.

    With u the last row's unit vector, the mean of ``<g_i, u> u`` over the other rows: all weight is on the last row. Zero
    where the last row is zero.

    References:
      Yoon et al., SplitFlow, arXiv 2510.25970 (latent trajectory projection).

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> g = jnp.array([[1.0, 0.0], [3.0, 4.0], [2.0, 0.0]])
      >>> transforms.projected_on_last()(g @ g.T, None).tolist()
      [0.0, 0.0, 1.0]
    """

    def weighting(gram: jax.Array, losses: jax.Array | None) -> jax.Array:
        if gram.shape[0] < 2:
            raise ValueError("projected_on_last: a row besides the full target is needed")
        square = gram[-1, -1]
        share = jnp.mean(gram[:-1, -1]) * inverse(square)
        return jnp.zeros(gram.shape[0], gram.dtype).at[-1].set(share)

    return weighting


def adaptive_balance() -> GroupWeighting:
    """BideDPO's adaptive loss balancing: weights ``L_i / sum_j L_j``, without derivative.

    For two decoupled pairs ``w_1 = L_1 / (L_1 + L_2)`` and ``w_2 = 1 - w_1``: the combined update is the gradient of
    ``w_1 L_1 + w_2 L_2`` with the weights held fixed. Losses are taken to be 0 or more, as DPO's are; where all are zero the
    groups weigh the same.

    References:
      Zhou et al., BideDPO, arXiv 2511.19268 (adaptive loss balancing).

    Raises:
      ValueError: at trace time, when ``update`` is not given ``group_losses`` of shape ``[N]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> transforms.adaptive_balance()(jnp.eye(2), jnp.array([3.0, 1.0])).tolist()
      [0.75, 0.25]
    """

    def weighting(gram: jax.Array, losses: jax.Array | None) -> jax.Array:
        if losses is None or losses.shape != gram.shape[:1]:
            given = "none" if losses is None else f"shape {losses.shape}"
            raise ValueError(
                f"adaptive_balance: give update(..., group_losses=) of shape {gram.shape[:1]}, got {given}"
            )
        losses = jax.lax.stop_gradient(losses).astype(gram.dtype)
        total = jnp.sum(losses)
        return jnp.where(total == 0, 1 / gram.shape[0], losses * inverse(total))

    return weighting
