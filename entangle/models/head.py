"""The end of a language model: from hidden states and the head's matrix to log-probabilities of given tokens.

The whole matrix at once makes logits for every entry of the vocabulary at every position. In slices of the vocabulary they
exist for one slice at a time: a running sum of exponentials is all that is kept of them, and the backward multiplies again.
Positions that no completion token is predicted from can be left out before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from entangle.errors import UserError
from entangle.models.norms import at_least_float32

MOST_SLICES = 4
"""So many times as many slices as asked for, at most, for them to be of one size: what is left over costs a copy."""


def head_logits(hidden: jax.Array, table: jax.Array) -> jax.Array:
    """Map hidden states ``[..., D]`` and the matrix ``[V, D]`` to logits ``[..., V]``, summed in at least float32."""
    dtype = at_least_float32(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, table.astype(hidden.dtype), preferred_element_type=dtype)


def log_probs_of(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Map logits ``[..., V]`` and labels ``[...]`` to the labels' log-probabilities, ``[...]``."""
    taken = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return taken - jax.nn.logsumexp(logits, axis=-1)


def after_zero(later: jax.Array) -> jax.Array:
    """Numbers of the tokens after the first, ``[..., T - 1]``, behind a 0 for the first, which nothing predicts."""
    return jnp.concatenate([jnp.zeros_like(later, shape=(*later.shape[:-1], 1)), later], axis=-1)


def label_log_probs(
    hidden: jax.Array, table: jax.Array, labels: jax.Array, *, chunk: int | None = None, shards: int = 1
) -> jax.Array:
    """Log-probabilities of one token a position.

    Args:
      hidden: ``[..., N, D]``.
      table: the head's matrix, ``[V, D]``.
      labels: ``[..., N]`` whole numbers from 0 below V.
      chunk: entries of the vocabulary at a time; None, or V or more, takes all at once.
      shards: parts in which the table lies on a mesh, along V; a slice has a share of each, so that none is sent around.

    Returns:
      ``[..., N]`` in nats, at least float32.

    Raises:
      UserError: the chunk is below 1, or the shards do not divide the vocabulary.

    References:
      Milakov and Gimelshein, arXiv 1805.02867, for the running sum.

    Example:
      >>> hidden, table = jax.random.normal(jax.random.key(0), (5, 4)), jax.random.normal(jax.random.key(1), (11, 4))
      >>> labels = jnp.array([0, 3, 10, 7, 7])
      >>> whole = label_log_probs(hidden, table, labels)
      >>> bool(jnp.allclose(label_log_probs(hidden, table, labels, chunk=3), whole, atol=1e-6))
      True
    """
    check_head(table.shape[0], chunk=chunk, shards=shards)
    if chunk is None or chunk >= table.shape[0]:
        return log_probs_of(head_logits(hidden, table), labels)
    sums: Sums = over_slices(add_slice, no_sums(hidden), (hidden,), (table,), labels, chunk, shards)
    return sums.taken - sums.log_total()


def token_log_probs(
    hidden: jax.Array, table: jax.Array, tokens: jax.Array, *, chunk: int | None = None, shards: int = 1
) -> jax.Array:
    """Log-probabilities of all tokens of a row.

    Args:
      hidden: ``[..., T, D]``.
      table: the head's matrix, ``[V, D]``.
      tokens: ``[..., T]``.
      chunk: see :func:`label_log_probs`.
      shards: see :func:`label_log_probs`.

    Returns:
      ``[..., T]`` in nats: position t holds that of token t, position 0 holds 0.
    """
    # The last position predicts nothing that is asked for; the head is the widest product of a small model.
    later = label_log_probs(hidden[..., :-1, :], table, tokens[..., 1:], chunk=chunk, shards=shards)
    return after_zero(later)


def completion_log_probs(
    hidden: jax.Array,
    table: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    completion_length: int | None = None,
    chunk: int | None = None,
    shards: int = 1,
) -> jax.Array:
    """Summed log-probabilities of the tokens of completions.

    Args:
      hidden: ``[..., T, D]``.
      table: the head's matrix, ``[V, D]``.
      tokens: ``[..., T]``.
      mask: ``[..., T]`` bool, true on the tokens of the completion, in one piece or not.
      completion_length: tokens of the longest completion: so many positions a row meet the table, those in front of
        completion tokens first. A row that has more of them is NaN. None takes all T.
      chunk: see :func:`label_log_probs`.
      shards: see :func:`label_log_probs`.

    Returns:
      ``[...]`` in nats, at least float32.

    Raises:
      UserError: the completion length or the chunk is below 1, or the shards do not divide the vocabulary.

    Example:
      >>> hidden, table = jax.random.normal(jax.random.key(0), (2, 6, 4)), jax.random.normal(jax.random.key(1), (11, 4))
      >>> tokens, mask = jnp.ones((2, 6), jnp.int32), jnp.arange(6)[None] >= jnp.array([[3], [4]])
      >>> few = completion_log_probs(hidden, table, tokens, mask, completion_length=3, chunk=4)
      >>> bool(jnp.allclose(few, completion_log_probs(hidden, table, tokens, mask), atol=1e-5))
      True
    """
    check_head(table.shape[0], completion_length=completion_length, chunk=chunk, shards=shards)
    if completion_length is None or completion_length >= tokens.shape[-1] - 1:
        per_token = token_log_probs(hidden, table, tokens, chunk=chunk, shards=shards)
        return jnp.where(mask, per_token, jnp.zeros_like(per_token)).sum(-1)
    predicts = mask[..., 1:]
    first = jnp.argsort(~predicts, axis=-1, stable=True)[..., :completion_length]
    labels, counted = (jnp.take_along_axis(array, first, axis=-1) for array in (tokens[..., 1:], predicts))
    hidden = jnp.take_along_axis(hidden[..., :-1, :], first[..., None], axis=-2)
    per_token = label_log_probs(hidden, table, labels, chunk=chunk, shards=shards)
    sums = jnp.where(counted, per_token, jnp.zeros_like(per_token)).sum(-1)
    return jnp.where(predicts.sum(-1) <= completion_length, sums, jnp.nan)


def over_slices(
    add: Callable[..., Any],
    sums: Any,
    hidden: Sequence[jax.Array],
    tables: Sequence[jax.Array],
    labels: jax.Array,
    chunk: int,
    shards: int = 1,
) -> Any:
    """Reduce logits over the vocabulary, slice by slice; the backward computes a slice's logits again.

    Args:
      add: function of the sums so far, of every model's logits ``[..., N, W]`` in a slice, and of where the label is,
        bool of that shape, to the sums with the slice.
      sums: pytree of arrays to start from.
      hidden: of every model, ``[..., N, D]``.
      tables: of every model, ``[V, D]``.
      labels: ``[..., N]``.
      chunk: entries of the vocabulary in a slice, at most.
      shards: see :func:`label_log_probs`.

    Returns:
      The sums of all slices.
    """
    # wide outside, so that the slices' cotangents are added up in float32, and narrow again where they are multiplied
    wide = [states.astype(at_least_float32(states.dtype)) for states in hidden]
    each = tables[0].shape[0] // shards

    def with_slice(sums: Any, part: tuple[Sequence[jax.Array], jax.Array]) -> tuple[Any, None]:
        rows, first = part
        column = jnp.arange(rows[0].shape[0], dtype=jnp.int32)
        width = len(column) // shards
        ids = (first + each * (column // width) + column % width).reshape(*(1,) * labels.ndim, -1)
        logits = [
            head_logits(states.astype(narrow.dtype), row)
            for states, narrow, row in zip(wide, hidden, rows, strict=True)
        ]
        return add(sums, *logits, ids == labels[..., None].astype(jnp.int32)), None

    count, width = _slices(each, chunk, shards)
    whole, left = zip(*(_in_slices(table, count, width, shards) for table in tables), strict=True)
    # what is left over first: it is short, and the scan then ends in the result
    if each > count * width:
        sums, _ = jax.checkpoint(with_slice)(sums, (left, jnp.int32(count * width)))
    starts = jnp.arange(count, dtype=jnp.int32) * width
    return jax.lax.scan(jax.checkpoint(with_slice, prevent_cse=False), sums, (whole, starts))[0]


def _slices(each: int, chunk: int, shards: int) -> tuple[int, int]:
    """Into how many slices a shard of this length is cut, and how long they are; what is left over is shorter."""
    least = min(-(-each * shards // chunk), each)
    count = next((n for n in range(least, min(MOST_SLICES * least, each) + 1) if each % n == 0), least)
    return count, each // count


def _in_slices(table: jax.Array, count: int, width: int, shards: int) -> tuple[jax.Array, jax.Array]:
    """The slices ``[C, S W, D]`` of a table ``[V, D]``, and the rows left over, ``[..., D]``."""
    depth = table.shape[-1]
    parts = table.reshape(shards, -1, depth)
    each = parts.shape[1]
    whole = jax.lax.slice_in_dim(parts, 0, count * width, axis=1) if count * width < each else parts
    left = jax.lax.slice_in_dim(parts, count * width, each, axis=1)
    if shards > 1:
        whole = jnp.swapaxes(whole.reshape(shards, count, width, depth), 0, 1)
    return whole.reshape(count, shards * width, depth), left.reshape(-1, depth)


def check_head(
    vocab_size: int, *, completion_length: int | None = None, chunk: int | None = None, shards: int = 1
) -> None:
    """Refuse lengths that have no meaning; arguments as in :func:`completion_log_probs`."""
    for name, value in (("completion_length", completion_length), ("chunk", chunk), ("shards", shards)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"head: {name} must be a positive whole number, got {value!r}")
    if vocab_size % shards:
        raise UserError(f"head: a vocabulary of {vocab_size} does not lie in {shards} equal shards")


class Sums(NamedTuple):
    """What is kept of the logits so far, ``[..., N]``: greatest, sum of ``exp(logit - greatest)``, the label's."""

    greatest: jax.Array
    total: jax.Array
    taken: jax.Array

    def log_total(self) -> jax.Array:
        """Log of the sum of the logits' exponentials."""
        return self.greatest + jnp.log(self.total)


def no_sums(hidden: jax.Array) -> Sums:
    """What is kept of no logits at all; hidden ``[..., N, D]``."""
    zeros = jnp.zeros_like(hidden[..., 0], at_least_float32(hidden.dtype))
    return Sums(zeros - jnp.inf, zeros, zeros)


def add_slice(sums: Sums, logits: jax.Array, is_label: jax.Array) -> Sums:
    """Add a slice's logits, ``[..., N, W]``."""
    # any number may be subtracted from all logits, so the greatest of them has no derivative
    greatest = jnp.maximum(sums.greatest, jax.lax.stop_gradient(logits).max(-1))
    total = sums.total * jnp.exp(sums.greatest - greatest) + jnp.exp(logits - greatest[..., None]).sum(-1)
    return Sums(greatest, total, sums.taken + jnp.where(is_label, logits, jnp.zeros_like(logits)).sum(-1))
