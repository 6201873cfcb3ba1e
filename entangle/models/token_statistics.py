"""What token-level objectives see of policy and reference, from the logits of both."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from entangle.models.norms import at_least_float32
from entangle.types import PairBatch, PairTokenLogProbs, Params


def token_statistics(
    logits_fn: Callable[[Params, jax.Array], jax.Array],
) -> Callable[[Params, Params, PairBatch], PairTokenLogProbs]:
    """Make the function from policy, reference and pairs to PairTokenLogProbs.

    Under ``jax.jit`` what the objective does not use is not computed. Memory follows the logits of both models.

    Args:
      logits_fn: params and tokens ``[..., T]`` to next-token logits ``[..., T, V]``, e.g. ``LanguageModel.logits``.

    Returns:
      A function of the policy's parameters, the reference's and a batch of leaves ``[B, R, T]`` to PairTokenLogProbs of
      fields ``[B, R, T]``, in at least float32; position 0, which nothing predicts, holds zeros.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from entangle import models
      >>> from entangle.types import PairBatch
      >>> unigram = lambda params, tokens: jnp.broadcast_to(params, (*tokens.shape, 4))
      >>> pairs = PairBatch(jnp.zeros((1, 2, 3), jnp.int32), jnp.array([[[False, True, True]] * 2]))
      >>> found = models.token_statistics(unigram)(jnp.zeros(4), jnp.array([0.0, 0.0, 0.0, -1e9]), pairs)
      >>> f"{found.log_sum_squares[0, 0, 1]:.4f}"  # log(4 / 16)
      '-1.3863'
      >>> f"{found.kl[0, 0, 1]:.4f}"  # log(4 / 3)
      '0.2877'
    """

    def statistics(params: Params, reference: Params, batch: PairBatch) -> PairTokenLogProbs:
        policy, ref = (_log_softmax(logits_fn(p, batch.tokens)[..., :-1, :]) for p in (params, reference))
        taken = [jnp.take_along_axis(x, batch.tokens[..., 1:, None], axis=-1)[..., 0] for x in (policy, ref)]
        # what the reference never says adds nothing, also where neither does (a padded vocabulary)
        said = ref > -jnp.inf
        kl = jnp.sum(
            jnp.where(said, jnp.exp(ref) * (jnp.where(said, ref, 0.0) - jnp.where(said, policy, 0.0)), 0.0), axis=-1
        )
        later = (*taken, jax.nn.logsumexp(2.0 * policy, axis=-1), kl)
        chosen, reference_, squares, divergence = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 0)]) for x in later)
        return PairTokenLogProbs(chosen, reference_, batch.completion_mask, squares, divergence)

    return statistics


def _log_softmax(logits: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(logits.astype(at_least_float32(logits.dtype)))
