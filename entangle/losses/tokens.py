"""Objectives that look into the responses: they weigh tokens, or see the distributions that the tokens were drawn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from entangle.losses.hyperparameters import NonNegative, Positive, Unit
from entangle.losses.log_ratios import at_least_float32
from entangle.losses.logistic import dpo
from entangle.losses.objective import name_of
from entangle.types import PairLogProbs, PairTokenLogProbs

TokenObjective = Callable[..., jax.Array]
"""A pure function ``(PairTokenLogProbs, **hyperparameters) -> [B]`` losses, each of its pair alone."""


def row_loss_and_coefficients(
    objective: Callable[..., jax.Array], rows: Any, **hyperparameters: Any
) -> tuple[jax.Array, Any]:
    """Evaluate an objective of whatever is known of each row, and its coefficients, in one pass.

    The gradient of a pair's loss is that of ``-sum(c * rows)`` over the chosen side plus ``sum(c * rows)`` over the rejected
    one, the coefficients c held constant; for log-probabilities that sums up to ``-(d_w g_w - d_l g_l)``.

    Args:
      objective: any function of rows to per-pair losses, a user's own included: those of this module take
        PairTokenLogProbs.
      rows: a pytree of arrays ``[B, 2, ...]``.
      **hyperparameters: passed on to the objective.

    Returns:
      Losses ``[B]``, and coefficients like the rows: ``-dL / drows`` on the chosen side, ``+dL / drows`` on the rejected
      one; zeros of its own type for an array that is not floating.

    Raises:
      ValueError: the objective did not return one value per pair.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairTokenLogProbs
      >>> zeros, mask = jnp.zeros((1, 2, 3)), jnp.array([[[False, True, True], [False, True, False]]])
      >>> tokens = PairTokenLogProbs(zeros, zeros, mask, zeros, zeros)
      >>> loss, c = losses.row_loss_and_coefficients(losses.ld_dpo, tokens, beta=1.0, alpha=0.5)
      >>> c.log_probs[0, 0, 1:].tolist()  # the chosen one's tail counts half
      [0.5, 0.25]
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(at_least_float32, rows))
    moving = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def total(floating: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        given = iter(floating)
        every = [next(given) if moves else leaf for leaf, moves in zip(leaves, moving, strict=True)]
        values = objective(jax.tree.unflatten(structure, every), **hyperparameters)
        if jnp.shape(values) != leaves[0].shape[:1]:
            raise ValueError(
                f"{name_of(objective)} returned shape {jnp.shape(values)}: one loss a pair is needed, {leaves[0].shape[:1]}"
            )
        return jnp.sum(values), values

    slopes, values = jax.grad(total, has_aux=True)([x for x, moves in zip(leaves, moving, strict=True) if moves])
    found = iter(slopes)
    signed = [_signed(next(found)) if moves else jnp.zeros_like(x) for x, moves in zip(leaves, moving, strict=True)]
    return values, jax.tree.unflatten(structure, signed)


def _signed(slope: jax.Array) -> jax.Array:
    return slope * jnp.array([-1, 1], slope.dtype).reshape(1, 2, *(1,) * (slope.ndim - 2))


def _as_float32(tokens: PairTokenLogProbs) -> PairTokenLogProbs:
    dtype = at_least_float32(tokens.log_probs).dtype
    wide = PairTokenLogProbs(*(jnp.asarray(field).astype(dtype) for field in tokens))
    return wide._replace(completion_mask=jnp.asarray(tokens.completion_mask, bool))


def summed(tokens: PairTokenLogProbs, weights: float | jax.Array = 1.0) -> PairLogProbs:
    """Sum over completions what every token adds, weighed: the way from tokens to any objective of pairs.

    Args:
      tokens: fields ``[B, 2, T]``.
      weights: ``[B, 2, T]``, of policy and reference alike; by default every token counts once.

    Returns:
      Fields ``[B]``; lengths are the numbers of completion tokens, whatever their weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairTokenLogProbs
      >>> x, mask = -jnp.ones((1, 2, 3)), jnp.array([[[False, True, True], [False, True, False]]])
      >>> losses.summed(PairTokenLogProbs(x, x, mask, x, x)).chosen.tolist()
      [-2.0]
    """
    tokens = _as_float32(tokens)
    weights = jnp.asarray(weights, tokens.log_probs.dtype)
    inside = [jnp.where(tokens.completion_mask, x, 0.0) for x in (tokens.log_probs, tokens.ref_log_probs)]
    policy, reference = (_over_completion(x * weights, tokens) for x in inside)
    lengths = jnp.sum(tokens.completion_mask, axis=-1, dtype=jnp.int32)
    return PairLogProbs(*(x[:, side] for x in (policy, reference, lengths) for side in (0, 1)))


def _over_completion(values: jax.Array, tokens: PairTokenLogProbs) -> jax.Array:
    return jnp.sum(jnp.where(tokens.completion_mask, values, 0.0), axis=-1)


def ld_dpo(tokens: PairTokenLogProbs, beta: Positive = 0.1, alpha: Unit = 0.5) -> jax.Array:
    """Length-desensitised DPO: tokens beyond the shorter response's length count less.

    Formulas:
      m = min(len_w, len_l)
      weight_t = 1 up to the completion's m-th token, alpha beyond
      r = sum_t weight_t * (log pi_t - log ref_t), for each response
      L = -log s(beta * (r_w - r_l))
      d_t = beta * s(-beta * (r_w - r_l)) * weight_t

    Policy and reference are weighed alike; some code weighs the policy alone.

    Args:
      tokens: per-token log-probabilities, fields ``[B, 2, T]``.
      beta: inverse temperature of the implicit reward.
      alpha: weight of the longer response's tail; 1 is DPO.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Liu et al., arXiv 2409.06411.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairTokenLogProbs
      >>> x, mask = -jnp.ones((1, 2, 3)), jnp.array([[[False, True, True], [False, True, False]]])
      >>> tokens = PairTokenLogProbs(x, 0 * x, mask, x, x)
      >>> losses.summed(tokens, losses.ld_weights(tokens.completion_mask, 0.5)).chosen.tolist()
      [-1.5]
    """
    return dpo(summed(tokens, ld_weights(tokens.completion_mask, alpha)), beta)


def ld_weights(completion_mask: jax.Array, alpha: float | jax.Array) -> jax.Array:
    """LD-DPO's token weights: 1 up to the shorter response's length, alpha beyond it; ``[B, 2, T]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> losses.ld_weights(jnp.array([[[False, True, True], [False, True, False]]]), 0.5).tolist()
      [[[1.0, 1.0, 0.5], [1.0, 1.0, 1.0]]]
    """
    position = jnp.cumsum(completion_mask, axis=-1)
    shorter = jnp.min(position[..., -1:], axis=1, keepdims=True)
    return jnp.where(position <= shorter, 1.0, alpha)


def wpo_weights(tokens: PairTokenLogProbs) -> jax.Array:
    """How likely the policy itself would write a pair: the product of both responses' weights, a constant for the gradient.

    A response's weight is ``exp(mean_t (log pi_t - log sum_v pi_t(v)^2))``: 1 where all tokens are as likely as the policy's
    own samples are on average.

    Args:
      tokens: per-token log-probabilities and ``log_sum_squares``, fields ``[B, 2, T]``.

    Returns:
      ``[B]``, positive, not clipped; an empty completion has weight 1.

    References:
      Zhou et al., arXiv 2406.11827.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairTokenLogProbs
      >>> uniform, mask = jnp.log(jnp.full((1, 2, 3), 0.25)), jnp.ones((1, 2, 3), bool)
      >>> losses.wpo_weights(PairTokenLogProbs(uniform, uniform, mask, uniform, uniform)).tolist()
      [1.0]
    """
    tokens = _as_float32(tokens)
    lengths = jnp.maximum(jnp.sum(tokens.completion_mask, axis=-1, dtype=tokens.log_probs.dtype), 1.0)
    aligned = _over_completion(tokens.log_probs - tokens.log_sum_squares, tokens) / lengths
    return jax.lax.stop_gradient(jnp.exp(jnp.sum(aligned, axis=1)))


def wpo(tokens: PairTokenLogProbs, beta: Positive = 0.01) -> jax.Array:
    """Weighted preference optimisation: DPO, each pair weighed by how likely the policy itself would write it.

    Formulas:
      a = mean_t(log pi_t - log sum_v pi_t(v)^2), for each response
      w = min(exp(a_w + a_l), 1), without gradient
      L = -w * log s(beta * h)
      d_t = w * beta * s(-beta * h)

    The weight is clipped at 1 as in the authors' code. Other code does not clip, or weighs another loss:
    ``wpo_weights(tokens) * losses.hinge(losses.summed(tokens))``.

    Args:
      tokens: per-token log-probabilities and ``log_sum_squares``, fields ``[B, 2, T]``.
      beta: inverse temperature of the implicit reward.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Zhou et al., arXiv 2406.11827.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairTokenLogProbs
      >>> uniform, mask = jnp.log(jnp.full((1, 2, 3), 0.25)), jnp.ones((1, 2, 3), bool)
      >>> losses.wpo(PairTokenLogProbs(uniform, uniform, mask, uniform, uniform))  # weight 1: log 2
      Array([0.6931472], dtype=float32)
    """
    return jnp.minimum(wpo_weights(tokens), 1.0) * dpo(summed(tokens), beta)


def tdpo1(tokens: PairTokenLogProbs, beta: Positive = 0.1) -> jax.Array:
    """Token-level DPO, first form: the margin takes in both responses' sequential KL to the reference.

    Formulas:
      K = sum_t KL(ref_t, pi_t), for each response
      x = beta * (h + K_w - K_l)
      L = -log s(x)
      d_t = beta * s(-x), at log pi_t and at KL_t

    The loss pulls at the whole distributions through the KL: the two coefficients of the log-probabilities do not tell its
    whole gradient.

    Args:
      tokens: per-token log-probabilities and ``kl``, fields ``[B, 2, T]``.
      beta: inverse temperature of the implicit reward.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Zeng et al., arXiv 2404.11999.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairTokenLogProbs
      >>> zeros, mask = jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3), bool)
      >>> losses.tdpo1(PairTokenLogProbs(zeros, zeros, mask, zeros, zeros))  # policy = reference: log 2
      Array([0.6931472], dtype=float32)
    """
    k_w, k_l = _sequential_kl(tokens)
    return _dpo_with(tokens, beta, k_w - k_l)


def tdpo2(tokens: PairTokenLogProbs, beta: Positive = 0.1, alpha: NonNegative = 0.5) -> jax.Array:
    """Token-level DPO, second form, the authors' default: the chosen response's KL is a constant, both weigh alpha.

    Formulas:
      K = sum_t KL(ref_t, pi_t), for each response
      x = beta * (h + alpha * (K_w - K_l)), K_w without gradient
      L = -log s(x)
      d_t = beta * s(-x) at log pi_t, alpha * beta * s(-x) at the rejected response's KL_t

    The loss pulls at the whole distributions through the rejected response's KL.

    Args:
      tokens: per-token log-probabilities and ``kl``, fields ``[B, 2, T]``.
      beta: inverse temperature of the implicit reward.
      alpha: weight of the KL.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Zeng et al., arXiv 2404.11999.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairTokenLogProbs
      >>> zeros, mask = jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3), bool)
      >>> losses.tdpo2(PairTokenLogProbs(zeros, zeros, mask, zeros, zeros))  # policy = reference: log 2
      Array([0.6931472], dtype=float32)
    """
    k_w, k_l = _sequential_kl(tokens)
    return _dpo_with(tokens, beta, alpha * (jax.lax.stop_gradient(k_w) - k_l))


def _sequential_kl(tokens: PairTokenLogProbs) -> tuple[jax.Array, jax.Array]:
    tokens = _as_float32(tokens)
    both = _over_completion(tokens.kl, tokens)
    return both[:, 0], both[:, 1]


def _dpo_with(tokens: PairTokenLogProbs, beta: float, addition: jax.Array) -> jax.Array:
    lp = summed(tokens)
    return dpo(lp._replace(chosen=lp.chosen + addition), beta)
