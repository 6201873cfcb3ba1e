"""Objectives made of objectives, by ordinary composition of functions; the result has the type that its parts ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from entangle.losses.hyperparameters import FlipProbability, NonNegative, Positive
from entangle.losses.log_ratios import as_float32, exchanged, length_averages, per_token
from entangle.losses.logistic import dpo
from entangle.losses.objective import BatchObjective, Objective, RunningObjective, as_objective, whole_batch
from entangle.losses.pointwise import bco_pair
from entangle.types import PairLogProbs


def weighted_sum(*terms: tuple[float | jax.Array, Objective]) -> Objective:
    """The weighted sum of objectives, at their own hyperparameters.

    Args:
      *terms: weight and objective, as many as wanted.

    Returns:
      An objective without hyperparameters; a ``BatchObjective`` if one of the terms is.

    Raises:
      ValueError: a term has a memory, which a sum would lose; or there are no terms, or they are something else.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -3.0, -3.0, -3.0, 2.0, 2.0)))
      >>> losses.weighted_sum((1.0, losses.dpo), (0.5, losses.nll))(lp).round(4)  # log 2 + 1.5
      Array([2.1931], dtype=float32)
    """
    if not terms or not all(isinstance(term, tuple) and len(term) == 2 and callable(term[1]) for term in terms):
        raise ValueError("a weighted sum needs terms, pairs of weight and objective: (0.5, losses.dpo)")
    return _of_type_of(
        [objective for _, objective in terms], lambda lp: sum(w * o(lp) for w, o in terms), "weighted_sum"
    )


def label_smoothed(objective: Objective, label_smoothing: float | jax.Array) -> Objective:
    """An objective in expectation over labels that are wrong with a given probability; of ``dpo`` that is ``cdpo``.

    Defined by exchanging the pair. Some code smooths ``-log s(x)`` to ``-(1 - e) log s(x) - e log s(-x)`` instead, which is
    the same for an x that changes sign with the pair, and not for one with a target margin, such as SimPO's gamma.

    Args:
      objective: at its own hyperparameters.
      label_smoothing: probability that chosen and rejected are exchanged.

    Returns:
      An objective without hyperparameters; a ``BatchObjective`` if the given one is.

    Raises:
      ValueError: the objective has a memory, or the probability is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> bool(losses.label_smoothed(losses.dpo, 0.1)(lp)[0] == losses.cdpo(lp, label_smoothing=0.1)[0])
      True
    """
    _check_probability(label_smoothing, 1.0)

    def smoothed(lp: PairLogProbs) -> jax.Array:
        return (1.0 - label_smoothing) * objective(lp) + label_smoothing * objective(exchanged(lp))

    return _of_type_of([objective], smoothed, "label_smoothed")


def _check_probability(label_smoothing: float | jax.Array, below: float) -> None:
    if isinstance(label_smoothing, (int, float)) and not 0.0 <= label_smoothing < below:
        raise ValueError(f"label_smoothing {label_smoothing} is not in [0, {below:g})")


def _of_type_of(parts: list[Objective], function: Callable[[PairLogProbs], Any], name: str) -> Objective:
    function.__name__ = name
    parts = [as_objective(part) for part in parts]
    if any(isinstance(part, RunningObjective) for part in parts):
        raise ValueError("an objective with a memory cannot be a part of another: compose what given(memory) returns")
    if not any(isinstance(part, BatchObjective) for part in parts):
        return function
    return BatchObjective(function)


def nll(lp: PairLogProbs) -> jax.Array:
    """Negative log-likelihood of the chosen response, summed over its tokens: the term that others add.

    Formulas:
      L = -l_w
      d_w = 1
      d_l = 0

    Args:
      lp: pair log-probabilities, fields ``[B]``.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      The supervised loss; added in this form by arXiv 2405.16436 and arXiv 2410.13828.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> losses.nll(PairLogProbs(*(jnp.array([x]) for x in (-3.0, -3.0, 0.0, 0.0, 2.0, 2.0))))
      Array([3.], dtype=float32)
    """
    return -as_float32(lp).chosen


def nll_averaged(lp: PairLogProbs) -> jax.Array:
    """Negative log-likelihood of the chosen response, averaged over its own tokens.

    Formulas:
      L = -lbar_w
      d_w = 1 / n_w
      d_l = 0

    Args:
      lp: pair log-probabilities, fields ``[B]``.

    Returns:
      Loss per pair, ``[B]``, in nats a token.

    References:
      Pang et al., arXiv 2404.19733 (iterative RPO), on completions.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> losses.nll_averaged(PairLogProbs(*(jnp.array([x]) for x in (-3.0, -3.0, 0.0, 0.0, 2.0, 2.0))))
      Array([1.5], dtype=float32)
    """
    return -length_averages(lp)[0]


@whole_batch
def nll_token_mean(lp: PairLogProbs) -> jax.Array:
    """Negative log-likelihood of the chosen responses, averaged over all their tokens in the batch.

    Formulas:
      L = -l_w / max(mean(len_w), 1 / B)
      d_w = 1 / max(mean(len_w), 1 / B)
      d_l = 0

    The mean over pairs is the mean over tokens, which is what common libraries add. It looks at the whole batch, whose
    tokens it counts; a batch without any counts as one token.

    Args:
      lp: pair log-probabilities of the whole (global) batch, fields ``[B]``.

    Returns:
      Loss per pair, ``[B]``, in nats a token.

    References:
      The supervised loss as common libraries take it.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x, y]) for x, y in ((-3.0, -1.0), (0, 0), (0, 0), (0, 0), (1, 3), (1, 1))))
      >>> jnp.mean(losses.nll_token_mean(lp))  # 4 nats over 4 tokens
      Array(1., dtype=float32)
    """
    lp = as_float32(lp)
    return -lp.chosen / jnp.maximum(jnp.mean(lp.chosen_length), 1.0 / max(lp.chosen.size, 1))


def rpo(lp: PairLogProbs, beta: Positive = 0.1, eta: NonNegative = 0.005) -> jax.Array:
    """Regularised preference optimisation: DPO plus the chosen response's negative log-likelihood.

    Formulas:
      L = -log s(beta * h) - beta * eta * l_w
      d_w = beta * s(-beta * h) + beta * eta
      d_l = beta * s(-beta * h)

    The likelihood term weighs ``beta eta``, as in the authors' code; for another weight add ``nll`` by ``weighted_sum``.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature of the implicit reward.
      eta: weight of the likelihood term, relative to beta.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Liu et al., arXiv 2405.16436, and its authors' code.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -3.0, -3.0, -3.0, 2.0, 2.0)))
      >>> losses.rpo(lp, beta=0.5, eta=2.0)  # log 2 + 3
      Array([3.6931472], dtype=float32)
    """
    return dpo(lp, beta) + beta * eta * nll(lp)


def dpo_norm(lp: PairLogProbs, beta: Positive = 5.0) -> jax.Array:
    """DPO on averages over tokens (length-normalised DPO).

    Formulas:
      x = beta * (r_w / n_w - r_l / n_l)
      L = -log s(x)
      d_w = beta * s(-x) / n_w
      d_l = beta * s(-x) / n_l
      d_w / d_l = n_l / n_w

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature; about 5 with averages, where 0.1 is for sums.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Lambert et al., arXiv 2411.15124 (Tulu 3), equation 6.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 1.0, 1.0)))
      >>> bool(losses.dpo_norm(lp, beta=0.1)[0] == losses.dpo(lp, beta=0.1)[0])  # one token each
      True
    """
    return dpo(per_token(lp), beta)


def mpo(
    lp: PairLogProbs,
    beta: Positive = 0.1,
    preference_weight: NonNegative = 0.8,
    quality_weight: NonNegative = 0.2,
    generation_weight: NonNegative = 1.0,
) -> jax.Array:
    """Mixed preference optimisation: DPO, ``bco_pair`` and the chosen response's NLL a token.

    Formulas:
      p = preference_weight
      q = quality_weight
      g = generation_weight / n_w
      L = -p * log s(beta * h) - q * (log s(beta * r_w) + log s(-beta * r_l)) - g * l_w
      d_w = beta * (p * s(-beta * h) + q * s(-beta * r_w)) + g
      d_l = beta * (p * s(-beta * h) + q * s(beta * r_l))

    Common code averages the NLL over all tokens of the batch: ``mpo_token_mean``. BCO's reward shift is left out, as there.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature of the implicit reward.
      preference_weight: of DPO.
      quality_weight: of ``bco_pair``, which tells good responses from bad ones.
      generation_weight: of the NLL.

    Returns:
      Loss per pair, ``[B]``.

    References:
      Wang et al., arXiv 2411.10442.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-4.0, -4.0, -4.0, -4.0, 2.0, 2.0)))
      >>> losses.mpo(lp).round(4)  # (0.8 + 2 * 0.2) log 2 + 4 / 2
      Array([2.8318], dtype=float32)
    """
    mixed = preference_weight * dpo(lp, beta) + quality_weight * bco_pair(lp, beta)
    return mixed + generation_weight * nll_averaged(lp)


@whole_batch
def mpo_token_mean(
    lp: PairLogProbs,
    beta: Positive = 0.1,
    preference_weight: NonNegative = 0.8,
    quality_weight: NonNegative = 0.2,
    generation_weight: NonNegative = 1.0,
) -> jax.Array:
    """Mixed preference optimisation as common code has it: the NLL is averaged over all chosen tokens of the batch.

    Formulas:
      p = preference_weight
      q = quality_weight
      g = generation_weight / max(mean(len_w), 1 / B)
      L = -p * log s(beta * h) - q * (log s(beta * r_w) + log s(-beta * r_l)) - g * l_w
      d_w = beta * (p * s(-beta * h) + q * s(-beta * r_w)) + g
      d_l = beta * (p * s(-beta * h) + q * s(beta * r_l))

    It looks at the whole batch, whose tokens the NLL counts. The paper averages each response by itself: ``mpo``.

    Args:
      lp: pair log-probabilities of the whole (global) batch, fields ``[B]``.
      beta: inverse temperature of the implicit reward.
      preference_weight: of DPO.
      quality_weight: of ``bco_pair``, which tells good responses from bad ones.
      generation_weight: of the NLL.

    Returns:
      Loss per pair, ``[B]``.

    References:
      Wang et al., arXiv 2411.10442; BCO's reward shift is left out, as in common code.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-4.0, -4.0, -4.0, -4.0, 2.0, 2.0)))
      >>> losses.mpo_token_mean(lp).round(4)  # (0.8 + 2 * 0.2) log 2 + 4 / 2
      Array([2.8318], dtype=float32)
    """
    mixed = preference_weight * dpo(lp, beta) + quality_weight * bco_pair(lp, beta)
    return mixed + generation_weight * nll_token_mean(lp)


def robust(objective: Objective, label_smoothing: FlipProbability) -> Objective:
    """An unbiased estimate of an objective on true labels from labels that are wrong now and then; of ``dpo``: ``robust_dpo``.

    Args:
      objective: at its own hyperparameters.
      label_smoothing: probability that chosen and rejected are exchanged, below one half.

    Returns:
      An objective without hyperparameters; a ``BatchObjective`` if the given one is.

    Raises:
      ValueError: the objective has a memory, or the probability is out of range.

    References:
      Chowdhury et al., arXiv 2403.00409.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> abs(losses.robust(losses.dpo, 0.1)(lp) - losses.robust_dpo(lp, label_smoothing=0.1)).max() < 1e-6
      Array(True, dtype=bool)
    """
    _check_probability(label_smoothing, 0.5)
    scale = 1.0 / (1.0 - 2.0 * label_smoothing)
    flipped = lambda lp: objective(exchanged(lp))  # noqa: E731
    terms = ((1.0 - label_smoothing) * scale, objective), (-label_smoothing * scale, flipped)
    return _of_type_of([objective], lambda lp: sum(w * o(lp) for w, o in terms), "robust")
