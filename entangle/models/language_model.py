"""The border between modules and pure functions: a decoder is split here, once, and seen as functions elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx

from entangle.models import head
from entangle.models.config import DecoderConfig
from entangle.models.decoder import Decoder
from entangle.models.token_statistics import sliced_token_statistics, token_statistics
from entangle.types import LogProbFn, PairBatch, PairTokenLogProbs, Params


class LanguageModel(NamedTuple):
    """Pure functions of one decoder. All run under jit, vmap, scan, jvp and vjp.

    Attributes:
      config: the shapes.
      init: PRNG key to parameters, a nested dict of float32 arrays.
      hidden_states: parameters and tokens ``[..., T]`` to ``[..., T, D]``, what the head reads at every token.
      logits: parameters and tokens ``[..., T]`` to next-token logits ``[..., T, V]``.
      token_log_probs: parameters, tokens ``[..., T]`` and, for the dropout of adapters, seeds ``[...]`` to ``[..., T]``, in
        nats: position t holds ``log p(token_t | tokens < t)``, position 0 holds 0.
      log_probs: parameters and a PairBatch with leaves ``[B, R, T]`` to ``[B, R]``, in nats: the sum of
        ``token_log_probs`` over the completion mask.
      token_statistics: parameters, a reference's parameters and a PairBatch to PairTokenLogProbs, see
        ``models.token_statistics``.
    """

    config: DecoderConfig
    init: Callable[[jax.Array], Params]
    hidden_states: Callable[[Params, jax.Array], jax.Array]
    logits: Callable[[Params, jax.Array], jax.Array]
    token_log_probs: Callable[..., jax.Array]
    log_probs: LogProbFn
    token_statistics: Callable[[Params, Params, PairBatch], PairTokenLogProbs]


def language_model(
    config: DecoderConfig, *, completion_length: int | None = None, chunk: int | None = None, shards: int = 1
) -> LanguageModel:
    """Make the pure functions of a decoder.

    Logits and log-probabilities are float32, or float64 when the parameters are. A token of V or more makes its row NaN;
    more tokens than ``max_positions`` raise :class:`entangle.errors.UserError` when a function is traced.

    Args:
      config: the shapes.
      completion_length: tokens of the longest completion, so many positions a row meet the head in ``log_probs``, where a
        row that has more of them is NaN; None takes all positions.
      chunk: entries of the vocabulary that the head multiplies at a time in all but ``logits``, which then hold no logits
        of the others; None, or V or more, takes all at once.
      shards: parts in which the head's matrix lies on a mesh, along the vocabulary.

    Returns:
      The functions.

    Raises:
      UserError: a length is below 1, or the shards do not divide the vocabulary.

    Example:
      >>> import jax.numpy as jnp
      >>> model = language_model(DecoderConfig(vocab_size=10, max_positions=8, width=4, layers=1, heads=2))
      >>> params = model.init(jax.random.key(0))
      >>> model.token_log_probs(params, jnp.zeros((3, 2, 5), jnp.int32)).shape
      (3, 2, 5)
    """
    head.check_head(config.vocab_size, completion_length=completion_length, chunk=chunk, shards=shards)
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(key)), nnx.Param))

    def hidden_states(params: Params, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params).hidden_states(tokens)

    def logits(params: Params, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params).logits(tokens)

    def head_inputs(params: Params, tokens: jax.Array, seeds: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        decoder = nnx.merge(graph, params)
        return decoder.hidden_states(tokens, seeds), decoder.table()

    def token_log_probs(params: Params, tokens: jax.Array, seeds: jax.Array | None = None) -> jax.Array:
        return head.token_log_probs(*head_inputs(params, tokens, seeds), tokens, chunk=chunk, shards=shards)

    def log_probs(params: Params, batch: PairBatch, /) -> jax.Array:
        return head.completion_log_probs(
            *head_inputs(params, batch.tokens, batch.seeds),
            batch.tokens,
            batch.completion_mask,
            completion_length=completion_length,
            chunk=chunk,
            shards=shards,
        )

    if chunk is None or chunk >= config.vocab_size:
        statistics = token_statistics(logits)
    else:
        statistics = sliced_token_statistics(head_inputs, chunk=chunk, shards=shards)
    return LanguageModel(config, init, hidden_states, logits, token_log_probs, log_probs, statistics)
