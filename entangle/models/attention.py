"""Causal self-attention, from GPT-2's to grouped queries with rotary positions, normed heads and sliding windows."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from entangle.models.config import DecoderConfig, Rope
from entangle.models.linear import INIT_SCALE, Dropout, Linear, residual_scale
from entangle.models.norms import RMSNorm, at_least_float32


class Positions(NamedTuple):
    """What one layer's attention knows of positions and draws.

    Attributes:
      visible: ``[T, T]`` bool, true where the position of the row sees that of the column.
      angles: cosines and sines ``[T, head width / 2]`` of the rotation; None where positions are learned.
      dropout: of adapters; None where nothing is dropped.
    """

    visible: jax.Array
    angles: tuple[jax.Array, jax.Array] | None = None
    dropout: Dropout | None = None


class Attention(nnx.Module):
    """Causal self-attention; a fused kernel holds query, key and value, in this order, each head by head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        """Draw the matrices."""
        size, width = config.head_width, config.width
        self.heads, self.groups = config.heads, config.groups
        queries, keys = config.heads * size, config.groups * size
        parts = {"query": queries, "key": keys, "value": keys}
        for name, columns in ({"qkv": queries + 2 * keys} if config.fused_qkv else parts).items():
            linear = Linear(
                config, f"attention/{name}", width, columns, bias=config.qkv_bias, scale=INIT_SCALE, rngs=rngs
            )
            setattr(self, name, linear)
        self.inputs = ("qkv",) if config.fused_qkv else tuple(parts)
        self.out = Linear(
            config, "attention/out", queries, width, bias=config.out_bias, scale=residual_scale(config), rngs=rngs
        )
        if config.qk_norm:
            self.query_norm = RMSNorm(size, config.norm_epsilon)
            self.key_norm = RMSNorm(size, config.norm_epsilon)
        self.splits = (queries, queries + keys)

    def __call__(self, x: jax.Array, positions: Positions) -> jax.Array:
        """Map ``[N, T, D]`` to ``[N, T, D]``."""
        parts = [getattr(self, name)(x, positions.dropout) for name in self.inputs]
        if len(parts) == 1:
            parts = jnp.split(parts[0], self.splits, axis=-1)
        query, key, value = (
            part.reshape(*x.shape[:-1], count, -1)
            for part, count in zip(parts, (self.heads, self.groups, self.groups), strict=True)
        )
        if hasattr(self, "query_norm"):
            query, key = self.query_norm(query), self.key_norm(key)
        if positions.angles is not None:
            query, key = (rotated(part, *positions.angles) for part in (query, key))
        mixed = attend(query, key, value, positions.visible)
        return self.out(mixed.reshape(*x.shape[:-1], -1), positions.dropout)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax attention; the heads of query share those of key and value group by group.

    ``jax.nn.dot_product_attention`` is not used: it takes the softmax in float32 even for float64 input, and in
    bfloat16 it relies on implicit promotion.

    Args:
      query: ``[N, T, H, head width]``.
      key: ``[N, T, K, head width]``; K divides H.
      value: like ``key``.
      visible: ``[T, T]`` bool, true where the position of the row sees that of the column.

    Returns:
      ``[N, T, H, head width]`` in the dtype of ``value``; the softmax runs in at least float32.

    Example:
      >>> x = jnp.arange(6.0).reshape(1, 3, 1, 2)
      >>> bool((attend(x, x, x, sees(3))[:, 0] == x[:, 0]).all())
      True
    """
    n, length, heads, width = query.shape
    grouped = query.reshape(n, length, key.shape[2], heads // key.shape[2], width)
    scores = jnp.einsum("ntkgd,nskd->nkgts", grouped, key, preferred_element_type=at_least_float32(query.dtype))
    weights = jax.nn.softmax(jnp.where(visible[None, None, None], scores / math.sqrt(width), -jnp.inf), axis=-1)
    return jnp.einsum("nkgts,nskd->ntkgd", weights.astype(value.dtype), value).reshape(query.shape)


def sees(length: int, window: int | jax.Array | None = None) -> jax.Array:
    """Which positions a position sees: itself and those before it, so many in all where there is a window.

    Args:
      length: T.
      window: None sees all before.

    Returns:
      ``[T, T]`` bool, row by row what that position sees.

    Example:
      >>> sees(3, 2).astype(int).tolist()
      [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    visible = jnp.tril(jnp.ones((length, length), bool))
    if window is None:
        return visible
    ago = jnp.arange(length)[:, None] - jnp.arange(length)[None]
    return visible & (ago < window)


def rotation(rope: Rope, width: int, length: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles.

    Args:
      rope: base and scaling.
      width: of a head.
      length: T.
      dtype: of the result.

    Returns:
      Two arrays ``[T, width / 2]``.

    Example:
      >>> cosine, sine = rotation(Rope(), 4, 3, jnp.float32)
      >>> cosine.shape, float(sine[0, 0])
      ((3, 2), 0.0)
    """
    frequencies = rope.theta ** (-np.arange(0, width, 2) / width)
    if (scaling := rope.scaling) is not None:
        # a smooth step from 1 / factor for long waves to 1 for short ones
        turns = scaling.original_positions * frequencies / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        share = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (share + (1.0 - share) / scaling.factor)
    angles = jnp.arange(length, dtype=dtype)[:, None] * jnp.asarray(frequencies, dtype)[None]
    return jnp.cos(angles), jnp.sin(angles)


def rotated(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Heads ``[N, T, H, width]``, their two halves rotated as the parts of a complex number by ``[T, width / 2]``."""
    first, second = jnp.split(x, 2, axis=-1)
    cosine, sine = (part.astype(x.dtype)[None, :, None] for part in (cosine, sine))
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
