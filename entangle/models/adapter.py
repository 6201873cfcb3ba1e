"""Somebody else's Flax NNX language model, unedited, as the pure function that losses and geometry take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from entangle import jaxprs
from entangle.errors import UserError
from entangle.models.head import after_zero, log_probs_of
from entangle.models.norms import at_least_float32
from entangle.paths import named_leaves
from entangle.types import LogProbFn, PairBatch, Params


def log_prob_function(
    module: nnx.Module,
    *,
    wrt: Any = nnx.Param,
    call: Callable[[Any, jax.Array], jax.Array] = lambda module, tokens: module(tokens),
) -> tuple[LogProbFn, Params]:
    """Split a module once into its trainable parameters and a pure function of them.

    What ``wrt`` does not choose is frozen. A variable that several layers share is one parameter. Nothing may be written
    during the call: dropout that draws, batch statistics, key-value caches and sown values are refused by name, since the
    log-probability of a row would depend on more than parameters and row; ``module.eval()`` turns off the first two.

    Args:
      module: a language model; rows must not see each other.
      wrt: a filter of ``nnx``: ``nnx.Param``, ``nnx.LoRAParam`` for adapters on a frozen base, or a predicate.
      call: function of the module and tokens ``[N, T]`` to next-token logits ``[N, T, V]``.

    Returns:
      The function of parameters and a PairBatch of leaves ``[B, R, T]`` to ``[B, R]``, in nats, and the parameters as a
      nested dict.

    Raises:
      UserError: the filter chooses nothing, or something that is no floating array; when the function is traced: the call
        writes to a variable, or returns something else than logits.

    Example:
      >>> class Bigram(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.embed, self.head = nnx.Embed(7, 4, rngs=rngs), nnx.Linear(4, 7, rngs=rngs)
      ...     def __call__(self, tokens):
      ...         return self.head(self.embed(tokens))
      >>> log_prob_fn, params = log_prob_function(Bigram(nnx.Rngs(0)))
      >>> sorted(params), log_prob_fn(params, PairBatch(jnp.zeros((1, 2, 3), jnp.int32), jnp.ones((1, 2, 3), bool))).shape
      (['embed', 'head'], (1, 2))
    """
    graph, *states = nnx.split(module, wrt, ...)
    params, frozen = map(nnx.to_pure_dict, states)
    _check_parameters(module, wrt, params)

    def run(params: Params, frozen: Params, tokens: jax.Array) -> tuple[Any, Params]:
        merged = nnx.merge(graph, params, frozen)
        logits = call(merged, tokens)
        return logits, nnx.to_pure_dict(nnx.state(merged))

    def log_prob_fn(params: Params, batch: PairBatch, /) -> jax.Array:
        if not isinstance(batch, PairBatch):
            raise UserError(f"{type(module).__name__}: a PairBatch is needed, got {type(batch).__name__}")
        tokens = batch.tokens.reshape(-1, batch.tokens.shape[-1])
        if written := _writes(run, params, frozen, tokens):
            raise UserError(
                f"{type(module).__name__}: the call writes to {', '.join(written)}; a row's log-probability has to "
                "depend on parameters and row alone (dropout and batch statistics: module.eval())"
            )
        logits, _ = run(params, frozen, tokens)
        if not isinstance(logits, jax.Array) or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            shape = getattr(logits, "shape", type(logits).__name__)
            raise UserError(f"{type(module).__name__}: logits of shape {shape} for tokens of shape {tokens.shape}")
        logits = logits.astype(at_least_float32(logits.dtype))
        per_token = after_zero(log_probs_of(logits[:, :-1], tokens[:, 1:])).reshape(batch.tokens.shape)
        return jnp.where(batch.completion_mask, per_token, jnp.zeros_like(per_token)).sum(-1)

    return log_prob_fn, params


def _check_parameters(module: nnx.Module, wrt: Any, params: Params) -> None:
    leaves = named_leaves(params)
    if not leaves:
        raise UserError(f"{type(module).__name__}: the filter {wrt!r} chooses no parameter of this module")
    for name, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise UserError(f"{type(module).__name__}: parameter {name} has dtype {leaf.dtype}, not a floating one")


def _writes(run: Callable[..., tuple[Any, Params]], params: Params, frozen: Params, tokens: jax.Array) -> list[str]:
    """Names of the variables that a call gives another value: in its program, what does not come out as it went in.

    ``nnx.jit``, ``nnx.remat`` and ``nnx.scan`` write every variable that they are given back, as it was.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), (params, frozen, tokens))
    closed, (_, after) = jax.make_jaxpr(run, return_shape=True)(*shapes)
    variables = named_leaves(shapes[0]) + named_leaves(shapes[1])
    before = {name: var for (name, _), var in zip(variables, closed.jaxpr.invars[:-1], strict=True)}
    names = [name for name, _ in named_leaves(after)]
    results = closed.jaxpr.outvars[len(closed.jaxpr.outvars) - len(names) :]
    return sorted(
        name
        for name, var in zip(names, results, strict=True)
        if jaxprs.source_of(closed.jaxpr, var) is not before.get(name)
    )
