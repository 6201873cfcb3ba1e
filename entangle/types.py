"""The few types that every part of the project passes along.

Shape letters used in all docstrings: B pairs, T positions, V vocabulary, D model width, F hidden width, H heads,
L layers. The second axis of a pair batch is always the side: 0 chosen, 1 rejected. Rows are ``[B, 2, T]``; pairs may be
sharded over devices, the side axis never is.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax

Params = Any
"""A pytree of trainable arrays."""


class PairBatch(NamedTuple):
    """B preference pairs, both sides padded on the right to T positions.

    Attributes:
      tokens: ``[B, 2, T]`` int32, prompt followed by completion; side 0 is the chosen response, side 1 the rejected one.
      completion_mask: ``[B, 2, T]`` bool, true where the token belongs to the completion (never on padding).
      seeds: ``[B, 2]`` uint32, what each row draws its dropout from; None where nothing is dropped.
    """

    tokens: jax.Array
    completion_mask: jax.Array
    seeds: jax.Array | None = None


class PairLogProbs(NamedTuple):
    """Summed completion log-probabilities of B pairs, in nats; what every objective sees.

    Attributes:
      chosen: ``[B]`` log pi(y_w | x) under the policy.
      rejected: ``[B]`` log pi(y_l | x) under the policy.
      ref_chosen: ``[B]`` the same under the reference model; zeros when there is none.
      ref_rejected: ``[B]`` the same under the reference model; zeros when there is none.
      chosen_length: ``[B]`` number of completion tokens of the chosen response.
      rejected_length: ``[B]`` number of completion tokens of the rejected response.
    """

    chosen: jax.Array
    rejected: jax.Array
    ref_chosen: jax.Array
    ref_rejected: jax.Array
    chosen_length: jax.Array
    rejected_length: jax.Array


class PairTokenLogProbs(NamedTuple):
    """What token-level objectives see of B pairs: log-probabilities position by position, in nats.

    Position t holds what the model says of token t; numbers off the completions do not count.

    Attributes:
      log_probs: ``[B, 2, T]`` log pi(y_t | x, y_<t) under the policy.
      ref_log_probs: ``[B, 2, T]`` the same under the reference model; zeros when there is none.
      completion_mask: ``[B, 2, T]`` bool, true on the tokens of the completions.
      log_sum_squares: ``[B, 2, T]`` log of the sum of pi(v)^2 over the vocabulary; zeros for objectives without it.
      kl: ``[B, 2, T]`` KL(reference, policy) of the next-token distributions; zeros for objectives without it.
    """

    log_probs: jax.Array
    ref_log_probs: jax.Array
    completion_mask: jax.Array
    log_sum_squares: jax.Array
    kl: jax.Array


class PairGradients(NamedTuple):
    """The two halves of the gradient of a margin loss, apart.

    ``chosen`` is ``mean(d_w g_w)`` and ``rejected`` is ``mean(d_l g_l)``: coefficient-weighted means over pairs of the
    gradients of the two log-probabilities. The gradient of the mean loss is ``rejected - chosen``.

    Attributes:
      chosen: pytree like the parameters.
      rejected: pytree like the parameters.
    """

    chosen: Params
    rejected: Params


class PairGeometry(NamedTuple):
    """The 2x2 Gram matrix of the pair's log-probability gradients; arrays of one shape, ``[B]`` or ``[]``.

    Attributes:
      chosen_sq_norm: ``|g_w|^2``.
      rejected_sq_norm: ``|g_l|^2``.
      inner_product: ``<g_w, g_l>``.
    """

    chosen_sq_norm: jax.Array
    rejected_sq_norm: jax.Array
    inner_product: jax.Array


class LogProbFn(Protocol):
    """A pure function from parameters and a batch to summed completion log-probabilities.

    The batch is a pytree whose leaves have leading axes ``[B, R]`` (R is 2 for whole pairs, 1 when one side is taken
    alone) and the result is ``[B, R]``. It must treat every row by itself: no statistics across rows.
    """

    def __call__(self, params: Params, batch: Any, /) -> jax.Array:
        """Return the summed completion log-probabilities, ``[B, R]``."""
        ...
