"""Objectives that hold each response against a point of reference of the batch, or of all batches so far."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from entangle.losses.hyperparameters import NonNegative, Positive
from entangle.losses.log_ratios import log_ratios
from entangle.losses.objective import on_whole_batch, running, whole_batch
from entangle.types import PairLogProbs


def kto_reference_point(lp: PairLogProbs) -> jax.Array:
    """The batch's estimate of KL(policy, reference): ``max(0, mean of all log-ratios)``, a constant for the gradient.

    The paper estimates it on mismatched prompt-response pairs; in a batch of pairs the responses at hand are used, as
    the paired form in arXiv 2410.13828 needs no further forward pass. ``kto_unpaired`` takes any estimate.

    Args:
      lp: pair log-probabilities of the whole (global) batch, fields ``[B]``.

    Returns:
      A scalar, in nats, non-negative.

    Raises:
      ValueError: inside ``jax.shard_map``, where a device has a part of the batch.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> losses.kto_reference_point(PairLogProbs(*(jnp.array([x]) for x in (-3.0, -3.5, -4.0, -4.0, 2.0, 2.0))))
      Array(0.75, dtype=float32)
    """
    return on_whole_batch(lp, _reference_point, "kto_reference_point", by_pair=False)


def _reference_point(lp: PairLogProbs) -> jax.Array:
    r_w, r_l = log_ratios(lp)
    return jax.lax.stop_gradient(jnp.maximum(0.0, (jnp.mean(r_w) + jnp.mean(r_l)) / 2.0))


@whole_batch
def kto(
    lp: PairLogProbs, beta: Positive = 0.1, desirable: NonNegative = 1.0, undesirable: NonNegative = 1.0
) -> jax.Array:
    """Kahneman-Tversky optimisation with the chosen response desirable, the rejected one undesirable.

    Formulas:
      z = max(0, mean(r_w + r_l) / 2)
      a = beta * (r_w - z)
      b = beta * (z - r_l)
      L = desirable * s(-a) + undesirable * s(-b)
      d_w = desirable * beta * s(a) * s(-a)
      d_l = undesirable * beta * s(b) * s(-b)
      d_w / d_l = desirable * s(a) * s(-a) / (undesirable * s(b) * s(-b))

    It looks at the whole batch through the reference point z, which carries no gradient.

    Args:
      lp: pair log-probabilities of the whole (global) batch, fields ``[B]``.
      beta: inverse temperature.
      desirable: lambda_w, the weight of the chosen side.
      undesirable: lambda_l, the weight of the rejected side.

    Returns:
      Loss per pair, ``[B]``.

    References:
      Ethayarajh et al., arXiv 2402.01306; paired as in arXiv 2410.13828.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> losses.kto(PairLogProbs(*(jnp.array([x]) for x in (-4.0, -4.0, -4.0, -4.0, 2.0, 2.0))))  # policy = reference
      Array([1.], dtype=float32)
    """
    r_w, r_l = log_ratios(lp)
    z = _reference_point(lp)
    return desirable * jax.nn.sigmoid(-beta * (r_w - z)) + undesirable * jax.nn.sigmoid(-beta * (z - r_l))


class RunningMean(NamedTuple):
    """The mean of all numbers seen.

    Attributes:
      mean: scalar.
      seen: how many there were, scalar.
    """

    mean: jax.Array
    seen: jax.Array


def _nothing_seen() -> RunningMean:
    return RunningMean(jnp.zeros(()), jnp.zeros(()))


def _mean_log_ratio(memory: RunningMean, lp: PairLogProbs) -> RunningMean:
    ratios = jnp.concatenate(log_ratios(lp))
    count = memory.seen.astype(ratios.dtype) + ratios.size
    mean = memory.mean.astype(ratios.dtype)
    return RunningMean(mean + (jnp.mean(ratios) - mean) * ratios.size / count, count)


@running(_nothing_seen, _mean_log_ratio)
def bco_pair_shifted(lp: PairLogProbs, memory: RunningMean, beta: Positive = 0.01) -> jax.Array:
    """Binary classifier optimisation on pairs as in the paper: rewards are shifted by their running mean.

    Formulas:
      shift = beta * mean(r_w + r_l) / 2
      a = beta * r_w - shift
      b = beta * r_l - shift
      L = -log s(a) - log s(-b)
      d_w = beta * s(-a)
      d_l = beta * s(b)
      d_w / d_l = s(-a) / s(b)

    The mean is over all responses of all batches so far, the present one included; the formula is that of the first
    batch. It carries no gradient. Without memory and shift it is ``bco_pair``.

    Args:
      lp: pair log-probabilities of the whole (global) batch, fields ``[B]``.
      memory: mean log-ratio of all responses so far; see ``RunningObjective``.
      beta: inverse temperature of the implicit reward.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Jung et al., arXiv 2404.04656.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-2.0, -2.0, -4.0, -4.0, 2.0, 2.0)))
      >>> losses.bco_pair_shifted(lp).round(4)  # both rewards are the mean: 2 log 2
      Array([1.3863], dtype=float32)
    """
    r_w, r_l = log_ratios(lp)
    shift = memory.mean.astype(r_w.dtype)
    return -jax.nn.log_sigmoid(beta * (r_w - shift)) - jax.nn.log_sigmoid(-beta * (r_l - shift))
