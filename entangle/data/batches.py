"""Batches in an order that is a function of (seed, epoch) alone, so that any position can be sought and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import grain
import jax
import numpy as np

from entangle.data.encode import EncodedPairs
from entangle.data.tokenization import Tokenizer
from entangle.errors import UserError
from entangle.types import PairBatch

Batch = TypeVar("Batch")


def pair_batches(
    encoded: EncodedPairs, batch_size: int, seed: int, rows: np.ndarray | None = None
) -> grain.DatasetIterator[tuple[PairBatch, np.ndarray]]:
    """Iterate for ever over shuffled batches of pairs.

    In an epoch no pair occurs twice, and every pair occurs but for the remainder that fills no batch, another one in
    every epoch. The order depends on the seed and the epoch alone. ``get_state()`` returns a small dict that JSON can
    hold; ``set_state`` of an iterator over the same set, batch size and seed goes on from there.

    Args:
      encoded: N pairs.
      batch_size: B.
      seed: seed of the order.
      rows: of every batch only these, as one of several processes loads them; the order is that of whole batches.

    Returns:
      An infinite iterator of ``(PairBatch, index)``: numpy arrays, index ``[B]`` (or as many as rows) int32 into the
      encoded set.

    Raises:
      UserError: the set is smaller than a batch.

    Example:
      >>> tokens = np.arange(10, dtype=np.int32).reshape(5, 2, 1)
      >>> batches = pair_batches(EncodedPairs(tokens, tokens >= 0, ["x"] * 5), batch_size=2, seed=0)
      >>> (_, first), state, (_, second) = next(batches), batches.get_state(), next(batches)
      >>> batches.set_state(state)
      >>> bool((next(batches)[1] == second).all())
      True
    """
    return _shuffled(len(encoded.tokens), batch_size, seed, rows, "pairs", lambda index: _take(encoded, index))


def text_batches(
    token_ids: np.ndarray, batch_size: int, length: int, seed: int, rows: np.ndarray | None = None
) -> grain.DatasetIterator[tuple[np.ndarray, np.ndarray]]:
    """Iterate for ever over shuffled batches of packed language-model windows, as `pair_batches` does over pairs.

    Args:
      token_ids: one-dimensional int32 array (`encode_text`), cut into windows that do not overlap; a shorter rest is
        left out.
      batch_size: B.
      length: number of tokens of a window.
      seed: seed of the order.
      rows: as in ``pair_batches``.

    Returns:
      An infinite iterator of ``(tokens, index)``: ``[B, length]`` int32 and the windows' numbers, ``[B]`` int32.

    Raises:
      UserError: the text has fewer windows than a batch.

    Example:
      >>> tokens, index = next(text_batches(np.arange(9, dtype=np.int32), batch_size=2, length=4, seed=0))
      >>> sorted(tokens.tolist())
      [[0, 1, 2, 3], [4, 5, 6, 7]]
    """
    count = len(token_ids) // length
    windows = token_ids[: count * length].reshape(count, length)
    return _shuffled(count, batch_size, seed, rows, f"windows of {length} tokens", lambda index: windows[index])


def encode_text(texts: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """Join texts to one stream of tokens, each followed by the end-of-text token.

    Args:
      texts: the texts.
      tokenizer: the tokeniser.

    Returns:
      A one-dimensional int32 array.

    Example:
      >>> from entangle.data import train_bpe
      >>> tokenizer = train_bpe(["ab"], vocab_size=257)
      >>> encode_text(["a", "b"], tokenizer).tolist() == [*tokenizer.encode("a"), 0, *tokenizer.encode("b"), 0]
      True
    """
    pieces = [np.asarray([*ids, tokenizer.eos_id], np.int32) for ids in tokenizer.encode_many(texts)]
    return np.concatenate([np.zeros(0, np.int32), *pieces])


def _shuffled(
    count: int, batch_size: int, seed: int, rows: np.ndarray | None, what: str, take: Callable[[np.ndarray], Batch]
) -> grain.DatasetIterator[tuple[Batch, np.ndarray]]:
    if not 0 < batch_size <= count:
        raise UserError(f"batch size {batch_size}: it must be at least 1 and at most the {count} {what} there are")
    # shuffle(seed) would reuse an epoch's order: grain adds the epoch to that seed, so that seed 0 in its second epoch
    # would be seed 1 in its first. seed(seed) hashes it before.
    indices = grain.MapDataset.range(count).seed(seed).shuffle().batch(batch_size, drop_remainder=True).repeat()
    if rows is not None:
        indices = indices.map(lambda index: index[rows])
    batches = indices.map(lambda index: (take(index := index.astype(np.int32)), index))
    # no read-ahead threads: a batch is one gather from memory
    iterator: Any = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return cast("grain.DatasetIterator[tuple[Batch, np.ndarray]]", iter(iterator))


def _take(encoded: EncodedPairs, index: np.ndarray) -> PairBatch:
    # numpy arrays stand for the jax arrays that they become on their way into the step
    return PairBatch(cast(jax.Array, encoded.tokens[index]), cast(jax.Array, encoded.completion_mask[index]))
