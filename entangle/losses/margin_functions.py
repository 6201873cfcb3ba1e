"""Other functions of the margin of log-ratios than the logistic one. All are per pair."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from entangle.losses.hyperparameters import NonNegative, Positive, StrictFlipProbability
from entangle.losses.log_ratios import clipped, log_ratios, per_token
from entangle.types import PairLogProbs


def hinge(lp: PairLogProbs, beta: Positive = 0.1) -> jax.Array:
    """Hinge loss of the margin of implicit rewards: RSO's loss, or SLiC normalised by the reference.

    Formulas:
      L = max(0, 1 - beta * h)
      d_w = beta * 1[beta * h < 1]
      d_l = beta * 1[beta * h < 1]
      d_w / d_l = 1

    At the kink the hinge is off.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature of the implicit reward (gamma in the paper).

    Returns:
      Loss per pair, ``[B]``.

    References:
      Liu et al., arXiv 2309.06657.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> losses.hinge(lp, beta=0.25)
      Array([0.5], dtype=float32)
    """
    r_w, r_l = log_ratios(lp)
    return jax.nn.relu(1.0 - beta * (r_w - r_l))


def ipo(lp: PairLogProbs, beta: Positive = 0.1) -> jax.Array:
    """Identity preference optimisation on sums: the margin of log-ratios aims at ``1 / (2 beta)`` nats.

    Formulas:
      c = h - 1 / (2 * beta)
      L = c ** 2
      d_w = -2 * c
      d_l = -2 * c
      d_w / d_l = 1
      d_w < 0 where c > 0
      d_l < 0 where c > 0

    This is the paper's equation read literally, on summed log-probabilities; most libraries average over tokens first:
    ``ipo_averaged``.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: regularisation, tau in the paper.

    Returns:
      Loss per pair, ``[B]``.

    References:
      Azar et al., arXiv 2310.12036, equation 17.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> losses.ipo(lp, beta=0.25)  # margin 2 is the target 1 / (2 * 0.25)
      Array([0.], dtype=float32)
    """
    r_w, r_l = log_ratios(lp)
    return (r_w - r_l - 1.0 / (2.0 * beta)) ** 2


def ipo_averaged(lp: PairLogProbs, beta: Positive = 0.1) -> jax.Array:
    """Identity preference optimisation on averages over tokens, as most libraries have it.

    Formulas:
      c = r_w / n_w - r_l / n_l - 1 / (2 * beta)
      L = c ** 2
      d_w = -2 * c / n_w
      d_l = -2 * c / n_l
      d_w / d_l = n_l / n_w
      d_w < 0 where c > 0
      d_l < 0 where c > 0

    The averaging is the authors' word to a library's maintainers; the paper's text has sums: ``ipo``.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: regularisation, tau in the paper; the margin aims at ``1 / (2 beta)`` nats a token.

    Returns:
      Loss per pair, ``[B]``.

    References:
      Azar et al., arXiv 2310.12036, equation 17, on averages.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-2.0, -8.0, -4.0, -4.0, 2.0, 4.0)))
      >>> losses.ipo_averaged(lp, beta=0.25)  # averages 1 and -1: margin 2 is the target
      Array([0.], dtype=float32)
    """
    return ipo(per_token(lp), beta)


def exo_pair(lp: PairLogProbs, beta: Positive = 0.1, label_smoothing: StrictFlipProbability = 1e-3) -> jax.Array:
    """Efficient exact optimisation on pairs: reverse KL from the policy's preference to the smoothed label.

    Formulas:
      z = beta * h
      L = s(z) * (log s(z) - log(1 - label_smoothing)) + s(-z) * (log s(-z) - log(label_smoothing))
      d_w = beta * s(z) * s(-z) * (log((1 - label_smoothing) / label_smoothing) - z)
      d_l = d_w
      d_w / d_l = 1
      d_w < 0 where z > log((1 - label_smoothing) / label_smoothing)
      d_l < 0 where z > log((1 - label_smoothing) / label_smoothing)

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature of the implicit reward.
      label_smoothing: the label's probability of the rejected response; above 0, where the loss would be infinite.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Ji et al., arXiv 2402.00856, equation 16.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -3.0, -5.0, 2.0, 2.0)))
      >>> f"{losses.exo_pair(lp, label_smoothing=0.25)[0]:.4f}"  # log(2 / sqrt(3))
      '0.1438'
    """
    r_w, r_l = log_ratios(lp)
    z = beta * (r_w - r_l)
    smoothing = jnp.asarray(label_smoothing, z.dtype)
    chosen = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - jnp.log1p(-smoothing))
    return chosen + jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - jnp.log(smoothing))


def discopop(lp: PairLogProbs, beta: Positive = 0.05, temperature: Positive = 0.05) -> jax.Array:
    """DiscoPOP, the log-ratio modulated loss: a blend of the logistic and the exponential loss that was found by search.

    Formulas:
      z = beta * h
      m = s(z / temperature)
      q = min(log s(z / temperature) - z, 80)
      b = exp(q) * 1[q < 80]
      L = -(1 - m) * log s(z) + exp(q)
      d_w = beta * ((1 - m) * s(-z) + b - (1 - m) * (b + m * log s(z)) / temperature)
      d_l = d_w
      d_w / d_l = 1
      d_w < 0 at times
      d_l < 0 at times

    The exponential part is ``exp(q) = m exp(-z)``, q held at 80, where float32 ends. The loss is not monotone: for margins a
    little below zero it pulls the margin down.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature of the implicit reward.
      temperature: tau, of the modulation.

    Returns:
      Loss per pair, ``[B]``.

    References:
      Lu et al., arXiv 2406.08414, equation 5.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -3.0, -5.0, 2.0, 2.0)))
      >>> losses.discopop(lp).round(4)  # half of log 2 and half of 1
      Array([0.8466], dtype=float32)
    """
    r_w, r_l = log_ratios(lp)
    z = beta * (r_w - r_l)
    x = z / temperature
    return -jax.nn.sigmoid(-x) * jax.nn.log_sigmoid(z) + jnp.exp(clipped(jax.nn.log_sigmoid(x) - z, 80.0))


def lpo(
    lp: PairLogProbs,
    beta: Positive = 0.2,
    chosen_weight: NonNegative = 1.0,
    rejected_weight: Positive = 0.8,
    penalty: NonNegative = 5.0,
) -> jax.Array:
    """Linear preference optimisation: absolute distances from the target margin, each side moving by itself.

    Formulas:
      c = h - 1 / (2 * beta)
      scale = 4 * beta / (chosen_weight + rejected_weight)
      L = scale * (chosen_weight * abs(c) + rejected_weight * abs(c)) + penalty * max(0, -r_w)
      d_w = -scale * chosen_weight * sign(c) + penalty * 1[r_w < 0]
      d_l = -scale * rejected_weight * sign(c)
      d_w < 0 at times
      d_l < 0 where c > 0

    One of the two distances is a constant for the chosen response's gradient, the other for the rejected one's. On the
    target both coefficients are zero, and at ``r_w = 0`` there is no penalty.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: the margin aims at ``1 / (2 beta)`` nats.
      chosen_weight: r_1, of the distance that moves the chosen response.
      rejected_weight: r_2, of the distance that moves the rejected one.
      penalty: gamma, weight of a chosen log-probability below the reference's.

    Returns:
      Loss per pair, ``[B]``.

    References:
      Wang et al., arXiv 2508.14947.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> losses.lpo(lp, beta=0.25)  # on the target
      Array([0.], dtype=float32)
    """
    r_w, r_l = log_ratios(lp)
    fixed_w, fixed_l = jax.lax.stop_gradient((r_w, r_l))
    target = 1.0 / (2.0 * beta)
    distances = chosen_weight * _distance(r_w - fixed_l - target) + rejected_weight * _distance(fixed_w - r_l - target)
    return 4.0 * beta / (chosen_weight + rejected_weight) * distances + penalty * jax.nn.relu(-r_w)


def _distance(x: jax.Array) -> jax.Array:
    """``|x|`` whose derivative at 0 is 0, where that of ``jnp.abs`` is 1."""
    return x * jnp.sign(jax.lax.stop_gradient(x))
