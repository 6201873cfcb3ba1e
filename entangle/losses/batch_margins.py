"""Objectives that hold a pair's margin against those of the whole batch: its order, its mean, its spread."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from entangle.losses.hyperparameters import Decay, FlipProbability, NonNegative, Positive
from entangle.losses.log_ratios import as_float32, clipped, length_averages, log_ratios
from entangle.losses.logistic import smoothed_logistic
from entangle.losses.objective import running, whole_batch
from entangle.types import PairLogProbs


def _ranks(values: jax.Array) -> jax.Array:
    """Position of every value in the sorted order, equal ones in the order in which they come, ``[B]`` int32."""
    return jnp.argsort(jnp.argsort(values))


@whole_batch
def aot(lp: PairLogProbs, beta: Positive = 0.01, label_smoothing: FlipProbability = 0.0) -> jax.Array:
    """Alignment via optimal transport, paired: the k-th smallest margin against the reference's k-th smallest margin.

    Formulas:
      m = l_w - l_l
      x = beta * (m - sort(ref_w - ref_l)[rank(m)])
      L = -(1 - label_smoothing) * log s(x) - label_smoothing * log s(-x)
      d_w = beta * ((1 - label_smoothing) * s(-x) - label_smoothing * s(x))
      d_l = d_w
      d_w / d_l = 1
      d_w < 0 where s(x) > 1 - label_smoothing
      d_l < 0 where s(x) > 1 - label_smoothing

    It looks at the whole batch, which it sorts; the loss stays with the pair whose margin it is. Margins that are equal keep
    their order, which decides whose loss is whose and not the sum.

    Args:
      lp: pair log-probabilities of the whole (global) batch, fields ``[B]``.
      beta: inverse temperature.
      label_smoothing: probability that a label is wrong.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Melnyk et al., arXiv 2406.05882.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array(x) for x in ([1.0, 2.0], [0.0, 0.0], [2.0, 1.0], [0.0, 0.0], [1, 1], [1, 1])))
      >>> losses.aot(lp)  # the same margins in another order: log 2 each
      Array([0.6931472, 0.6931472], dtype=float32)
    """
    lp = as_float32(lp)
    margin = lp.chosen - lp.rejected
    partner = jnp.sort(lp.ref_chosen - lp.ref_rejected)[_ranks(jax.lax.stop_gradient(margin))]
    return smoothed_logistic(beta * (margin - partner), label_smoothing)


@whole_batch
def aot_unpaired(lp: PairLogProbs, beta: Positive = 0.01, label_smoothing: FlipProbability = 0.0) -> jax.Array:
    """Alignment via optimal transport, unpaired: the k-th smallest chosen log-ratio against the k-th smallest rejected one.

    Formulas:
      x = beta * (r_w - sort(r_l)[rank(r_w)])
      y = beta * (sort(r_w)[rank(r_l)] - r_l)
      L = -(1 - label_smoothing) * log s(x) - label_smoothing * log s(-x)
      d_w = beta * ((1 - label_smoothing) * s(-x) - label_smoothing * s(x))
      d_l = beta * ((1 - label_smoothing) * s(-y) - label_smoothing * s(y))
      d_w < 0 where s(x) > 1 - label_smoothing
      d_l < 0 where s(y) > 1 - label_smoothing

    It looks at the whole batch: a chosen response meets a rejected one of another pair. The loss stays with the pair of the
    chosen one; the coefficients are the derivatives of the batch's sum. Equal log-ratios keep their order.

    Args:
      lp: pair log-probabilities of the whole (global) batch, fields ``[B]``.
      beta: inverse temperature.
      label_smoothing: probability that a label is wrong.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Melnyk et al., arXiv 2406.05882.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array(x) for x in ([1.0, 2.0], [2.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1, 1], [1, 1])))
      >>> losses.aot_unpaired(lp)  # the same log-ratios on both sides: log 2 each
      Array([0.6931472, 0.6931472], dtype=float32)
    """
    r_w, r_l = log_ratios(lp)
    partner = jnp.sort(r_l)[_ranks(jax.lax.stop_gradient(r_w))]
    return smoothed_logistic(beta * (r_w - partner), label_smoothing)


@whole_batch
def amapo(lp: PairLogProbs, beta: Positive = 3.0) -> jax.Array:
    """Adaptive margin-attached preference optimisation: pairs below the batch's mean margin get a target, others none.

    Formulas:
      m = lbar_w - lbar_l
      mu = mean(m)
      q = min((mu - m) / std(m) * mu, 80)
      x = beta * m - beta * 1[m < mu] * exp(q)
      L = -log s(x)
      d_w = beta * s(-x) / n_w
      d_l = beta * s(-x) / n_l
      d_w / d_l = n_l / n_w

    It looks at the whole batch through mean and standard deviation (over B - 1, as in the authors' code), which carry no
    gradient. A batch whose margins are all equal has no target; exponents are held at 80, where float32 ends.

    Args:
      lp: pair log-probabilities of the whole (global) batch, fields ``[B]``.
      beta: scale of the length-averaged margin; the authors use 2 to 3.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Deng et al., arXiv 2511.09385.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -3.0, 0.0, 0.0, 2.0, 2.0)))
      >>> losses.amapo(lp)  # one pair is its own mean: SimPO without a target, here at margin 0
      Array([0.6931472], dtype=float32)
    """
    chosen, rejected = length_averages(lp)
    margin = chosen - rejected
    fixed = jax.lax.stop_gradient(margin)
    mean = jnp.mean(fixed)
    spread = jnp.sqrt(jnp.sum((fixed - mean) ** 2) / max(fixed.size - 1, 1))
    below = (fixed < mean) & (spread > 0)
    exponent = (mean - fixed) / jnp.where(spread > 0, spread, 1.0) * mean
    target = jnp.where(below, jnp.exp(clipped(exponent, 80.0)), 0.0)
    return -jax.nn.log_sigmoid(beta * margin - beta * target)


class MovingMargin(NamedTuple):
    """What beta-DPO remembers.

    Attributes:
      mean: exponential moving average of the batches' mean margins of log-ratios, in nats; scalar, from 0.
    """

    mean: jax.Array


def _moving_average(memory: MovingMargin, lp: PairLogProbs, momentum: float | jax.Array) -> MovingMargin:
    r_w, r_l = log_ratios(lp)
    return MovingMargin(momentum * memory.mean.astype(r_w.dtype) + (1.0 - momentum) * jnp.mean(r_w - r_l))


@running(lambda: MovingMargin(jnp.zeros(())), _moving_average)
def beta_dpo(
    lp: PairLogProbs,
    memory: MovingMargin,
    beta: Positive = 0.1,
    strength: NonNegative = 0.6,
    momentum: Decay = 0.9,
    lowest: Positive = 1e-3,
) -> jax.Array:
    """DPO whose beta follows the batch: larger where its mean margin is above what was seen before.

    Formulas:
      g = mean(h) - (1 - momentum) * mean(h)
      b = max(beta * (1 + strength * g), lowest)
      L = -log s(b * h)
      d_w = b * s(-b * h)
      d_l = b * s(-b * h)
      d_w / d_l = 1

    ``g`` is the batch's mean margin less its moving average, which begins at 0 and takes in the batch before it is used, as
    in the authors' code; the formula is that of the first batch. Neither carries a gradient. The authors also drop a fifth
    of the pairs by lot, those far from the average more often: that is sampling, and is left out here.

    Args:
      lp: pair log-probabilities of the whole (global) batch, fields ``[B]``.
      memory: moving average of the margins; see ``RunningObjective``.
      beta: inverse temperature at an average margin.
      strength: of the change in beta, a nat.
      momentum: of the moving average.
      lowest: beta does not go below it.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Wu et al., arXiv 2407.08639; values of the authors' code.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> bool(losses.beta_dpo(lp, strength=0.0)[0] == losses.dpo(lp)[0])
      True
    """
    r_w, r_l = log_ratios(lp)
    margin = r_w - r_l
    gap = jax.lax.stop_gradient(jnp.mean(margin)) - memory.mean.astype(margin.dtype)
    scale = jnp.maximum(beta * (1.0 + strength * gap), lowest)
    return -jax.nn.log_sigmoid(scale * margin)
