"""GPT-2 decoder in Flax NNX: learned positions, LayerNorm before each sublayer, tied embedding and head, no dropout.

Parameters decide the precision: everything runs in the dtype of the parameters except LayerNorm statistics, attention
softmax and head, which run in at least float32.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from entangle.errors import UserError
from entangle.models.config import DecoderConfig

_INIT_SCALE = 0.02


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, with the two-pass variance.

    ``nnx.LayerNorm`` is not used: in bfloat16 it relies on implicit promotion, which the test suite forbids.
    """

    def __init__(self, width: int, epsilon: float) -> None:
        """Start as the plain normalisation: scale one, bias zero."""
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise ``[..., D]`` to ``[..., D]``."""
        dtype = at_least_float32(x.dtype)
        wide = x.astype(dtype)
        centred = wide - wide.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return normal.astype(x.dtype) * _along_last(self.scale[...], x.ndim) + _along_last(self.bias[...], x.ndim)


class Attention(nnx.Module):
    """Causal self-attention; one kernel holds query, key and value, in this order, each ``[D, D]`` head by head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        """Draw the two kernels."""
        self.heads = config.heads
        self.qkv = _linear(config.width, 3 * config.width, _INIT_SCALE, rngs)
        self.out = _linear(config.width, config.width, _residual_scale(config), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[N, T, D]`` to ``[N, T, D]``; position t sees positions up to t."""
        query, key, value = (part.reshape(*x.shape[:-1], self.heads, -1) for part in jnp.split(self.qkv(x), 3, axis=-1))
        return self.out(causal_attention(query, key, value).reshape(x.shape))


class FeedForward(nnx.Module):
    """Two linear layers around GELU in its tanh form."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        """Draw the two kernels."""
        self.up = _linear(config.width, config.hidden_width, _INIT_SCALE, rngs)
        self.down = _linear(config.hidden_width, config.width, _residual_scale(config), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[..., D]`` to ``[..., D]`` through width F."""
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class Layer(nnx.Module):
    """Attention, then feed-forward, each on the normalised residual stream and added to it."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        """Draw the parameters of both sublayers."""
        self.attention_norm = LayerNorm(config.width, config.norm_epsilon)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = LayerNorm(config.width, config.norm_epsilon)
        self.feed_forward = FeedForward(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[N, T, D]`` to ``[N, T, D]``."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nnx.Module):
    """The whole decoder; its layers lie under string keys ``"0"``, ``"1"``, ... so that parameter trees stay plain.

    Example:
      >>> config = DecoderConfig(vocab_size=10, max_positions=8, width=4, layers=1, heads=2)
      >>> model = Decoder(config, nnx.Rngs(0))
      >>> model.logits(jnp.zeros((2, 5), jnp.int32)).shape
      (2, 5, 10)
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        """Draw all parameters as GPT-2 does: normal with 0.02, residual projections less by ``sqrt(2 L)``.

        Args:
          config: the shapes.
          rngs: source of the ``params`` stream.
        """
        self.config = config
        normal = nnx.initializers.normal(_INIT_SCALE)
        tokens, positions = (config.vocab_size, config.width), (config.max_positions, config.width)
        self.token_embedding = nnx.Param(normal(rngs.params(), tokens, jnp.float32))
        self.position_embedding = nnx.Param(normal(rngs.params(), positions, jnp.float32))
        self.layers = nnx.Dict({str(index): Layer(config, rngs) for index in range(config.layers)})
        self.final_norm = LayerNorm(config.width, config.norm_epsilon)

    def hidden_states(self, tokens: jax.Array) -> jax.Array:
        """Return the normalised residual stream that the head reads.

        Args:
          tokens: ``[..., T]`` whole numbers from 0 below V; a greater one makes its whole row NaN.

        Returns:
          ``[..., T, D]`` in the dtype of the parameters.

        Raises:
          UserError: T is greater than ``max_positions``.
        """
        length, limit = tokens.shape[-1], self.config.max_positions
        if length > limit:
            raise UserError(f"model input: {length} tokens are more than the {limit} positions of the model")
        rows = tokens.reshape(-1, length)
        x = jnp.take(self.token_embedding[...], rows, axis=0) + self.position_embedding[...][None, :length]
        for index in range(self.config.layers):
            x = self.layers[str(index)](x)
        return self.final_norm(x).reshape(*tokens.shape, -1)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states ``[..., T, D]`` to logits ``[..., T, V]``, summed in at least float32."""
        dtype = at_least_float32(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, self.token_embedding[...], preferred_element_type=dtype)

    def logits(self, tokens: jax.Array) -> jax.Array:
        """Map tokens ``[..., T]`` to next-token logits ``[..., T, V]``; arguments as in :meth:`hidden_states`."""
        return self.head(self.hidden_states(tokens))


def layer_of(path: str) -> str:
    """The part of a decoder that a parameter belongs to: an embedding, a sublayer with the norm before it, the final norm.

    Args:
      path: of the parameter, with slashes.

    Example:
      >>> from entangle.models import layer_of
      >>> layer_of("token_embedding"), layer_of("layers/0/attention_norm/scale"), layer_of("layers/0/attention/qkv/kernel")
      ('token_embedding', '0.attention', '0.attention')
    """
    first, *rest = path.split("/")
    return f"{rest[0]}.{rest[1].removesuffix('_norm')}" if first == "layers" else first


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Softmax attention in which position t sees positions up to t.

    ``jax.nn.dot_product_attention`` is not used: it takes the softmax in float32 even for float64 input, and in
    bfloat16 it relies on implicit promotion.

    Args:
      query: ``[N, T, H, D / H]``.
      key: like ``query``.
      value: like ``query``.

    Returns:
      ``[N, T, H, D / H]`` in the dtype of ``value``; the softmax runs in at least float32.

    Example:
      >>> x = jnp.arange(6.0).reshape(1, 3, 1, 2)
      >>> bool((causal_attention(x, x, x)[:, 0] == x[:, 0]).all())
      True
    """
    length, width = query.shape[-3], query.shape[-1]
    scores = jnp.einsum("nthd,nshd->nhts", query, key, preferred_element_type=at_least_float32(query.dtype))
    visible = jnp.tril(jnp.ones((length, length), bool))[None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores / math.sqrt(width), -jnp.inf), axis=-1)
    return jnp.einsum("nhts,nshd->nthd", weights.astype(value.dtype), value)


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of sums over a floating dtype: float64 for float64, else float32."""
    return dtype if dtype == jnp.float64 else jnp.dtype(jnp.float32)


def _along_last(vector: jax.Array, ndim: int) -> jax.Array:
    return jax.lax.expand_dims(vector, range(ndim - 1))


def _residual_scale(config: DecoderConfig) -> float:
    return _INIT_SCALE / math.sqrt(2 * config.layers)


def _linear(rows: int, columns: int, scale: float, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(rows, columns, kernel_init=nnx.initializers.normal(scale), rngs=rngs)
