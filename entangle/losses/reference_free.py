"""Objectives of the policy's log-probabilities alone. All are per pair."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from entangle.losses.hyperparameters import NonNegative, Positive, Real
from entangle.losses.log_ratios import as_float32, clipped, length_averages
from entangle.types import PairLogProbs

PROBABILITY_ONE = -1e-7
"""Nats a token from which on a length-averaged response counts as certain: its odds are held there."""


def cpo(lp: PairLogProbs, beta: Positive = 0.1, nll_weight: NonNegative = 1.0) -> jax.Array:
    """Contrastive preference optimisation: the logistic loss without a reference, plus the chosen response's NLL.

    Formulas:
      x = beta * (l_w - l_l)
      L = -log s(x) - nll_weight * l_w
      d_w = beta * s(-x) + nll_weight
      d_l = beta * s(-x)

    The likelihood term is the sum over the chosen tokens of the same pair, as arXiv 2410.13828 writes it; common
    libraries take the mean over all chosen tokens of the batch instead: add ``nll_token_mean`` to ``cpo`` of weight 0.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature.
      nll_weight: lambda, the weight of the chosen response's negative log-likelihood.

    Returns:
      Loss per pair, ``[B]``, in nats.

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


def simpo(lp: PairLogProbs, beta: Positive = 2.0, gamma: Real = 0.5) -> jax.Array:
    """Simple preference optimisation: the margin of length-averaged log-probabilities has to exceed a target.

    Formulas:
      x = beta * (lbar_w - lbar_l) - gamma
      L = -log s(x)
      d_w = beta * s(-x) / n_w
      d_l = beta * s(-x) / n_l
      d_w / d_l = n_l / n_w

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: scale of the length-averaged margin; the authors use 2 to 10.
      gamma: target margin in nats, after scaling by beta.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Meng et al., arXiv 2405.14734, equation 6.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -8.0, 0.0, 0.0, 2.0, 4.0)))
      >>> losses.simpo(lp, beta=1.0, gamma=0.5)  # averages -1.5 and -2 meet the target: log 2
      Array([0.6931472], dtype=float32)
    """
    chosen, rejected = length_averages(lp)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)


def alphapo(lp: PairLogProbs, beta: Positive = 2.5, gamma: Real = 0.1, alpha: Real = 0.25) -> jax.Array:
    """AlphaPO: SimPO with the reward ``(1 - p^-alpha) / alpha`` of the length-averaged probability p.

    Formulas:
      q_w = min(-alpha * lbar_w, 80)
      q_l = min(-alpha * lbar_l, 80)
      x = beta * (expm1(q_l) - expm1(q_w)) / alpha - gamma
      L = -log s(x)
      d_w = beta * s(-x) * exp(q_w) * 1[q_w < 80] / n_w
      d_l = beta * s(-x) * exp(q_l) * 1[q_l < 80] / n_l

    Exponents are held at 80, where float32 ends; a response beyond it has coefficient 0. At ``alpha = 0`` it is SimPO.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: scale of the margin of rewards.
      gamma: target margin in nats, after scaling by beta.
      alpha: shape of the reward; 0 is the logarithm.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Gupta et al., arXiv 2501.03884.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -8.0, 0.0, 0.0, 2.0, 4.0)))
      >>> bool(losses.alphapo(lp, alpha=0.0)[0] == losses.simpo(lp, beta=2.5, gamma=0.1)[0])
      True
    """
    chosen, rejected = (expm1_over(average, -alpha) for average in length_averages(lp))
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)


def expm1_over(x: jax.Array, rate: float | jax.Array) -> jax.Array:
    """``(exp(rate x) - 1) / rate``, and x at a rate of 0, with its derivatives there; exponents are held at 80.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.losses.reference_free import expm1_over
      >>> expm1_over(jnp.array([1.0]), 0.0).tolist(), expm1_over(jnp.array([0.0]), 1.0).tolist()
      ([1.0], [0.0])
    """
    rate = jnp.asarray(rate, x.dtype)
    divisor = jnp.where(rate == 0, 1, rate)
    return jnp.where(rate == 0, x + rate * x * x / 2, jnp.expm1(clipped(divisor * x, 80.0)) / divisor)


def orpo(lp: PairLogProbs, odds_weight: NonNegative = 0.1) -> jax.Array:
    """Odds ratio preference optimisation: the chosen response's NLL, plus the logistic loss of the log odds ratio.

    Formulas:
      c_w = min(lbar_w, -1e-7)
      c_l = min(lbar_l, -1e-7)
      x = c_w - log(-expm1(c_w)) - c_l + log(-expm1(c_l))
      L = -lbar_w - odds_weight * log s(x)
      d_w = (1 + odds_weight * s(-x) * 1[lbar_w < -1e-7] / -expm1(c_w)) / n_w
      d_l = odds_weight * s(-x) * 1[lbar_l < -1e-7] / -expm1(c_l) / n_l

    The odds are those of the length-averaged probability. At probability 1 they are infinite: they are held from
    ``-1e-7`` nats a token on, where their term has coefficient 0. The NLL is the mean over the pair's chosen tokens; some
    libraries take it over prompt and completion, or over all tokens of the batch.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      odds_weight: lambda, the weight of the odds ratio.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Hong et al., arXiv 2403.07691, equations 6 and 7.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-2.0, -2.0, 0.0, 0.0, 2.0, 2.0)))
      >>> losses.orpo(lp, odds_weight=1.0)  # 1 + log 2
      Array([1.6931472], dtype=float32)
    """
    chosen, rejected = length_averages(lp)
    (w, rest_w), (l, rest_l) = _log_odds_parts(chosen), _log_odds_parts(rejected)
    return -chosen - odds_weight * jax.nn.log_sigmoid((w - l) - (rest_w - rest_l))


def asft(lp: PairLogProbs, weight: NonNegative = 1.0) -> jax.Array:
    """Aligned supervised fine-tuning: the chosen response's NLL, plus the log odds of each response by itself.

    Formulas:
      c_w = min(lbar_w, -1e-7)
      c_l = min(lbar_l, -1e-7)
      L = -lbar_w - weight * (c_w + log(-expm1(c_l)))
      d_w = (1 + weight * 1[lbar_w < -1e-7]) / n_w
      d_l = weight * exp(c_l) / -expm1(c_l) * 1[lbar_l < -1e-7] / n_l

    The paper's ``log s(LO_w) + log s(-LO_l)`` is ``log p_w + log(1 - p_l)``, as LO are the log odds of the length-averaged
    probabilities p. At probability 1 they are held as in ``orpo``.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      weight: of the odds.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Wang et al., arXiv 2409.10571.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-2.0, -2.0, 0.0, 0.0, 2.0, 2.0)))
      >>> losses.asft(lp).round(4)  # 1 + 1 - log(1 - 1/e)
      Array([2.4587], dtype=float32)
    """
    chosen, rejected = length_averages(lp)
    return -chosen - weight * (_log_odds_parts(chosen)[0] + _log_odds_parts(rejected)[1])


def _log_odds_parts(log_prob: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``log p`` below one and ``log(1 - p)``, in the form that is exact on its side of one half."""
    x = clipped(log_prob, PROBABILITY_ONE)
    near_one = x > -0.7
    small, large = jnp.where(near_one, x, -0.7), jnp.where(near_one, -0.7, x)
    return x, jnp.where(near_one, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))


def rrhf(lp: PairLogProbs, nll_weight: NonNegative = 1.0) -> jax.Array:
    """Rank responses to align human feedback, two candidates: a hinge on length averages, plus the chosen one's NLL.

    Formulas:
      L = max(0, lbar_l - lbar_w) - nll_weight * l_w
      d_w = 1[lbar_l > lbar_w] / n_w + nll_weight
      d_l = 1[lbar_l > lbar_w] / n_l

    At equality the hinge is off. The likelihood term is the sum over the chosen tokens, as arXiv 2410.13828 writes it.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      nll_weight: lambda, the weight of the chosen response's negative log-likelihood.

    Returns:
      Loss per pair, ``[B]``.

    References:
      Yuan et al., arXiv 2304.05302.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -4.0, 0.0, 0.0, 2.0, 4.0)))
      >>> losses.rrhf(lp, nll_weight=0.0)  # 4 / 4 below 3 / 2: active by one half
      Array([0.5], dtype=float32)
    """
    chosen, rejected = length_averages(lp)
    return jax.nn.relu(rejected - chosen) - nll_weight * as_float32(lp).chosen


def slic_hf(lp: PairLogProbs, delta: Real = 1.0, nll_weight: NonNegative = 1.0) -> jax.Array:
    """Sequence likelihood calibration: a hinge on summed log-probabilities, plus the chosen response's NLL.

    Formulas:
      x = delta - l_w + l_l
      L = max(0, x) - nll_weight * l_w
      d_w = 1[x > 0] + nll_weight
      d_l = 1[x > 0]

    At the kink the hinge is off. The likelihood target is the chosen response, as arXiv 2410.13828 writes it; the original
    regularises towards the reference answer of supervised data.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      delta: margin in nats.
      nll_weight: lambda, the weight of the chosen response's negative log-likelihood.

    Returns:
      Loss per pair, ``[B]``.

    References:
      Zhao et al., arXiv 2305.10425.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -3.5, 0.0, 0.0, 2.0, 2.0)))
      >>> losses.slic_hf(lp, nll_weight=0.0)
      Array([0.5], dtype=float32)
    """
    lp = as_float32(lp)
    return jax.nn.relu(delta - lp.chosen + lp.rejected) - nll_weight * lp.chosen
