"""Objectives of single responses that are each desirable or not: what KTO and BCO were made for.

A pair is one of each, and the paired forms (``kto``, ``bco_pair_shifted``) are what this project trains with; these take data
that has no pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from entangle.losses.hyperparameters import NonNegative, Positive
from entangle.losses.log_ratios import at_least_float32


class UnpairedLogProbs(NamedTuple):
    """Summed completion log-probabilities of N single responses, in nats.

    Attributes:
      policy: ``[N]`` log pi(y | x) under the policy.
      reference: ``[N]`` the same under the reference model.
      desirable: ``[N]`` bool.
    """

    policy: jax.Array
    reference: jax.Array
    desirable: jax.Array


def _log_ratio(examples: UnpairedLogProbs) -> jax.Array:
    if jnp.asarray(examples.desirable).dtype != bool:
        raise ValueError(f"desirable has to be bool, not {jnp.asarray(examples.desirable).dtype}")
    return at_least_float32(examples.policy) - at_least_float32(examples.reference)


def kto_unpaired(
    examples: UnpairedLogProbs,
    reference_point: float | jax.Array,
    beta: Positive = 0.1,
    desirable: NonNegative = 1.0,
    undesirable: NonNegative = 1.0,
) -> jax.Array:
    """Kahneman-Tversky optimisation of single responses, at a given reference point.

    Formulas:
      a = beta * (r - z) where the response is desirable, beta * (z - r) where not
      L = weight * s(-a)
      d = weight * beta * s(a) * s(-a), up where desirable, down where not

    Args:
      examples: log-probabilities, fields ``[N]``.
      reference_point: z, in nats; the paper's is ``max(0, mean log-ratio of mismatched prompts and responses)`` over the
        global batch. It carries no gradient.
      beta: inverse temperature.
      desirable: weight of desirable responses; the authors balance the two totals within 4 / 3.
      undesirable: weight of the others.

    Returns:
      Loss per response, ``[N]``.

    Raises:
      ValueError: ``desirable`` is not bool.

    References:
      Ethayarajh et al., arXiv 2402.01306.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> examples = losses.UnpairedLogProbs(jnp.array([-3.0, -4.0]), jnp.array([-3.0, -4.0]), jnp.array([True, False]))
      >>> losses.kto_unpaired(examples, reference_point=0.0)
      Array([0.5, 0.5], dtype=float32)
    """
    distance = _log_ratio(examples) - jax.lax.stop_gradient(reference_point)
    signed = beta * jnp.where(examples.desirable, distance, -distance)
    return jnp.where(examples.desirable, desirable, undesirable).astype(signed.dtype) * jax.nn.sigmoid(-signed)


def apo_zero_unpaired(examples: UnpairedLogProbs, beta: Positive = 0.1) -> jax.Array:
    """Anchored preference optimisation, zero, of single responses: KTO at a reference point of zero.

    Formulas:
      a = beta * r where the response is desirable, -beta * r where not
      L = s(-a)
      d = beta * s(a) * s(-a), up where desirable, down where not

    Args:
      examples: log-probabilities, fields ``[N]``.
      beta: inverse temperature.

    Returns:
      Loss per response, ``[N]``.

    References:
      D'Oosterlinck et al., arXiv 2408.06266.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> examples = losses.UnpairedLogProbs(jnp.array([-3.0]), jnp.array([-3.0]), jnp.array([True]))
      >>> losses.apo_zero_unpaired(examples)
      Array([0.5], dtype=float32)
    """
    return kto_unpaired(examples, 0.0, beta)


def bco_unpaired(
    examples: UnpairedLogProbs,
    shift: float | jax.Array,
    beta: Positive = 0.01,
    weights: float | jax.Array = 1.0,
) -> jax.Array:
    """Binary classifier optimisation of single responses, at a given reward shift.

    Formulas:
      a = beta * r - shift where the response is desirable, shift - beta * r where not
      L = -weight * log s(a)
      d = weight * beta * s(-a), up where desirable, down where not

    Args:
      examples: log-probabilities, fields ``[N]``.
      shift: delta, the running mean of the rewards ``beta r``; it carries no gradient.
      beta: inverse temperature.
      weights: one number or ``[N]``: the paper's match of two prompt distributions comes from a trained classifier, which
        is no part of the loss; see :func:`prompt_match_weights`.

    Returns:
      Loss per response, ``[N]``, in nats.

    References:
      Jung et al., arXiv 2404.04656.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> examples = losses.UnpairedLogProbs(jnp.array([-3.0, -4.0]), jnp.array([-3.0, -4.0]), jnp.array([True, False]))
      >>> losses.bco_unpaired(examples, shift=0.0)
      Array([0.6931472, 0.6931472], dtype=float32)
    """
    reward = beta * _log_ratio(examples) - jax.lax.stop_gradient(shift)
    logistic = -jax.nn.log_sigmoid(jnp.where(examples.desirable, reward, -reward))
    return jax.lax.stop_gradient(jnp.asarray(weights, logistic.dtype)) * logistic


def prompt_match_weights(probability: jax.Array, lowest: float = 0.5, highest: float = 10.0) -> jax.Array:
    """Importance weights ``clip(p / (1 - p), lowest, highest)`` of undesirable responses, from a classifier's p.

    Args:
      probability: ``[N]``, that the prompt comes with desirable responses.
      lowest: least weight.
      highest: greatest weight.

    Returns:
      ``[N]``.

    References:
      Jung et al., arXiv 2404.04656.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> losses.prompt_match_weights(jnp.array([0.1, 0.75, 1.0])).tolist()
      [0.5, 3.0, 10.0]
    """
    return jnp.clip(probability / jnp.maximum(1.0 - probability, 1e-6), lowest, highest)
