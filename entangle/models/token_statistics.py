"""What token-level objectives see of policy and reference, from the logits of both, whole or slice by slice."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from entangle.models import head
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
        chosen, reference_, squares, divergence = map(head.after_zero, later)
        return PairTokenLogProbs(chosen, reference_, batch.completion_mask, squares, divergence)

    return statistics


def sliced_token_statistics(
    head_inputs: Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]], *, chunk: int, shards: int = 1
) -> Callable[[Params, Params, PairBatch], PairTokenLogProbs]:
    """Make the same function without the logits: both heads go through the vocabulary slice by slice, side by side.

    Args:
      head_inputs: params and tokens ``[..., T]`` to hidden states ``[..., T, D]`` and the head's matrix ``[V, D]``.
      chunk: entries of the vocabulary at a time.
      shards: see ``head.label_log_probs``.

    Returns:
      As :func:`token_statistics`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from entangle.models.token_statistics import sliced_token_statistics
      >>> from entangle.types import PairBatch
      >>> unigram = lambda params, tokens: (jnp.ones((*tokens.shape, 1)), params[:, None])
      >>> pairs = PairBatch(jnp.zeros((1, 2, 3), jnp.int32), jnp.array([[[False, True, True]] * 2]))
      >>> found = sliced_token_statistics(unigram, chunk=2)(jnp.zeros(4), jnp.array([0.0, 0.0, 0.0, -1e9]), pairs)
      >>> f"{found.log_sum_squares[0, 0, 1]:.4f}", f"{found.kl[0, 0, 1]:.4f}"  # log(4 / 16), log(4 / 3)
      ('-1.3863', '0.2877')
    """

    def statistics(params: Params, reference: Params, batch: PairBatch) -> PairTokenLogProbs:
        hidden, tables = zip(*(head_inputs(p, batch.tokens) for p in (params, reference)), strict=True)
        hidden = tuple(states[..., :-1, :] for states in hidden)
        nothing = jnp.zeros_like(hidden[0][..., 0], at_least_float32(hidden[0].dtype))
        start = _BothSums(head.no_sums(hidden[0]), head.no_sums(hidden[1]), nothing, nothing)
        sums: _BothSums = head.over_slices(_add_slices, start, hidden, tables, batch.tokens[..., 1:], chunk, shards)
        policy, ref = sums.policy, sums.reference
        squares = jnp.log(sums.squares) + 2.0 * (policy.greatest - policy.log_total())
        kl = sums.differences / ref.total + policy.log_total() - ref.log_total()
        later = (policy.taken - policy.log_total(), ref.taken - ref.log_total(), squares, kl)
        chosen, reference_, squares, divergence = map(head.after_zero, later)
        return PairTokenLogProbs(chosen, reference_, batch.completion_mask, squares, divergence)

    return statistics


class _BothSums(NamedTuple):
    """What is kept of both models' logits so far, ``[..., N]``.

    Attributes:
      policy: of the policy's.
      reference: of the reference's.
      squares: sum of ``exp(2 (logit - greatest))`` of the policy.
      differences: sum of ``exp(logit - greatest)`` of the reference, times its logit less the policy's.
    """

    policy: head.Sums
    reference: head.Sums
    squares: jax.Array
    differences: jax.Array


def _add_slices(sums: _BothSums, policy: jax.Array, reference: jax.Array, is_label: jax.Array) -> _BothSums:
    both = head.add_slice(sums.policy, policy, is_label), head.add_slice(sums.reference, reference, is_label)
    shrunk, ref_shrunk = (
        jnp.exp(old.greatest - new.greatest) for old, new in zip((sums.policy, sums.reference), both, strict=True)
    )
    squares = jnp.exp(2.0 * (policy - both[0].greatest[..., None])).sum(-1)
    weighted = jnp.exp(reference - both[1].greatest[..., None]) * (reference - policy)
    return _BothSums(
        *both, sums.squares * jnp.square(shrunk) + squares, sums.differences * ref_shrunk + weighted.sum(-1)
    )


def _log_softmax(logits: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(logits.astype(at_least_float32(logits.dtype)))
