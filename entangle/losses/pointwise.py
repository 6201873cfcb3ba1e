"""Objectives that pull each response by itself, so that the two coefficients are no multiples of one another."""

from __future__ import annotations

import jax

from entangle.losses.hyperparameters import Positive
from entangle.losses.log_ratios import log_ratios
from entangle.types import PairLogProbs


def nca_pair(lp: PairLogProbs, beta: Positive = 0.01) -> jax.Array:
    """Noise contrastive alignment on pairs: raises the chosen response up to a reward of ``ln 2`` only.

    Formulas:
      a = beta * r_w
      b = beta * r_l
      L = -log s(a) - log s(-a) / 2 - log s(-b) / 2
      d_w = beta * (1 - 3 * s(a) / 2)
      d_l = beta * s(b) / 2
      d_w / d_l = (2 - 3 * s(a)) / s(b)
      d_w < 0 where s(a) > 2 / 3

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature of the implicit reward.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Chen et al., arXiv 2402.05369.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -3.0, -5.0, 2.0, 2.0)))
      >>> losses.nca_pair(lp).round(4)  # 2 log 2
      Array([1.3863], dtype=float32)
    """
    r_w, r_l = log_ratios(lp)
    a, b = beta * r_w, beta * r_l
    return -jax.nn.log_sigmoid(a) - 0.5 * jax.nn.log_sigmoid(-a) - 0.5 * jax.nn.log_sigmoid(-b)


def bco_pair(lp: PairLogProbs, beta: Positive = 0.01) -> jax.Array:
    """Binary classifier optimisation on pairs as common code has it today: without the reward shift.

    Formulas:
      a = beta * r_w
      b = beta * r_l
      L = -log s(a) - log s(-b)
      d_w = beta * s(-a)
      d_l = beta * s(b)
      d_w / d_l = s(-a) / s(b)

    The paper shifts both rewards by their running mean: ``bco_pair_shifted``.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature of the implicit reward.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Jung et al., arXiv 2404.04656, with a shift of zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -3.0, -5.0, 2.0, 2.0)))
      >>> losses.bco_pair(lp).round(4)  # 2 log 2
      Array([1.3863], dtype=float32)
    """
    r_w, r_l = log_ratios(lp)
    return -jax.nn.log_sigmoid(beta * r_w) - jax.nn.log_sigmoid(-beta * r_l)


def apo_zero(lp: PairLogProbs, beta: Positive = 0.1) -> jax.Array:
    """Anchored preference optimisation, zero: raises the chosen and lowers the rejected response, each by itself.

    Formulas:
      a = beta * r_w
      b = beta * r_l
      L = s(-a) + s(b)
      d_w = beta * s(a) * s(-a)
      d_l = beta * s(b) * s(-b)
      d_w / d_l = s(a) * s(-a) / (s(b) * s(-b))

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature of the implicit reward.

    Returns:
      Loss per pair, ``[B]``, between 0 and 2.

    References:
      D'Oosterlinck et al., arXiv 2408.06266, equation 7.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -3.0, -5.0, 2.0, 2.0)))
      >>> losses.apo_zero(lp)
      Array([1.], dtype=float32)
    """
    r_w, r_l = log_ratios(lp)
    return jax.nn.sigmoid(-beta * r_w) + jax.nn.sigmoid(beta * r_l)


def apo_down(lp: PairLogProbs, beta: Positive = 0.1) -> jax.Array:
    """Anchored preference optimisation, down: lowers both responses, the rejected one more.

    Formulas:
      a = beta * r_w
      z = beta * h
      L = s(a) + s(-z)
      d_w = beta * (s(z) * s(-z) - s(a) * s(-a))
      d_l = beta * s(z) * s(-z)
      d_w / d_l = 1 - s(a) * s(-a) / (s(z) * s(-z))
      d_w < 0 where abs(a) < abs(z)

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature of the implicit reward.

    Returns:
      Loss per pair, ``[B]``, between 0 and 2.

    References:
      D'Oosterlinck et al., arXiv 2408.06266, equation 8.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -3.0, -5.0, 2.0, 2.0)))
      >>> losses.apo_down(lp)
      Array([1.], dtype=float32)
    """
    r_w, r_l = log_ratios(lp)
    return jax.nn.sigmoid(beta * r_w) + jax.nn.sigmoid(-beta * (r_w - r_l))


def sppo(lp: PairLogProbs, beta: Positive = 0.001) -> jax.Array:
    """Self-play preference optimisation, hard labels: each log-ratio aims at plus or minus ``1 / (2 beta)`` nats.

    Formulas:
      L = (r_w - 1 / (2 * beta)) ** 2 + (r_l + 1 / (2 * beta)) ** 2
      d_w = 2 * (1 / (2 * beta) - r_w)
      d_l = 2 * (r_l + 1 / (2 * beta))
      d_w / d_l = (1 / (2 * beta) - r_w) / (r_l + 1 / (2 * beta))
      d_w < 0 where r_w > 1 / (2 * beta)
      d_l < 0 where r_l < -1 / (2 * beta)

    The code of arXiv 2410.13828 halves this loss; here it stands as in the paper.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: 1 / eta in the paper.

    Returns:
      Loss per pair, ``[B]``.

    References:
      Wu et al., arXiv 2405.00675, equation 4.7 with probabilities 1 and 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> losses.sppo(lp, beta=0.5)  # both targets are met
      Array([0.], dtype=float32)
    """
    r_w, r_l = log_ratios(lp)
    target = 1.0 / (2.0 * beta)
    return (r_w - target) ** 2 + (r_l + target) ** 2


def cal_dpo(lp: PairLogProbs, beta: Positive = 0.001) -> jax.Array:
    """Calibrated DPO as the paper writes it: DPO at beta 1, and both log-ratios aim at ``1 / (2 beta)`` and its negative.

    Formulas:
      L = -log s(h) + (r_w - 1 / (2 * beta)) ** 2 + (r_l + 1 / (2 * beta)) ** 2
      d_w = s(-h) + 2 * (1 / (2 * beta) - r_w)
      d_l = s(-h) + 2 * (r_l + 1 / (2 * beta))
      d_w < 0 at times
      d_l < 0 at times

    The authors' code weighs the squares by one half: ``cal_dpo_halved``.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: of the targets; there is none inside the sigmoid.

    Returns:
      Loss per pair, ``[B]``.

    References:
      Xiao et al., Cal-DPO, NeurIPS 2024, arXiv 2412.14516, equation 10.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> bool(losses.cal_dpo(lp, beta=0.5)[0] == losses.dpo(lp, beta=1.0)[0])  # both targets are met
      True
    """
    return _logistic(lp) + sppo(lp, beta)


def cal_dpo_halved(lp: PairLogProbs, beta: Positive = 0.001) -> jax.Array:
    """Calibrated DPO as its authors' code has it: the squares weigh one half.

    Formulas:
      L = -log s(h) + ((r_w - 1 / (2 * beta)) ** 2 + (r_l + 1 / (2 * beta)) ** 2) / 2
      d_w = s(-h) + 1 / (2 * beta) - r_w
      d_l = s(-h) + r_l + 1 / (2 * beta)
      d_w < 0 at times
      d_l < 0 at times

    The code adds the batch's mean square to every pair, which is the same in the mean over pairs. The paper: ``cal_dpo``.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: of the targets; there is none inside the sigmoid.

    Returns:
      Loss per pair, ``[B]``.

    References:
      Xiao et al., Cal-DPO, NeurIPS 2024, arXiv 2412.14516, the authors' code.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> losses.cal_dpo_halved(lp, beta=0.25).round(4)  # both are 1 nat short of theirs: 1 + DPO's
      Array([1.1269], dtype=float32)
    """
    return _logistic(lp) + 0.5 * sppo(lp, beta)


def _logistic(lp: PairLogProbs) -> jax.Array:
    r_w, r_l = log_ratios(lp)
    return -jax.nn.log_sigmoid(r_w - r_l)
