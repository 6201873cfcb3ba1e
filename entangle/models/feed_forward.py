"""The feed-forward sublayers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
from flax import nnx

from entangle.models.config import DecoderConfig
from entangle.models.linear import INIT_SCALE, Dropout, Linear, residual_scale


def _up(config: DecoderConfig, name: str, rngs: nnx.Rngs) -> Linear:
    bias = config.feed_forward_bias
    path = f"feed_forward/{name}"
    return Linear(config, path, config.width, config.hidden_width, bias=bias, scale=INIT_SCALE, rngs=rngs)


def _down(config: DecoderConfig, rngs: nnx.Rngs) -> Linear:
    bias, scale = config.feed_forward_bias, residual_scale(config)
    return Linear(config, "feed_forward/down", config.hidden_width, config.width, bias=bias, scale=scale, rngs=rngs)


class FeedForward(nnx.Module):
    """Two linear layers around GELU in its tanh form."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        """Draw the two kernels."""
        self.up, self.down = _up(config, "up", rngs), _down(config, rngs)

    def __call__(self, x: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """Map ``[..., D]`` to ``[..., D]`` through width F."""
        return self.down(jax.nn.gelu(self.up(x, dropout), approximate=True), dropout)


class GatedFeedForward(nnx.Module):
    """SwiGLU: one product with the input, gated by SiLU of another (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        """Draw the three kernels."""
        self.gate, self.up, self.down = _up(config, "gate", rngs), _up(config, "up", rngs), _down(config, rngs)

    def __call__(self, x: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """Map ``[..., D]`` to ``[..., D]`` through width F."""
        return self.down(jax.nn.silu(self.gate(x, dropout)) * self.up(x, dropout), dropout)


FEED_FORWARDS: Mapping[str, Callable[[DecoderConfig, nnx.Rngs], nnx.Module]] = {
    "gelu": FeedForward,
    "swiglu": GatedFeedForward,
}
"""Name of a feed-forward sublayer in a configuration to what makes it."""
