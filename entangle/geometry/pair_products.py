"""How the exact products of a pair's two gradients are formed, from what the backward of one place sees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from entangle.geometry.meshes import summed_where_it_lies
from entangle.geometry.products import contract, widened


class PairProducts:
    """The three products of every pair, ``[B, 3]``: chosen, rejected, chosen with rejected."""

    def dense(self, inputs: jax.Array, cotangents: jax.Array, precision: Any) -> jax.Array:
        """Gram form: two ``T x T`` matrices a product, no gradient is formed."""
        return _gram_products(precision)(inputs, cotangents)

    def lookup(self, ids: jax.Array, valid: jax.Array, cotangents: jax.Array, link: jax.Array | None) -> jax.Array:
        """Products of cotangents at equal ids, and twice those with the tied head where there is one."""

        def same(left: int, right: int) -> jax.Array:
            equal = (
                (ids[:, left, :, None] == ids[:, right, None, :]) & valid[:, left, :, None] & valid[:, right, None, :]
            )
            return jnp.sum(
                jnp.where(equal, contract("btd,bsd->bts", cotangents[:, left], cotangents[:, right]), 0), (1, 2)
            )

        products = jnp.stack([same(0, 0), same(1, 1), same(0, 1)], -1)
        if link is None:
            return products
        cross = jnp.einsum("bitd,bijtd->bij", widened(cotangents), link)
        return products + _three(cross + jnp.swapaxes(cross, 1, 2))

    def rows(self, gradients: jax.Array) -> jax.Array:
        """Sums of products of the two gradients' entries."""
        chosen, rejected = (widened(gradients[:, side]) for side in (0, 1))
        pairs = ((chosen, chosen), (rejected, rejected), (chosen, rejected))
        # no reshape: an axis that is sharded stays one, and only the sums are sent around
        return jnp.stack([jnp.sum(left * right, tuple(range(1, left.ndim))) for left, right in pairs], -1)


@functools.cache
def _gram_products(precision: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return summed_where_it_lies(
        lambda inputs, cotangents: _gram_of_both(inputs, cotangents, precision),
        lambda inputs, cotangents: _gram_on_tpu(inputs, cotangents, precision),
    )


def _gram_on_tpu(inputs: jax.Array, cotangents: jax.Array, precision: Any) -> jax.Array:
    # The same matrices with their sides as axes of their own: the compiler for TPUs then multiplies the two and adds up
    # where the second is made, and writes neither. The one for CPUs would transpose copies of what they are made from.
    left, right = (contract("breik,bsejk->berisj", a, a, precision=precision) for a in (inputs, cotangents))
    return _three(jnp.sum(left * right, (1, 3, 5)))


def _gram_of_both(inputs: jax.Array, cotangents: jax.Array, precision: Any) -> jax.Array:
    def matrix(array: jax.Array) -> jax.Array:
        # Of both sides at once, ``[B, E, 2T, 2T]``: one greater product of what lies side by side takes less time than
        # three products of slices, of which XLA makes transposed copies.
        both = jnp.moveaxis(array, 1, 2)
        both = both.reshape(*both.shape[:2], -1, both.shape[-1])
        return contract("beik,bejk->beij", both, both, precision=precision)

    products = matrix(inputs) * matrix(cotangents)
    b, e, t = inputs.shape[0], inputs.shape[2], inputs.shape[3]
    return _three(jnp.sum(products.reshape(b, e, 2, t, 2, t), (1, 3, 5)))


def _three(products: jax.Array) -> jax.Array:
    """Chosen, rejected, chosen with rejected ``[B, 3]``, of what every side has with every side, ``[B, 2, 2]``."""
    return jnp.stack([products[:, 0, 0], products[:, 1, 1], products[:, 0, 1]], -1)
