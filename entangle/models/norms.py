"""The norms in front of sublayers; statistics run in at least float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from entangle.models.linear import along_last


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
        wide = x.astype(at_least_float32(x.dtype))
        centred = wide - wide.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        scale, bias = (along_last(leaf[...], x.ndim).astype(x.dtype) for leaf in (self.scale, self.bias))
        return normal.astype(x.dtype) * scale + bias


class RMSNorm(nnx.Module):
    """Division by the root of the mean square over the last axis (arXiv 1910.07467)."""

    def __init__(self, width: int, epsilon: float) -> None:
        """Start as the plain normalisation: scale one."""
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise ``[..., D]`` to ``[..., D]``."""
        wide = x.astype(at_least_float32(x.dtype))
        normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        return along_last(self.scale[...], x.ndim).astype(x.dtype) * normal.astype(x.dtype)


NORMS: Mapping[str, Callable[[int, float], nnx.Module]] = {"layer": LayerNorm, "rms": RMSNorm}
"""Name of a norm in a configuration to what makes it from width and epsilon."""


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of sums over a floating dtype: float64 for float64, else float32."""
    return dtype if dtype == jnp.float64 else jnp.dtype(jnp.float32)
