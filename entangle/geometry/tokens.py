"""Inner products between the gradients of single tokens' log-probabilities: one forward, no gradient is ever formed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec as P

from entangle.geometry import meshes
from entangle.geometry.products import accumulator_dtype, contract
from entangle.geometry.program import Program, Runner
from entangle.geometry.uses import COPY_LIMIT
from entangle.types import Params

OUTPUTS_AT_ONCE = 4096


def token_gram(
    token_log_prob_fn: Callable[[Params, Any], jax.Array],
    params: Params,
    pair: Any,
    positions: jax.Array,
    *,
    copy_limit: int = COPY_LIMIT,
) -> jax.Array:
    """Inner products of the gradients of tokens' log-probabilities, within and between the two sides of one pair.

    One forward of the pair, then one pull-back for the n-th tokens of both sides together, all n side by side. Every
    layer's products come from its inputs and the tokens' cotangents, so that no gradient of the parameters' size exists.

    Args:
      token_log_prob_fn: pure function of params and a batch of leaves ``[B, R, ...]`` to the log-probabilities of the
        tokens, ``[B, R, T]``, row by row.
      params: pytree of trainable arrays.
      pair: pytree of arrays with leading axis ``[2]``.
      positions: ``[2, N]`` whole numbers, of N tokens of either side; where a side has fewer, -1, whose gradient is zero.
        Products of a position that no row has are NaN.
      copy_limit: see :func:`entangle.geometry.vjp_with_geometry`.

    Returns:
      ``[2, N, 2, N]``, float32 or float64: entry ``[i, n, j, m]`` is the product of the gradient of token n of side i
      with that of token m of side j.

    Raises:
      ValueError: pair, positions or token_log_prob_fn have other shapes than these.
      UnsupportedModelError: see :func:`entangle.geometry.vjp_with_geometry`.

    References:
      Yuan et al., arXiv 2410.13828, Figure 4b and Theorem 3.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> tokens = jnp.array([[0, 1], [0, 2]])
      >>> unigram = lambda params, tokens: jax.nn.log_softmax(params)[tokens]
      >>> gram = geometry.token_gram(unigram, jnp.zeros(3), tokens, jnp.array([[1], [1]]))
      >>> round(float(gram[0, 0, 1, 0]), 3)  # -1/3 for two tokens of three
      -0.333
    """
    positions = jnp.asarray(positions)
    if positions.ndim != 2 or positions.shape[0] != 2 or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"positions: whole numbers [2, N] are needed, got {positions.dtype} {positions.shape}")
    gram = functools.partial(_token_gram, token_log_prob_fn, copy_limit)
    return meshes.automatic(gram, P())(params, pair, positions)


def _token_gram(
    token_log_prob_fn: Callable[[Params, Any], jax.Array],
    copy_limit: int,
    params: Params,
    pair: Any,
    positions: jax.Array,
) -> jax.Array:
    batch = jax.tree.map(lambda leaf: leaf[None], pair)
    program = Program(token_log_prob_fn, params, batch, copy_limit, ndim=1)
    count, dtype = positions.shape[1], program.dtype
    runner = Runner(program.places, TokenProducts(count), lambda sizes: False)

    def forward(probes: dict[int, jax.Array]) -> jax.Array:
        return program.run_rows(runner, (params,), batch, probes, jnp.zeros((1, 2), dtype))[0]

    log_probs, pull = jax.vjp(forward, program.probes(2, count, 2))
    # [N, 1, 2, T]: the n-th tokens of both sides, which are different rows, go back together
    units = jnp.moveaxis(jax.nn.one_hot(positions, log_probs.shape[-1], dtype=log_probs.dtype), 0, 1)[:, None]
    found = jax.vmap(lambda unit: pull(unit)[0])(units)
    sums = [array.reshape(count, -1, 2, count, 2).sum(1) for array in found.values()]
    gram = jnp.transpose(functools.reduce(jnp.add, sums, jnp.zeros((count, 2, count, 2), dtype)), (1, 0, 3, 2))
    outside = (positions < -1) | (positions >= log_probs.shape[-1])
    return jnp.where(outside[:, :, None, None] | outside[None, None], jnp.nan, gram)


class TokenProducts:
    """Products of every token's gradient with every other's, ``[N, 2, N, 2]`` over N pull-backs of one pair.

    One pull-back's backward sees its own cotangents only, so the products are formed where the pull-backs are mapped
    over: a method is called with one pull-back's cotangents, and its rule under ``vmap`` has those of all.
    """

    def __init__(self, count: int) -> None:
        """Args: count: N."""
        self.count = count

    def dense(self, inputs: jax.Array, cotangents: jax.Array, precision: Any) -> jax.Array:
        """From ``T x T`` products of inputs ``[1, 2, E, T, I]``, and cotangents ``[1, 2, E, T, O]``."""
        return self._over_pulls(functools.partial(_dense_gram, precision=precision), cotangents, inputs)

    def lookup(self, ids: jax.Array, valid: jax.Array, cotangents: jax.Array, link: jax.Array | None) -> jax.Array:
        """From cotangents at equal ids, and those with the tied head."""
        return self._over_pulls(_lookup_gram, (cotangents, link), (ids, valid))

    def rows(self, gradients: jax.Array) -> jax.Array:
        """From the gradients themselves, ``[1, 2, ...]``."""
        return self._over_pulls(_rows_gram, gradients, None)

    def _over_pulls(self, gram: Callable[[Any, Any], jax.Array], one: Any, shared: Any) -> jax.Array:
        """``gram`` of what all pull-backs have in the place of ``one``, and of what they share."""

        @custom_vmap
        def call(one: Any, shared: Any) -> jax.Array:
            # the shape of one pull-back's share; without vmap there is nothing to multiply with
            return jnp.zeros((2, self.count, 2), accumulator_dtype(one))

        @call.def_vmap
        def rule(size: int, mapped: Any, one: Any, shared: Any) -> tuple[jax.Array, bool]:
            assert size == self.count and not any(jax.tree.leaves(mapped[1])), "pull-backs share one forward"
            spread = lambda m, a: a if m else jnp.broadcast_to(a[None], (size, *a.shape))  # noqa: E731
            return gram(jax.tree.map(spread, mapped[0], one), shared), True

        return call(one, shared)


def _dense_gram(cotangents: jax.Array, inputs: jax.Array, precision: Any) -> jax.Array:
    times = functools.partial(contract, precision=precision)
    kernels = times("ietk,jesk->eijts", inputs[0], inputs[0])

    def products(part: jax.Array) -> jax.Array:
        part = part.astype(kernels.dtype)  # products of inputs, rounded, would be forty times as far off
        block = lambda i, j: times(  # noqa: E731
            "neto,meto->nm", part[:, 0, i], times("ets,meso->meto", kernels[:, i, j], part[:, 0, j])
        )
        return _blocks(block)

    # Of a head, the cotangents of all tokens are the largest array of all; a second one of their size is never made.
    outputs = cotangents.shape[-1]
    whole, rest = divmod(outputs, OUTPUTS_AT_ONCE)
    found = products(cotangents[..., outputs - rest :])
    if whole:
        take = functools.partial(jax.lax.dynamic_slice_in_dim, cotangents, slice_size=OUTPUTS_AT_ONCE, axis=-1)
        add = lambda n, sums: sums + products(take(n * OUTPUTS_AT_ONCE))  # noqa: E731
        found = jax.lax.fori_loop(0, whole, add, found)
    return found


def _lookup_gram(every: tuple[jax.Array, jax.Array | None], shared: tuple[jax.Array, jax.Array]) -> jax.Array:
    (cotangents, link), (ids, valid) = every, shared
    cotangents = cotangents.astype(accumulator_dtype(cotangents))

    def block(i: int, j: int) -> jax.Array:
        equal = (ids[0, i, :, None] == ids[0, j, None, :]) & valid[0, i, :, None] & valid[0, j, None, :]
        left, right = cotangents[:, 0, i], cotangents[:, 0, j]
        products = contract("ntd,mtd->nm", left, contract("ts,msd->mtd", equal.astype(right.dtype), right))
        if link is not None:
            products = products + contract("ntd,mtd->nm", left, link[:, 0, i, j])
            products = products + contract("mtd,ntd->nm", right, link[:, 0, j, i])
        return products

    return _blocks(block)


def _rows_gram(gradients: jax.Array, shared: None) -> jax.Array:
    flat = gradients.reshape(gradients.shape[0], 2, -1)
    return contract("nip,mjp->nimj", flat, flat)


def _blocks(block: Callable[[int, int], jax.Array]) -> jax.Array:
    """``[N, 2, N, 2]`` from the blocks ``[N, N]`` of two sides; that of (1, 0) is the transpose of (0, 1)."""
    chosen, cross, rejected = block(0, 0), block(0, 1), block(1, 1)
    return jnp.stack([jnp.stack([chosen, cross], -1), jnp.stack([cross.T, rejected], -1)], 1)
