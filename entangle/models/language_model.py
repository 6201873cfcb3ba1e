"""The border between modules and pure functions: a decoder is split here, once, and seen as functions elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from entangle.models.config import DecoderConfig
from entangle.models.decoder import Decoder
from entangle.types import LogProbFn, PairBatch, Params


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
    """

    config: DecoderConfig
    init: Callable[[jax.Array], Params]
    hidden_states: Callable[[Params, jax.Array], jax.Array]
    logits: Callable[[Params, jax.Array], jax.Array]
    token_log_probs: Callable[..., jax.Array]
    log_probs: LogProbFn


def language_model(config: DecoderConfig) -> LanguageModel:
    """Make the pure functions of a decoder.

    Logits and log-probabilities are float32, or float64 when the parameters are. A token of V or more makes its row NaN;
    more tokens than ``max_positions`` raise :class:`entangle.errors.UserError` when a function is traced.

    Args:
      config: the shapes.

    Returns:
      The functions.

    Example:
      >>> model = language_model(DecoderConfig(vocab_size=10, max_positions=8, width=4, layers=1, heads=2))
      >>> params = model.init(jax.random.key(0))
      >>> model.token_log_probs(params, jnp.zeros((3, 2, 5), jnp.int32)).shape
      (3, 2, 5)
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(key)), nnx.Param))

    def hidden_states(params: Params, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params).hidden_states(tokens)

    def logits(params: Params, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params).logits(tokens)

    def token_log_probs(params: Params, tokens: jax.Array, seeds: jax.Array | None = None) -> jax.Array:
        decoder = nnx.merge(graph, params)
        # The last position predicts nothing that is asked for; the head is the widest product of a small model.
        return next_token_log_probs(decoder.head(decoder.hidden_states(tokens, seeds)[..., :-1, :]), tokens)

    def log_probs(params: Params, batch: PairBatch, /) -> jax.Array:
        per_token = token_log_probs(params, batch.tokens, batch.seeds)
        return jnp.where(batch.completion_mask, per_token, jnp.zeros_like(per_token)).sum(-1)

    return LanguageModel(config, init, hidden_states, logits, token_log_probs, log_probs)


def next_token_log_probs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Map logits ``[..., T - 1, V]`` and tokens ``[..., T]`` to ``[..., T]`` with 0 at position 0."""
    taken = jnp.take_along_axis(logits, tokens[..., 1:, None], axis=-1)[..., 0]
    later = taken - jax.nn.logsumexp(logits, axis=-1)
    return jnp.concatenate([jnp.zeros_like(later, shape=(*tokens.shape[:-1], 1)), later], axis=-1)
