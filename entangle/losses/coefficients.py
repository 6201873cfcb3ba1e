"""The coefficients d_w and d_l of any margin objective, by differentiating the objective itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from entangle.losses.log_ratios import as_float32
from entangle.losses.objective import Objective, name_of
from entangle.types import PairLogProbs


class Coefficients(NamedTuple):
    """How strongly a loss pulls the two log-probabilities; its gradient is ``-(d_w g_w - d_l g_l)`` per pair.

    Attributes:
      chosen: ``d_w = -dL / d log pi_w``, ``[B]``.
      rejected: ``d_l = +dL / d log pi_l``, ``[B]``.
    """

    chosen: jax.Array
    rejected: jax.Array


def loss_and_coefficients(
    objective: Objective, lp: PairLogProbs, **hyperparameters: Any
) -> tuple[jax.Array, Coefficients]:
    """Evaluate an objective and its coefficients in one pass.

    Args:
      objective: any function of pair log-probabilities to per-pair losses, a user's own included.
      lp: pair log-probabilities, fields ``[B]``.
      **hyperparameters: passed on to the objective.

    Returns:
      Losses ``[B]`` and Coefficients of fields ``[B]``. For an objective that looks at the whole batch these are the
      derivatives of the summed loss, which is what a gradient step sees.

    Raises:
      ValueError: the objective did not return one value per pair.

    References:
      Yuan et al., arXiv 2410.13828, section 3.2.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-4.0, -4.0, -4.0, -4.0, 2.0, 2.0)))
      >>> loss, d = losses.loss_and_coefficients(losses.dpo, lp, beta=0.1)
      >>> float(loss[0]), float(d.chosen[0])
      (0.6931471824645996, 0.05000000074505806)
    """
    lp = as_float32(lp)

    def total(chosen: jax.Array, rejected: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = objective(lp._replace(chosen=chosen, rejected=rejected), **hyperparameters)
        if jnp.shape(values) != chosen.shape:
            raise ValueError(
                f"{name_of(objective)} returned shape {jnp.shape(values)}: one loss a pair is needed, {chosen.shape}"
            )
        return jnp.sum(values), values

    (slope_w, slope_l), values = jax.grad(total, argnums=(0, 1), has_aux=True)(lp.chosen, lp.rejected)
    return values, Coefficients(-slope_w, slope_l)


def coefficients(objective: Objective, lp: PairLogProbs, **hyperparameters: Any) -> Coefficients:
    """``d_w = -dL / d log pi_w`` and ``d_l = dL / d log pi_l`` of any objective, each ``[B]``.

    See :func:`loss_and_coefficients` for arguments and errors.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-4.0, -4.0, -4.0, -4.0, 2.0, 2.0)))
      >>> def mine(lp, weight=3.0):
      ...     return weight * jax.nn.relu(1.0 + lp.rejected - lp.chosen)
      >>> d_w, d_l = losses.coefficients(mine, lp)
      >>> float(d_w[0]), float(d_l[0])
      (3.0, 3.0)
    """
    return loss_and_coefficients(objective, lp, **hyperparameters)[1]
