"""Inner products of gradient pytrees: written here and nowhere else, accumulated in float32 or better."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from entangle.geometry.meshes import automatic, placed
from entangle.types import PairGeometry, PairGradients, Params


def accumulator_dtype(tree: Params) -> jnp.dtype:
    """The dtype in which products of this tree's leaves are summed: float32, or float64 where a leaf is float64.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.geometry.products import accumulator_dtype
      >>> accumulator_dtype({"w": jnp.ones(2, jnp.bfloat16)})
      dtype('float32')
    """
    # named, not promoted: under JAX's strict promotion bfloat16 has no path to float32
    wide = any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(tree))
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def contract(spec: str, *operands: jax.Array, precision: Any = None) -> jax.Array:
    """``jnp.einsum``, of the accumulator's dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.geometry.products import contract
      >>> rows = jnp.ones((2, 3), jnp.bfloat16)
      >>> contract("ni,mi->nm", rows, rows)
      Array([[3., 3.],
             [3., 3.]], dtype=float32)
    """
    return jnp.einsum(spec, *operands, precision=precision, preferred_element_type=accumulator_dtype(operands))


def widened(array: jax.Array) -> jax.Array:
    """An array in the dtype in which its products are summed."""
    return array.astype(accumulator_dtype(array))


def inner_product(left: Params, right: Params, *, leading_axes: int = 0) -> jax.Array:
    """Euclidean inner product of two pytrees of one structure.

    Args:
      left: pytree of arrays, real and floating.
      right: pytree of the same structure and shapes.
      leading_axes: so many leading axes, of one shape in all leaves, are kept: there is a product for each of their indices.

    Returns:
      A scalar, or an array of the leading axes' shape, of the accumulator's dtype: bfloat16 leaves are widened before they
      are multiplied.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> geometry.inner_product({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -1.0])})
      Array(1., dtype=float32)
    """
    dtype = accumulator_dtype((left, right))

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        if not a.dtype == b.dtype == dtype:
            a, b = (_read_alone((a,)) * 2) if a is b else _read_alone((a, b))
        kept = jnp.sum(a.astype(dtype) * b.astype(dtype), axis=tuple(range(leading_axes, a.ndim)))
        # a few numbers, whose leaves may lie in parts along different axes of the mesh
        return placed(kept, PartitionSpec()) if leading_axes else kept

    products = jax.tree.leaves(jax.tree.map(product, left, right))
    return _added(products) if products else jnp.zeros((), dtype)


def _read_alone(leaves: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    # For CPUs XLA widens a leaf once for all products that read it, and keeps the copy, which is twice as large; where each
    # has the leaf for itself, it widens in passing. Accelerators fuse the products, and should.
    return jax.lax.platform_dependent(leaves, cpu=jax.lax.optimization_barrier, default=lambda leaves: leaves)


def gram(gradients: PairGradients, *, leading_axes: int = 0) -> PairGeometry:
    """The 2x2 Gram matrix of two gradients.

    Args:
      gradients: two pytrees of one structure.
      leading_axes: as for :func:`inner_product`.

    Returns:
      PairGeometry of scalars, or of arrays of the leading axes' shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> from entangle.types import PairGradients
      >>> s = geometry.gram(PairGradients({"w": jnp.array([3.0, 0.0])}, {"w": jnp.array([1.0, 1.0])}))
      >>> float(s.chosen_sq_norm), float(s.rejected_sq_norm), float(s.inner_product)
      (9.0, 2.0, 3.0)
    """
    chosen, rejected = gradients
    pairs = (chosen, chosen), (rejected, rejected), (chosen, rejected)
    return PairGeometry(*(inner_product(a, b, leading_axes=leading_axes) for a, b in pairs))


def row_products(rows: Params, tree: Params) -> jax.Array:
    """Inner products of N pytrees, stacked along a leading axis, with one.

    Args:
      rows: pytree of arrays ``[N, ...]``.
      tree: pytree of the same structure, arrays ``[...]``.

    Returns:
      ``[N]``, of the accumulator's dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.geometry.products import row_products
      >>> row_products({"w": jnp.array([[1.0, 2.0], [0.0, 1.0]])}, {"w": jnp.array([1.0, -1.0])}).tolist()
      [-1.0, -1.0]
    """
    dtype = accumulator_dtype((rows, tree))
    return _added(jax.tree.leaves(jax.tree.map(lambda a, b: _contracted(a, b[None], dtype)[:, 0], rows, tree)))


def row_gram(rows: Params) -> jax.Array:
    """The Gram matrix of N pytrees that are stacked along a leading axis.

    Args:
      rows: pytree of arrays ``[N, ...]``.

    Returns:
      ``[N, N]``, of the accumulator's dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> geometry.row_gram({"w": jnp.array([[1.0, 2.0], [0.0, 1.0]])}).tolist()
      [[5.0, 2.0], [2.0, 1.0]]
    """
    dtype = accumulator_dtype(rows)
    products = [_contracted(leaf, leaf, dtype) for leaf in jax.tree.leaves(rows)]
    if not products:
        raise ValueError("row_gram: the tree is empty, so the number of rows is not known")
    return _added(products)


def _added(products: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, products)


def _contracted(left: jax.Array, right: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """All axes but the first summed over: ``[N, ...]`` and ``[M, ...]`` to ``[N, M]``."""
    axes = tuple(range(1, left.ndim))

    def contract(left: jax.Array, right: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            left.astype(dtype), right.astype(dtype), ((axes, axes), ((), ())), precision=jax.lax.Precision.HIGHEST
        )

    # sums over parts on different devices have to be asked for where axes are Explicit
    return automatic(contract, PartitionSpec())(left, right)
