"""Negative log-sigmoids of a margin of log-ratios: DPO and what was built on it. All are per pair."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from entangle.losses.hyperparameters import FlipProbability, NonNegative, Positive, Real, Share
from entangle.losses.log_ratios import as_float32, log_ratios
from entangle.types import PairLogProbs


def dpo(lp: PairLogProbs, beta: Positive = 0.1) -> jax.Array:
    """Direct preference optimisation: the logistic loss of the margin of implicit rewards.

    Formulas:
      L = -log s(beta * h)
      d_w = beta * s(-beta * h)
      d_l = beta * s(-beta * h)
      d_w / d_l = 1

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
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -3.0, -5.0, 2.0, 2.0)))
      >>> losses.dpo(lp)  # policy = reference: log 2
      Array([0.6931472], dtype=float32)
    """
    r_w, r_l = log_ratios(lp)
    return -jax.nn.log_sigmoid(beta * (r_w - r_l))


def cdpo(lp: PairLogProbs, beta: Positive = 0.1, label_smoothing: FlipProbability = 0.1) -> jax.Array:
    """Conservative DPO: DPO in expectation over labels that are wrong with probability ``label_smoothing``.

    Formulas:
      z = beta * h
      L = -(1 - label_smoothing) * log s(z) - label_smoothing * log s(-z)
      d_w = beta * ((1 - label_smoothing) * s(-z) - label_smoothing * s(z))
      d_l = d_w
      d_w / d_l = 1
      d_w < 0 where s(z) > 1 - label_smoothing
      d_l < 0 where s(z) > 1 - label_smoothing

    Past the sign change the gradient pulls the margin back: Condition 1 then speaks of the exchanged pair.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature of the implicit reward.
      label_smoothing: probability that a label is wrong.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Mitchell, A note on DPO with noisy preferences and relationship to IPO, 2023.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> bool(losses.cdpo(lp, label_smoothing=0.0)[0] == losses.dpo(lp)[0])
      True
    """
    r_w, r_l = log_ratios(lp)
    return smoothed_logistic(beta * (r_w - r_l), label_smoothing)


def smoothed_logistic(z: jax.Array, label_smoothing: float | jax.Array) -> jax.Array:
    """Logistic loss of a margin whose sign is wrong with a given probability.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.losses.logistic import smoothed_logistic
      >>> smoothed_logistic(jnp.zeros(1), 0.3)
      Array([0.6931472], dtype=float32)
    """
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)


def robust_dpo(lp: PairLogProbs, beta: Positive = 0.1, label_smoothing: FlipProbability = 0.1) -> jax.Array:
    """Robust DPO: an unbiased estimate of the DPO loss of true labels from labels that are wrong now and then.

    Formulas:
      z = beta * h
      L = (-(1 - label_smoothing) * log s(z) + label_smoothing * log s(-z)) / (1 - 2 * label_smoothing)
      d_w = beta * ((1 - label_smoothing) * s(-z) + label_smoothing * s(z)) / (1 - 2 * label_smoothing)
      d_l = d_w
      d_w / d_l = 1

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature of the implicit reward.
      label_smoothing: probability that a label is wrong; below one half, where nothing could be learned.

    Returns:
      Loss per pair, ``[B]``, in nats; it may be negative.

    References:
      Chowdhury et al., arXiv 2403.00409.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> bool(losses.robust_dpo(lp, label_smoothing=0.0)[0] == losses.dpo(lp)[0])
      True
    """
    r_w, r_l = log_ratios(lp)
    z = beta * (r_w - r_l)
    total = -(1.0 - label_smoothing) * jax.nn.log_sigmoid(z) + label_smoothing * jax.nn.log_sigmoid(-z)
    return total / (1.0 - 2.0 * label_smoothing)


def r_dpo(lp: PairLogProbs, beta: Positive = 0.1, alpha: Real = 0.01) -> jax.Array:
    """DPO with a term for the difference in length, which the margin then need not use.

    Formulas:
      x = beta * h + alpha * (len_w - len_l)
      L = -log s(x)
      d_w = beta * s(-x)
      d_l = beta * s(-x)
      d_w / d_l = 1

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature of the implicit reward.
      alpha: nats a token of difference in length; the authors use 0 to 0.01 on dialogues and 0.2 to 0.5 on TL;DR.

    Returns:
      Loss per pair, ``[B]``, in nats.

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


def margin_dpo(lp: PairLogProbs, beta: Positive = 0.1, margin: Real | jax.Array = 1.0) -> jax.Array:
    """DPO with an offset: the margin of implicit rewards has to exceed a given one.

    Formulas:
      x = beta * h - margin
      L = -log s(x)
      d_w = beta * s(-x)
      d_l = beta * s(-x)
      d_w / d_l = 1

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature of the implicit reward.
      margin: in nats, after scaling by beta: one number, or ``[B]`` from a grader.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Amini et al., arXiv 2402.10571 (ODPO), where the offset is a function of two scores.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> losses.margin_dpo(lp, beta=0.5, margin=jnp.array([1.0]))  # the margin is met: log 2
      Array([0.6931472], dtype=float32)
    """
    r_w, r_l = log_ratios(lp)
    return -jax.nn.log_sigmoid(beta * (r_w - r_l) - jnp.asarray(margin, r_w.dtype))


def dpop(lp: PairLogProbs, beta: Positive = 0.1, penalty: NonNegative = 50.0) -> jax.Array:
    """DPO-Positive: the penalty on a fallen chosen response stands inside the sigmoid, as in the paper.

    Formulas:
      x = beta * (h - penalty * max(0, -r_w))
      L = -log s(x)
      d_w = beta * s(-x) * (1 + penalty * 1[r_w < 0])
      d_l = beta * s(-x)
      d_w / d_l = 1 + penalty * 1[r_w < 0]

    At ``r_w = 0`` there is no penalty. A policy that is its own reference lies on that kink, where rounding decides unless
    both are scored by one program. Users also write the penalty outside: ``dpop_outside``.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature.
      penalty: lambda, the weight of a chosen log-probability below the reference's; 5, 50 or 500 in the paper.

    Returns:
      Loss per pair, ``[B]``, in nats.

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


def dpop_outside(lp: PairLogProbs, beta: Positive = 0.1, penalty: NonNegative = 5.0) -> jax.Array:
    """DPO plus the penalty on a fallen chosen response, outside the sigmoid: a common reading of DPO-Positive.

    Formulas:
      L = -log s(beta * h) + penalty * max(0, -r_w)
      d_w = beta * s(-beta * h) + penalty * 1[r_w < 0]
      d_l = beta * s(-beta * h)

    At ``r_w = 0`` there is no penalty. The paper has it inside: ``dpop``, whose penalty 50 at beta 0.1 weighs at most as
    much as 5 here.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature.
      penalty: weight of a chosen log-probability below the reference's.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      The other reading of Pal et al., arXiv 2402.13228, in users' code.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-5.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> losses.dpop_outside(lp).round(4)  # log 2 + 5
      Array([5.6931], dtype=float32)
    """
    r_w, r_l = log_ratios(lp)
    return -jax.nn.log_sigmoid(beta * (r_w - r_l)) + penalty * jax.nn.relu(-r_w)


def dpo_shift(lp: PairLogProbs, beta: Positive = 0.1, shift: Share = 0.95) -> jax.Array:
    """DPO-Shift: the rejected reward counts a little less, so that the chosen one need not fall with it.

    Formulas:
      x = beta * (r_w - shift * r_l)
      L = -log s(x)
      d_w = beta * s(-x)
      d_l = shift * beta * s(-x)
      d_w / d_l = 1 / shift

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature of the implicit reward.
      shift: factor of the rejected reward; the authors take it between 0.5 and 1, fixed or along a schedule.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Yang et al., arXiv 2502.07599.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> bool(losses.dpo_shift(lp, shift=1.0)[0] == losses.dpo(lp)[0])
      True
    """
    r_w, r_l = log_ratios(lp)
    return -jax.nn.log_sigmoid(beta * (r_w - shift * r_l))


def bdpo(lp: PairLogProbs, beta: Positive = 0.1, mixture: Share = 0.5) -> jax.Array:
    """Bounded DPO: the rejected probability is mixed with the reference's, so that it has a floor.

    Formulas:
      m_l = logaddexp(log(mixture) + r_l, log(1 - mixture))
      x = beta * (r_w - m_l)
      L = -log s(x)
      d_w = beta * s(-x)
      d_l = beta * s(-x) * exp(log(mixture) + r_l - m_l)
      d_w / d_l = exp(m_l - r_l - log(mixture))

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature of the implicit reward.
      mixture: lambda, the policy's share in ``lambda pi_l + (1 - lambda) pi_ref_l``; 1 is DPO.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Cho et al., arXiv 2506.12725.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> bool(losses.bdpo(lp, mixture=1.0)[0] == losses.dpo(lp)[0])
      True
    """
    r_w, r_l = log_ratios(lp)
    rest = jnp.log1p(-jnp.asarray(mixture, r_l.dtype))
    mixed = jnp.logaddexp(jnp.log(jnp.asarray(mixture, r_l.dtype)) + r_l, rest)
    return -jax.nn.log_sigmoid(beta * (r_w - mixed))
