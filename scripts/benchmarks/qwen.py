"""A decoder of the size of Qwen2.5-0.5B as a plain function, layers scanned over, for benchmarks alone: weights are random."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from entangle.models.decoder import at_least_float32, causal_attention
from entangle.models.language_model import next_token_log_probs
from entangle.types import PairBatch, Params

INIT_SCALE = 0.02


class QwenConfig(NamedTuple):
    """Shapes; the defaults are those of Qwen2.5-0.5B (arXiv 2412.15115, table 1): 494 million parameters."""

    vocab_size: int = 151_936
    width: int = 896
    layers: int = 24
    heads: int = 14
    key_value_heads: int = 2
    hidden: int = 4864
    base: float = 1e6
    norm_epsilon: float = 1e-6


def init(config: QwenConfig, key: jax.Array) -> Params:
    """Random parameters, float32."""
    narrow = config.width // config.heads * config.key_value_heads
    shapes = {
        "query": (config.width, config.width),
        "key": (config.width, narrow),
        "value": (config.width, narrow),
        "out": (config.width, config.width),
        "gate": (config.width, config.hidden),
        "up": (config.width, config.hidden),
        "down": (config.hidden, config.width),
    }
    keys = iter(jax.random.split(key, len(shapes) + 1))
    normal = lambda shape: INIT_SCALE * jax.random.normal(next(keys), shape)  # noqa: E731
    layers = {name: normal((config.layers, *shape)) for name, shape in shapes.items()}
    layers |= {f"{name}_bias": jnp.zeros((config.layers, shapes[name][1])) for name in ("query", "key", "value")}
    layers |= {name: jnp.ones((config.layers, config.width)) for name in ("attention_norm", "feed_forward_norm")}
    return {
        "embedding": normal((config.vocab_size, config.width)),
        "layers": layers,
        "norm": jnp.ones(config.width),
    }


def log_probs(config: QwenConfig, params: Params, batch: PairBatch, /) -> jax.Array:
    """Summed log-probabilities of completions, ``[B, R]``, nats."""
    tokens = batch.tokens.reshape(-1, batch.tokens.shape[-1])
    embedding = params["embedding"]
    x, _ = jax.lax.scan(lambda x, p: (_layer(config, p, x), None), embedding[tokens], params["layers"])
    x = _norm(config, params["norm"], x)[:, :-1]
    logits = jnp.einsum("ntd,vd->ntv", x, embedding, preferred_element_type=at_least_float32(x.dtype))
    per_token = next_token_log_probs(logits, tokens).reshape(batch.tokens.shape)
    return jnp.where(batch.completion_mask, per_token, 0).sum(-1)


def _layer(config: QwenConfig, p: Params, x: jax.Array) -> jax.Array:
    h = _norm(config, p["attention_norm"], x)
    q, k, v = (
        (h @ p[name] + p[f"{name}_bias"]).reshape(*h.shape[:2], -1, config.width // config.heads)
        for name in ("query", "key", "value")
    )
    k, v = (jnp.repeat(z, config.heads // config.key_value_heads, 2) for z in (_rotate(config, k), v))
    x = x + causal_attention(_rotate(config, q), k, v).reshape(x.shape) @ p["out"]
    h = _norm(config, p["feed_forward_norm"], x)
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def _norm(config: QwenConfig, scale: jax.Array, x: jax.Array) -> jax.Array:
    wide = x.astype(at_least_float32(x.dtype))
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + config.norm_epsilon)
    return wide.astype(x.dtype) * scale


def _rotate(config: QwenConfig, x: jax.Array) -> jax.Array:
    """Rotary positions; x ``[N, T, H, d]``."""
    half = x.shape[-1] // 2
    rates = jnp.exp(-math.log(config.base) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = (jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * rates)[:, None]
    cos, sin = (f(angle).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
