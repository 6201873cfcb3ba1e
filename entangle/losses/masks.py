"""Sparse token masks, the paper's second remedy: which tokens of a response a preference is about is learned with the policy.

A mask is ``sigmoid(hidden . weight + bias)`` at every token, from hidden states of the policy, which are constants for its
gradient. Tokens that both responses share should end near 0: what entangles the two gradients is then left out.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from entangle.losses.hyperparameters import NonNegative, Positive, Unit
from entangle.losses.log_ratios import at_least_float32
from entangle.losses.logistic import dpo
from entangle.losses.tokens import summed
from entangle.types import PairBatch, PairTokenLogProbs


class MaskParams(NamedTuple):
    """Parameters of a token mask.

    Attributes:
      weight: ``[D]``.
      bias: scalar.
    """

    weight: jax.Array
    bias: jax.Array


def init_mask(width: int, bias: float = 2.0) -> MaskParams:
    """A mask that is the same for all tokens at the start: ``sigmoid(bias)``, 0.88 by default.

    Args:
      width: D, of the hidden states.
      bias: where it begins; far below zero nothing would be learned.

    Example:
      >>> from entangle import losses
      >>> losses.init_mask(3).weight.tolist()
      [0.0, 0.0, 0.0]
    """
    return MaskParams(jnp.zeros(width, jnp.float32), jnp.asarray(bias, jnp.float32))


def token_masks(params: MaskParams, hidden: jax.Array) -> jax.Array:
    """Masks from hidden states.

    Args:
      params: of the mask.
      hidden: ``[..., T, D]``, at the tokens themselves; constants for the gradient.

    Returns:
      ``[..., T]`` in (0, 1), in at least float32.

    References:
      Yuan et al., arXiv 2410.13828, section 5.2; Christopoulou et al., arXiv 2410.05102 (SparsePO).

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> losses.token_masks(losses.init_mask(3, bias=0.0), jnp.ones((2, 5, 3))).shape
      (2, 5)
    """
    weight = at_least_float32(params.weight)
    fixed = jax.lax.stop_gradient(hidden).astype(weight.dtype)
    return jax.nn.sigmoid(jnp.einsum("...d,d->...", fixed, weight) + params.bias.astype(weight.dtype))


def oracle_masks(batch: PairBatch) -> jax.Array:
    """Masks that know the answer, for tests: 1 where the two responses differ, 0 where they share a token.

    Tokens are compared position by position; a pair's sides begin with the same prompt.

    Args:
      batch: B pairs.

    Returns:
      ``[B, 2, T]`` float32; 0 off the completions, and 1 where only one of them has a token.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairBatch
      >>> batch = PairBatch(jnp.array([[[9, 1, 5], [9, 2, 5]]]), jnp.array([[[False, True, True]] * 2]))
      >>> losses.oracle_masks(batch).tolist()
      [[[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]]
    """
    same = (batch.tokens[:, :1] == batch.tokens[:, 1:]) & batch.completion_mask[:, :1] & batch.completion_mask[:, 1:]
    return (batch.completion_mask & ~same).astype(jnp.float32)


def masked_dpo(
    tokens: PairTokenLogProbs,
    masks: jax.Array,
    beta: Positive = 0.1,
    sparsity: NonNegative = 1e-3,
    least_share: Unit = 0.1,
) -> jax.Array:
    """DPO on masked log-ratios, with an L1 term on the masks and a guard against the mask that is 0 everywhere.

    Formulas:
      r = sum_t mask_t * (log pi_t - log ref_t), for each response
      excess = max(0, sum_t mask_t - least_share * len), for each response
      L = -log s(beta * (r_w - r_l)) + sparsity * (excess_w + excess_l)
      d_t = beta * s(-beta * (r_w - r_l)) * mask_t

    Policy and reference start equal, where the first term does not depend on the masks: the L1 term alone would then
    take them all to 0, for good. It acts on what lies above ``least_share`` of a response's tokens. At 0 it is the paper's.

    Args:
      tokens: per-token log-probabilities, fields ``[B, 2, T]``.
      masks: ``[B, 2, T]`` in [0, 1]: ``token_masks`` (their parameters get gradients), ``oracle_masks``, or your own.
      beta: inverse temperature of the implicit reward.
      sparsity: lambda, weight of the L1 term, a token.
      least_share: share of a response's tokens below which the L1 term is off.

    Returns:
      Loss per pair, ``[B]``.

    References:
      Yuan et al., arXiv 2410.13828, section 5.2.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairTokenLogProbs
      >>> x, mask = -jnp.ones((1, 2, 3)), jnp.ones((1, 2, 3), bool)
      >>> tokens = PairTokenLogProbs(x, 0 * x, mask, x, x)
      >>> bool(losses.masked_dpo(tokens, jnp.ones((1, 2, 3)), sparsity=0.0) == losses.dpo(losses.summed(tokens)))
      True
    """
    masks = jnp.where(tokens.completion_mask, jnp.asarray(masks, at_least_float32(tokens.log_probs).dtype), 0.0)
    lengths = jnp.sum(tokens.completion_mask, axis=-1, dtype=masks.dtype)
    excess = jax.nn.relu(jnp.sum(jnp.abs(masks), axis=-1) - least_share * lengths)
    return dpo(summed(tokens, masks), beta) + sparsity * jnp.sum(excess, axis=1)
