"""Objectives that are a negative log-sigmoid of a margin. All are per pair; the mean is taken once, in the training step."""

from __future__ import annotations

import jax

from entangle.losses.log_ratios import as_float32, length_averages, log_ratios
from entangle.types import PairLogProbs


def dpo(lp: PairLogProbs, beta: float = 0.1) -> jax.Array:
    """Direct preference optimisation: ``-log s(beta (r_w - r_l))`` with r the log-ratio to the reference.

    Coefficients: ``d_w = d_l = beta s(-beta (r_w - r_l))``.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature of the implicit reward.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Rafailov et al., arXiv 2305.18290, equation 7.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> losses.dpo(lp, beta=0.0)  # log 2
      Array([0.6931472], dtype=float32)
    """
    r_w, r_l = log_ratios(lp)
    return -jax.nn.log_sigmoid(beta * (r_w - r_l))


def r_dpo(lp: PairLogProbs, beta: float = 0.1, alpha: float = 0.01) -> jax.Array:
    """DPO with a length term: ``-log s(beta (r_w - r_l) + alpha (n_w - n_l))``.

    Coefficients: ``d_w = d_l = beta s(-(the argument))``.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature of the implicit reward.
      alpha: nats a token of difference in length; the authors use 0 to 0.01 on dialogues and 0.2 to 0.5 on TL;DR.

    Returns:
      Loss per pair, ``[B]``.

    References:
      Park et al., arXiv 2403.19159; alpha 0.2 in the code of arXiv 2410.13828.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> bool(losses.r_dpo(lp, alpha=0.0)[0] == losses.dpo(lp)[0])
      True
    """
    r_w, r_l = log_ratios(lp)
    lp = as_float32(lp)
    return -jax.nn.log_sigmoid(beta * (r_w - r_l) + alpha * (lp.chosen_length - lp.rejected_length))


def simpo(lp: PairLogProbs, beta: float = 2.0, gamma: float = 0.5) -> jax.Array:
    """Simple preference optimisation: ``-log s(beta (l_w / n_w - l_l / n_l) - gamma)``; needs no reference.

    Coefficients: ``d_w = beta s(-(the argument)) / n_w``, ``d_l`` the same over ``n_l``.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: scale of the length-averaged margin.
      gamma: target margin in nats, after scaling by beta.

    Returns:
      Loss per pair, ``[B]``.

    References:
      Meng et al., arXiv 2405.14734, equation 6.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -3.5, 0.0, 0.0, 2.0, 2.0)))
      >>> losses.simpo(lp, beta=2.0, gamma=0.5)  # the margin is exactly the target: log 2
      Array([0.6931472], dtype=float32)
    """
    chosen, rejected = length_averages(lp)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)


def cpo(lp: PairLogProbs, beta: float = 0.1, nll_weight: float = 1.0) -> jax.Array:
    """Contrastive preference optimisation: ``-log s(beta (l_w - l_l)) - lambda l_w``; needs no reference.

    Coefficients: ``d_w = beta s(-beta (l_w - l_l)) + lambda``, ``d_l = beta s(-beta (l_w - l_l))``.

    The likelihood term is the sum over the chosen tokens of the same pair, as arXiv 2410.13828 writes it; common
    libraries take the mean over all chosen tokens of the batch instead.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature.
      nll_weight: lambda, the weight of the chosen response's negative log-likelihood.

    Returns:
      Loss per pair, ``[B]``.

    References:
      Xu et al., arXiv 2401.08417.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -3.0, 0.0, 0.0, 2.0, 2.0)))
      >>> losses.cpo(lp, nll_weight=1.0)  # log 2 + 3
      Array([3.6931472], dtype=float32)
    """
    lp = as_float32(lp)
    return -jax.nn.log_sigmoid(beta * (lp.chosen - lp.rejected)) - nll_weight * lp.chosen


def dpop(lp: PairLogProbs, beta: float = 0.1, penalty: float = 50.0) -> jax.Array:
    """DPO-Positive: ``-log s(beta (r_w - r_l - lambda max(0, -r_w)))``, the penalty inside the sigmoid as in the paper.

    Coefficients: ``d_l = beta s(-(the argument))``, ``d_w = d_l (1 + lambda 1[r_w < 0])``; at ``r_w = 0`` the indicator is 0.
    A policy that is its own reference lies on that kink, where rounding decides unless both are scored by one program.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature.
      penalty: lambda, the weight of a chosen log-probability below the reference's; 5, 50 or 500 in the paper.

    Returns:
      Loss per pair, ``[B]``.

    References:
      Pal et al., arXiv 2402.13228.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> bool(losses.dpop(lp)[0] == losses.dpo(lp)[0])  # the chosen one has not fallen: no penalty
      True
    """
    r_w, r_l = log_ratios(lp)
    return -jax.nn.log_sigmoid(beta * (r_w - r_l - penalty * jax.nn.relu(-r_w)))
