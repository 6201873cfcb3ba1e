"""Gradients of the two log-probabilities of a pair: their exact geometry, and the two batch gradients apart.

The scan over pairs is exact for any model. It is the oracle that every faster way is held against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from entangle.geometry.products import gram
from entangle.types import LogProbFn, PairGeometry, PairGradients, Params


def count_pairs(batch: Any) -> int:
    """How many pairs a batch has, if all of its arrays agree on it; else a ValueError.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.geometry.pairs import count_pairs
      >>> count_pairs((jnp.ones((3, 2)), jnp.ones((3, 2, 5))))
      3
    """
    shapes = {jnp.shape(leaf)[:2] for leaf in jax.tree.leaves(batch)}
    if len(shapes) != 1 or any(len(shape) < 2 or shape[1] != 2 or not shape[0] for shape in shapes):
        raise ValueError(f"batch: every array needs the leading axes [B, 2] of B >= 1 pairs, got {sorted(shapes)}")
    ((pairs, _),) = shapes
    return pairs


def take_side(batch: Any, side: int) -> Any:
    """One side of a pair batch, the side axis kept: leaves ``[B, 2, ...]`` become ``[B, 1, ...]``.

    Args:
      batch: pytree of arrays with leading axes ``[B, 2]``.
      side: 0 chosen, 1 rejected.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> geometry.take_side(jnp.arange(4).reshape(2, 2), 1).tolist()
      [[1], [3]]
    """
    return jax.tree.map(lambda leaf: leaf[:, side : side + 1], batch)


def scan_geometry(log_prob_fn: LogProbFn, params: Params, batch: Any, *, batch_size: int | None = None) -> PairGeometry:
    """Exact ``|g_w|^2``, ``|g_l|^2`` and ``<g_w, g_l>`` of every pair, by scanning over pairs: the slow way for any model.

    ``g_w`` and ``g_l`` are the gradients of the summed completion log-probabilities with respect to all of ``params``.

    Args:
      log_prob_fn: pure function of params and a batch of leaves ``[B, R, ...]`` to ``[B, R]``, row by row (LogProbFn).
      params: pytree of trainable arrays.
      batch: pytree of arrays with leading axes ``[B, 2]``, for example a PairBatch.
      batch_size: pairs differentiated at a time; memory is two gradients per pair at a time. None takes one at a time.

    Returns:
      PairGeometry of fields ``[B]``, float32 (float64 for float64 parameters).

    Raises:
      ValueError: the batch has other leading axes, or batch_size is below 1.

    References:
      Yuan et al., arXiv 2410.13828, section 3.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> features = jnp.array([[[1.0, 0.0], [1.0, 1.0]]])  # one pair; log pi is linear in params
      >>> s = geometry.scan_geometry(lambda params, x: x @ params, jnp.zeros(2), features)
      >>> s.inner_product
      Array([1.], dtype=float32)
    """

    def one_pair(pair: Any) -> PairGeometry:
        row = jax.tree.map(lambda leaf: leaf[None], pair)
        sides = (jax.grad(lambda p, r: log_prob_fn(p, r)[0, 0])(params, take_side(row, side)) for side in (0, 1))
        return gram(PairGradients(*sides))

    count_pairs(batch)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: at least 1 pair at a time, got {batch_size}")
    return jax.lax.map(one_pair, batch, batch_size=batch_size)


def pair_vjp(
    log_prob_fn: LogProbFn, params: Params, batch: Any
) -> tuple[jax.Array, Callable[[jax.Array, jax.Array], PairGradients]]:
    """Log-probabilities of a batch, and the pull-back to the two gradients apart; costs what one plain backward costs.

    Chosen and rejected rows are differentiated side by side, so nothing is computed twice.

    Args:
      log_prob_fn: pure function of params and a batch of leaves ``[B, R, ...]`` to ``[B, R]``, row by row (LogProbFn).
      params: pytree of trainable arrays.
      batch: pytree of arrays with leading axes ``[B, 2]``.

    Returns:
      Log-probabilities ``[B, 2]``, and a function of the coefficients d_w ``[B]`` and d_l ``[B]`` that returns
      ``PairGradients(mean(d_w g_w), mean(d_l g_l))``.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> features = jnp.array([[[1.0, 0.0], [1.0, 1.0]]])
      >>> log_probs, pull_back = geometry.pair_vjp(lambda params, x: x @ params, jnp.ones(2), features)
      >>> log_probs.tolist(), pull_back(jnp.array([1.0]), jnp.array([0.5])).rejected.tolist()
      ([[1.0, 2.0]], [0.5, 0.5])
    """
    sides = [jax.vjp(lambda p, side=side: log_prob_fn(p, take_side(batch, side))[:, 0], params) for side in (0, 1)]
    (chosen, pull_chosen), (rejected, pull_rejected) = sides

    def pull_back(d_w: jax.Array, d_l: jax.Array) -> PairGradients:
        count = chosen.shape[0]
        (g_chosen,) = pull_chosen((d_w / count).astype(chosen.dtype))
        (g_rejected,) = pull_rejected((d_l / count).astype(rejected.dtype))
        return PairGradients(g_chosen, g_rejected)

    return jnp.stack([chosen, rejected], axis=1), pull_back
