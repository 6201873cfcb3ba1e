"""Matrices of a layer, with or without an adapter."""

from __future__ import annotations

import math
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from entangle.models.config import DecoderConfig

INIT_SCALE = 0.02


class Dropout(NamedTuple):
    """What adapters draw their dropout from.

    Attributes:
      keys: PRNG keys ``[N]``, one a row; of one layer.
    """

    keys: jax.Array

    def __call__(self, x: jax.Array, rate: float, path: str) -> jax.Array:
        """Drop entries of ``[N, T, D]``, the others scaled up; every matrix draws anew."""
        number = zlib.crc32(path.encode())
        keep = lambda key: jax.random.bernoulli(jax.random.fold_in(key, number), 1.0 - rate, x.shape[1:])  # noqa: E731
        return jnp.where(jax.vmap(keep)(self.keys), x / (1.0 - rate), jnp.zeros_like(x))


class Linear(nnx.Linear):
    """A matrix and its bias, run in the dtype of the input; with an adapter where the configuration says so."""

    def __init__(
        self, config: DecoderConfig, path: str, rows: int, columns: int, *, bias: bool, scale: float, rngs: nnx.Rngs
    ) -> None:
        """Draw the matrix: normal with the given scale.

        Args:
          config: has the adapters.
          path: of the matrix within its layer, e.g. ``attention/out``.
          rows: input width.
          columns: output width.
          bias: whether there is one.
          scale: standard deviation.
          rngs: source of the ``params`` stream.
        """
        super().__init__(rows, columns, use_bias=bias, kernel_init=nnx.initializers.normal(scale), rngs=rngs)
        self.path = path
        self.lora = config.lora if config.lora is not None and config.lora.adapts(path) else None
        if self.lora is not None:
            limit = 1.0 / math.sqrt(rows)
            draw = lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -limit, limit)  # noqa: E731
            self.lora_a = nnx.LoRAParam(draw(rngs.params(), (rows, self.lora.rank)))
            self.lora_b = nnx.LoRAParam(jnp.zeros((self.lora.rank, columns), jnp.float32))

    def __call__(self, x: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """Map ``[..., rows]`` to ``[..., columns]``."""
        y = _times(x, self.kernel[...])
        if self.lora is not None:
            kept = x if dropout is None or self.lora.dropout == 0 else dropout(x, self.lora.dropout, self.path)
            y = y + self.lora.scale * _times(_times(kept, self.lora_a[...]), self.lora_b[...])
        return y if self.bias is None else y + along_last(self.bias[...], y.ndim).astype(y.dtype)


def _times(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, matrix.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))


def along_last(vector: jax.Array, ndim: int) -> jax.Array:
    """A vector with so many axes that it is added along the last."""
    return jax.lax.expand_dims(vector, range(ndim - 1))


def residual_scale(config: DecoderConfig) -> float:
    """Standard deviation of matrices that add to the residual stream, as in GPT-2."""
    return INIT_SCALE / math.sqrt(2 * config.layers)
