"""Language models as plain functions, one for every way in which a parameter can meet a row."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HIDDEN, HEADS, KEY_VALUE_HEADS, LAYERS = 7, 8, 12, 4, 2, 2


def select(logits, batch):
    """Sum the completion tokens' log-probabilities; logits ``[..., T, V]``."""
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits[..., :-1, :]), batch.tokens[..., 1:, None], -1)[..., 0]
    return jnp.sum(jnp.where(batch.completion_mask[..., 1:], log_probs, jnp.zeros_like(log_probs)), -1)


def last(vector, x):
    """A vector along the last axis of x."""
    return vector.reshape(*(1,) * (x.ndim - 1), -1)


def rms_norm(scale, x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * last(scale, x)


def layer_norm(p, x):
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * last(p["scale"], x) + last(p["bias"], x)


def rotate(x):
    """Rotary positions; x ``[..., T, H, d]``."""
    half = x.shape[-1] // 2
    angle = jnp.outer(jnp.arange(x.shape[-3], dtype=x.dtype), 100.0 ** -(jnp.arange(half, dtype=x.dtype) / half))
    angle = angle.reshape(*(1,) * (x.ndim - 3), x.shape[-3], 1, half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], -1)


def attend(q, k, v):
    """Causal grouped-query attention; q ``[..., T, H, d]``, k and v ``[..., T, K, d]``."""
    t, heads, groups = q.shape[-3], q.shape[-2], k.shape[-2]
    q = q.reshape(*q.shape[:-2], groups, heads // groups, q.shape[-1])
    scores = jnp.einsum("...tkgd,...skd->...kgts", q, k) / math.sqrt(q.shape[-1])
    visible = jnp.tril(jnp.ones((t, t), bool)).reshape(*(1,) * (scores.ndim - 2), t, t)
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.full_like(scores, -jnp.inf)), -1)
    return jnp.einsum("...kgts,...skd->...tkgd", weights, v).reshape(*q.shape[:-3], -1)


def llama_layer(p, x, lora=None):
    h = rms_norm(p["attention_norm"], x)
    q, k, v = (
        (h @ p[name] + (0 if lora is None else 0.5 * (h @ lora[name + "_a"]) @ lora[name + "_b"])).reshape(
            *h.shape[:-1], -1, WIDTH // HEADS
        )
        for name in ("q", "k", "v")
    )
    x = x + attend(rotate(q), rotate(k), v) @ p["out"]
    h = rms_norm(p["feed_forward_norm"], x)
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def llama_shapes():
    narrow = WIDTH // HEADS * KEY_VALUE_HEADS
    return {
        "attention_norm": (WIDTH,),
        "q": (WIDTH, WIDTH),
        "k": (WIDTH, narrow),
        "v": (WIDTH, narrow),
        "out": (WIDTH, WIDTH),
        "feed_forward_norm": (WIDTH,),
        "gate": (WIDTH, HIDDEN),
        "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
    }


def llama(params, batch, wrap=lambda layer: layer):
    """Untied, RMSNorm, grouped queries, rotary positions, gated feed-forward; layers in a list."""
    x = params["embed"][batch.tokens]
    for p in params["layers"]:
        x = wrap(llama_layer)(p, x)
    return select(rms_norm(params["norm"], x) @ params["head"], batch)


def scanned(params, batch, wrap=lambda layer: layer):
    """The same with its layers stacked and scanned over."""
    x = params["embed"][batch.tokens]
    x, _ = jax.lax.scan(lambda x, p: (wrap(llama_layer)(p, x), None), x, params["layers"])
    return select(rms_norm(params["norm"], x) @ params["head"], batch)


def lora(params, batch, base):
    """Low-rank adapters of q, k and v; all else is frozen."""
    x = base["embed"][batch.tokens]
    for p, adapter in zip(base["layers"], params, strict=True):
        x = llama_layer(p, x, adapter)
    return select(rms_norm(base["norm"], x) @ base["head"], batch)


def gpt(params, batch):
    """Tied embedding and head, learned positions, LayerNorm, biases."""
    t = batch.tokens.shape[-1]
    x = params["embed"][batch.tokens] + last2(params["position"][:t], batch.tokens.ndim + 1)
    for p in params["layers"]:
        h = layer_norm(p["norm"], x)
        q, k, v = jnp.split(h @ p["qkv"] + last(p["qkv_bias"], h), 3, -1)
        x = x + attend(*(z.reshape(*z.shape[:-1], HEADS, -1) for z in (q, k, v))) @ p["out"]
    return select(layer_norm(params["norm"], x) @ params["embed"].T, batch)


def last2(matrix, ndim):
    return matrix.reshape(*(1,) * (ndim - 2), *matrix.shape)


def gpt_shapes():
    norm = {"scale": (WIDTH,), "bias": (WIDTH,)}
    layer = {"norm": norm, "qkv": (WIDTH, 3 * WIDTH), "qkv_bias": (3 * WIDTH,), "out": (WIDTH, WIDTH)}
    return {"embed": (VOCAB, WIDTH), "position": (10, WIDTH), "layers": [layer], "norm": norm}


def around(core):
    """A model with a layer of one kind between a frozen table and a frozen head."""
    rng = np.random.default_rng(5)
    table, head = rng.standard_normal((VOCAB, WIDTH)), rng.standard_normal((WIDTH, VOCAB))

    def model(params, batch):
        dtype = jax.tree.leaves(params)[0].dtype
        x = jnp.asarray(table, dtype)[batch.tokens]
        x = x + jnp.roll(x, 1, -2).at[..., :1, :].set(0)
        return select(jnp.tanh(core(params, x, batch)) @ jnp.asarray(head, dtype), batch)

    return model


def twice_tied(params, x, batch):
    """One matrix in two products, and once transposed."""
    return jnp.tanh(x @ params["w"]) @ params["w"] + x @ params["w"].T


def sliced(params, x, batch):
    """One matrix cut into two that are used apart."""
    return jnp.tanh(x @ params["w"][:, :WIDTH]) + x @ params["w"][:, WIDTH:]


def weight_norm(params, x, batch):
    """A weight made from two parameters before it is used."""
    w = params["v"] * (params["g"] / jnp.sqrt(jnp.sum(params["v"] ** 2, 0)))[None]
    return x @ w


def merged_lora(params, x, batch):
    return x @ (params["a"] @ params["b"])


def convolved(params, x, batch):
    """A causal depthwise convolution, as state-space models have it."""
    shifted = [jnp.roll(x, s, -2).at[..., :s, :].set(0) * last(params["w"][s], x) for s in range(3)]
    return sum(shifted)


def experts(params, x, batch):
    """Weights side by side: a batched product of weight and input, weight first."""
    gate = jax.nn.softmax(x @ params["gate"], -1)
    out = jnp.einsum("edh,...td->...teh", params["w"], x)
    return jnp.einsum("...te,...teh->...th", gate, jnp.tanh(out))


def per_head(params, x, batch):
    """A product with a shared batch axis."""
    h = x.reshape(*x.shape[:-1], HEADS, -1)
    return jnp.einsum("...hd,hde->...he", h, params["w"]).reshape(x.shape)


def detached(params, x, batch):
    """One use is cut off from the gradient."""
    return x @ params["w"] + x @ jax.lax.stop_gradient(params["w"])


CORES = {
    "dense": (lambda p, x, b: x @ p["w"], {"w": (WIDTH, WIDTH)}),
    "dense with bias": (lambda p, x, b: x @ p["w"] + last(p["b"], x), {"w": (WIDTH, WIDTH), "b": (WIDTH,)}),
    "weight first": (lambda p, x, b: jnp.einsum("hd,...td->...th", p["w"], x), {"w": (WIDTH, WIDTH)}),
    "two contracted axes": (
        lambda p, x, b: jnp.einsum("...thd,hde->...te", x.reshape(*x.shape[:-1], 4, 2), p["w"]),
        {"w": (4, 2, WIDTH)},
    ),
    "shared input": (
        lambda p, x, b: jax.nn.silu(x @ p["gate"]) * (x @ p["up"]),
        {"gate": (WIDTH, WIDTH), "up": (WIDTH, WIDTH)},
    ),
    "embedding": (lambda p, x, b: x + jnp.take(p["e"], b.tokens, axis=0), {"e": (VOCAB, WIDTH)}),
    "embedding, clipped": (
        lambda p, x, b: x + jnp.take(p["e"], 2 * b.tokens - 3, axis=0, mode="clip"),
        {"e": (VOCAB, WIDTH)},
    ),
    "one-hot embedding": (
        lambda p, x, b: x + jax.nn.one_hot(b.tokens, VOCAB, dtype=x.dtype) @ p["e"],
        {"e": (VOCAB, WIDTH)},
    ),
    "position table": (
        lambda p, x, b: x + jnp.take(p["e"], jnp.broadcast_to(jnp.arange(x.shape[-2]), x.shape[:-1]), axis=0),
        {"e": (10, WIDTH)},
    ),
    "layer norm": (lambda p, x, b: layer_norm(p, x), {"scale": (WIDTH,), "bias": (WIDTH,)}),
    "rms norm": (lambda p, x, b: rms_norm(p["scale"], x), {"scale": (WIDTH,)}),
    "rms norm, one plus scale": (lambda p, x, b: rms_norm(1 + p["scale"], x), {"scale": (WIDTH,)}),
    "low rank": (lambda p, x, b: x + 0.5 * ((x @ p["a"]) @ p["b"]), {"a": (WIDTH, 2), "b": (2, WIDTH)}),
    "merged low rank": (merged_lora, {"a": (WIDTH, 2), "b": (2, WIDTH)}),
    "several uses": (twice_tied, {"w": (WIDTH, WIDTH)}),
    "sliced": (sliced, {"w": (WIDTH, 2 * WIDTH)}),
    "weight norm": (weight_norm, {"v": (WIDTH, WIDTH), "g": (WIDTH,)}),
    "convolution": (convolved, {"w": (3, WIDTH)}),
    "experts": (experts, {"gate": (WIDTH, 3), "w": (3, WIDTH, WIDTH)}),
    "per head": (per_head, {"w": (4, 2, 2)}),
    "detached": (detached, {"w": (WIDTH, WIDTH)}),
}
"""Kind of layer to function of (params, x ``[..., T, D]``, batch) and the shapes of its parameters."""


def draw(shapes, seed, dtype):
    """Random parameters of a tree of shapes, scaled down with the first axis."""
    rng = np.random.default_rng(seed)
    leaf = lambda shape: jnp.asarray(rng.standard_normal(shape) / math.sqrt(shape[0]) * 1.5, dtype)  # noqa: E731
    return jax.tree.map(leaf, shapes, is_leaf=lambda node: isinstance(node, tuple))


@functools.cache
def whole_models(dtype):
    """Name to (log_prob_fn, params): whole models, with scan and checkpoint in all combinations."""
    shapes = {"embed": (VOCAB, WIDTH), "norm": (WIDTH,), "head": (WIDTH, VOCAB)}
    listed = draw(shapes | {"layers": [llama_shapes()] * LAYERS}, 1, dtype)
    stacked = listed | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *listed["layers"])}
    narrow = WIDTH // HEADS * KEY_VALUE_HEADS
    adapter = {}
    for name, out in (("q", WIDTH), ("k", narrow), ("v", narrow)):
        adapter |= {name + "_a": (WIDTH, 2), name + "_b": (2, out)}
    remat = jax.checkpoint
    saved = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    return {
        "gpt, tied": (gpt, draw(gpt_shapes(), 2, dtype)),
        "llama, untied": (llama, listed),
        "llama, checkpointed": (functools.partial(llama, wrap=remat), listed),
        "llama, scanned": (scanned, stacked),
        "llama, scanned and checkpointed": (functools.partial(scanned, wrap=remat), stacked),
        "llama, scanned, dots saved": (functools.partial(scanned, wrap=saved), stacked),
        "llama, jitted": (jax.jit(scanned), stacked),
        "low-rank adapters": (functools.partial(lora, base=listed), draw([adapter] * LAYERS, 3, dtype)),
    }
