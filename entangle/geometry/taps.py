"""Weight applications whose backward also gives the exact products of the pair's two gradients, layer by layer.

Every operation here stands for one place where a trainable parameter meets the rows of a batch. It computes what the
plain operation computes and has two side channels that its forward ignores:

- ``probe``, a zero array whose cotangent is this place's share of ``|g_w|^2, |g_l|^2, <g_w, g_l>``;
- ``scale``, passed through unchanged, whose cotangent holds one coefficient a row. It weighs the rows where the
  parameter's gradient is summed, and only there: the activations' cotangents stay those of the plain log-probabilities,
  so the products are exact whatever the coefficients are, zero included.

An operation is written for one row; under ``vmap`` over the two sides and then over the pairs it becomes one operation
on ``[B, 2, ...]``, so that models written for any batch need no change. Shape letters below: E batch axes that input and
weight share, T positions, I contracted and O free axes of the weight, all flattened.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from entangle.errors import UnsupportedModelError
from entangle.geometry.dense_axes import DenseForm
from entangle.geometry.pair_products import PairProducts
from entangle.geometry.products import accumulator_dtype, contract, widened

Tree = Any


class Weight(NamedTuple):
    """A trainable parameter, or a view of one, before it meets a row.

    Attributes:
      copies: the same array once, or twice when the gradients of the chosen and the rejected rows are wanted apart.
    """

    copies: tuple[jax.Array, ...]


class Products(Protocol):
    """How a place's products are formed from what its backward sees; one implementation for pairs, one for tokens."""

    def dense(self, inputs: jax.Array, cotangents: jax.Array, precision: Any) -> jax.Array:
        """Products of the gradients ``A^T C``; inputs ``[B, 2, E, T, I]``, cotangents ``[B, 2, E, T, O]``."""
        ...

    def lookup(self, ids: jax.Array, valid: jax.Array, cotangents: jax.Array, link: jax.Array | None) -> jax.Array:
        """Products of scattered rows; ids and valid ``[B, 2, T]``, cotangents ``[B, 2, T, D]``, link see ``lookup``."""
        ...

    def rows(self, gradients: jax.Array) -> jax.Array:
        """Products of gradients at hand, ``[B, 2, ...]``."""
        ...


def row_operation(
    plain: Callable[[Tree, Tree], Tree], batched: Callable[[Tree, Tree], Tree]
) -> Callable[[Tree, Tree], Tree]:
    """An operation on one row that turns into another one under ``vmap`` over sides and then over pairs.

    Args:
      plain: function of what belongs to the row and of what all rows share.
      batched: the same on ``[B, 2, ...]``.

    Returns:
      A function with the signature of ``plain``.
    """

    def spread(size: int, mapped: Tree, rows: Tree) -> Tree:
        return jax.tree.map(lambda m, a: a if m else jnp.broadcast_to(a[None], (size, *a.shape)), mapped, rows)

    def rule(then: Callable[[Tree, Tree], Tree]) -> Callable[[int, Tree, Tree, Tree], tuple[Tree, Tree]]:
        def apply(size: int, mapped: Tree, rows: Tree, shared: Tree) -> tuple[Tree, Tree]:
            if any(jax.tree.leaves(mapped[1])):
                raise UnsupportedModelError("a parameter differs from row to row: the model maps over its parameters")
            out = then(spread(size, mapped[0], rows), shared)
            return out, jax.tree.map(lambda _: True, out)

        return apply

    @custom_vmap
    def pair(rows: Tree, shared: Tree) -> Tree:
        return jax.vmap(plain, in_axes=(0, None))(rows, shared)

    @custom_vmap
    def row(rows: Tree, shared: Tree) -> Tree:
        return plain(rows, shared)

    pair.def_vmap(rule(batched))
    row.def_vmap(rule(pair))
    return row


def _over_rows(function: Callable[..., Tree], **axes: Any) -> Callable[..., Tree]:
    return jax.vmap(jax.vmap(function, **axes), **axes)


def _times(array: jax.Array, weights: jax.Array) -> jax.Array:
    """``array [B, R, ...]`` times ``weights [B, R]``."""
    return array * weights.astype(array.dtype).reshape(*weights.shape, *(1,) * (array.ndim - 2))


def _per_copy(count: int, *arrays: jax.Array) -> list[tuple[jax.Array, ...]]:
    """All rows for one copy; the chosen and the rejected rows for two."""
    return [arrays] if count == 1 else [tuple(a[:, side : side + 1] for a in arrays) for side in (0, 1)]


class Link(NamedTuple):
    """The side channel from a head back to the lookup that it is tied to.

    Attributes:
      ids: token ids of one row, ``[T]``.
      valid: which of them are ids of the table, ``[T]``.
      array: zeros ``[2, T, D]``; its cotangent holds the head's gradient of either side at the ids of this row.
    """

    ids: Any
    valid: Any
    array: Any


def dense(
    dot: Callable[[jax.Array, jax.Array], jax.Array],
    form: DenseForm,
    products: Products,
    x: jax.Array,
    weight: Weight,
    probe: jax.Array,
    scale: jax.Array,
    link: Link | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A row's input times a weight.

    Args:
      dot: ``dot_general`` of input and weight, in this order.
      form: how.
      products: for pairs or for tokens.
      x: one row's input.
      weight: the weight.
      probe: its cotangent are the products.
      scale: passed through.
      link: of the lookup into the same matrix, when the two are tied; the weight's free axis is then the vocabulary.

    Returns:
      The product, and scale.
    """
    axes, by_rows, precision = form

    def plain(rows: Tree, shared: Tree) -> Tree:
        return dot(rows[0], shared[0][0]), rows[1]

    every_row = _over_rows(plain, in_axes=(0, None))
    batched = jax.custom_vjp(every_row)

    def forward(rows: Tree, shared: Tree) -> tuple[Tree, Tree]:
        return every_row(rows, shared), (rows[0], rows[2], shared[0])

    def backward(saved: Tree, cotangents: Tree) -> Tree:
        (x, link, copies), (g, weights) = saved, cotangents
        u = copies[0]
        (to_x,) = _over_rows(jax.linear_transpose(lambda x: dot(x, u), jax.typeof(x).update(shape=x.shape[2:])))(g)
        inputs, outputs = axes.canonical(x, g, u)
        if by_rows:
            found, gradients = _gradients_by_rows(inputs, outputs, weights, len(copies), precision)
            to_weight = tuple(axes.weight_shaped(gradient, u) for gradient in gradients)
        else:
            found = products.dense(inputs, outputs, precision)
            weigh = functools.partial(_weight_gradient, precision=precision)
            sums = (weigh(*rows) for rows in _per_copy(len(copies), inputs, outputs, weights))
            to_weight = tuple(axes.weight_shaped(gradient, u) for gradient in sums)
        to_link = (
            None if link is None else Link(None, None, _head_rows(inputs[:, :, 0], outputs[:, :, 0], link, precision))
        )
        return (to_x, weights, to_link), (to_weight, found)

    batched.defvjp(forward, backward)
    return row_operation(plain, batched)((x, scale, link), (weight.copies, probe))


def _weight_gradient(inputs: jax.Array, outputs: jax.Array, weights: jax.Array, precision: Any) -> jax.Array:
    """The weighted sum of all rows' gradients, ``[E, I, O]``; inputs and outputs as in ``Products.dense``."""
    if inputs.size < outputs.size:
        inputs = _times(inputs, weights)
    else:
        outputs = _times(outputs, weights)
    if inputs.shape[2] == 1:
        # One contracted axis, the first: XLA multiplies as it lies, where several are transposed in memory before.
        inputs, outputs = (array.reshape(-1, array.shape[-1]) for array in (inputs, outputs))
        return contract("ni,no->io", inputs, outputs, precision=precision)[None]
    return contract("breti,breto->eio", inputs, outputs, precision=precision)


def _gradients_by_rows(
    inputs: jax.Array, outputs: jax.Array, weights: jax.Array, copies: int, precision: Any
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Products ``[B, 3]`` and weighted sums ``[E, I, O]``, one pair's two gradients in memory at a time.

    On a mesh it is one pair a device: pairs that lie on different devices are taken together, each device has a sum of its
    own, and only the sums are added up over devices, once.
    """
    pairs = inputs.shape[0]
    together = math.gcd(pairs, max(jax.sharding.get_abstract_mesh().size, 1))

    def group(sums: tuple[jax.Array, ...], rows: Tree) -> Tree:
        x, g, w = rows
        gradients = contract("nreti,nreto->nreio", x, g, precision=precision)
        w = w.astype(gradients.dtype)
        sums_of = [contract("nr,nreio->neio", *rows) for rows in _per_copy(copies, w, gradients)]
        return tuple(s + p for s, p in zip(sums, sums_of, strict=True)), PairProducts().rows(gradients)

    shape = (together, inputs.shape[2], inputs.shape[4], outputs.shape[4])
    zeros = jnp.zeros(shape, accumulator_dtype((inputs, outputs)))
    # pairs of one device are neighbours: [devices, pairs of one] to [pairs of one, devices]
    split = [
        jnp.moveaxis(a.reshape(together, pairs // together, *a.shape[1:]), 1, 0) for a in (inputs, outputs, weights)
    ]
    sums, found = jax.lax.scan(group, (zeros,) * copies, tuple(split))
    return jnp.moveaxis(found, 0, 1).reshape(pairs, 3), tuple(each.sum(0) for each in sums)


def _head_rows(inputs: jax.Array, outputs: jax.Array, link: Link, precision: Any) -> jax.Array:
    """Rows of the head's gradients of both sides (j) at the ids of every row (i): ``[B, 2, 2, T, D]``."""
    ids = jnp.where(link.valid, link.ids, 0)

    def one(ids: jax.Array, valid: jax.Array, outputs: jax.Array, inputs: jax.Array) -> jax.Array:
        taken = jnp.take(outputs, ids, axis=1, mode="clip")  # [S, T]
        return contract("st,sd->td", jnp.where(valid[None], taken, 0), inputs, precision=precision)

    sides = jax.vmap(one, in_axes=(None, None, 0, 0))
    return jax.vmap(jax.vmap(sides, in_axes=(0, 0, None, None)))(ids, link.valid, outputs, inputs)


def lookup(
    gather: Callable[[jax.Array, jax.Array], jax.Array],
    products: Products,
    indices: jax.Array,
    ids: jax.Array,
    valid: jax.Array,
    weight: Weight,
    probe: jax.Array,
    scale: jax.Array,
    tied: bool,
) -> tuple[jax.Array, jax.Array, Link | None]:
    """Rows of a table at a row's ids.

    Args:
      gather: of the table ``[V, D]`` and indices to ``[..., D]``.
      products: for pairs or for tokens.
      indices: of one row, as ``gather`` takes them.
      ids: the same, flattened to ``[T]``: two positions read the same row of the table when theirs are equal.
      valid: ``[T]``, which of them read the table at all.
      weight: the table.
      probe: its cotangent are the products.
      scale: passed through.
      tied: whether the table is also the head.

    Returns:
      The rows, scale, and the link that the head takes when the two are tied.
    """
    width = weight.copies[0].shape[1]
    dtype = accumulator_dtype(weight.copies)

    def plain(rows: Tree, shared: Tree) -> Tree:
        array = jnp.zeros((2, ids.shape[0], width), dtype) if tied else None
        return gather(shared[0][0], rows[0]), rows[3], array

    every_row = _over_rows(plain, in_axes=(0, None))
    batched = jax.custom_vjp(every_row)

    def forward(rows: Tree, shared: Tree) -> tuple[Tree, Tree]:
        return every_row(rows, shared), (*rows[:3], shared[0])

    def backward(saved: Tree, cotangents: Tree) -> Tree:
        (indices, ids, valid, copies), (g, weights, link) = saved, cotangents

        def table_gradient(indices: jax.Array, g: jax.Array, weights: jax.Array) -> jax.Array:
            table = lambda u: _over_rows(lambda i: gather(u, i))(indices)  # noqa: E731
            return jax.linear_transpose(table, copies[0])(_times(g, weights))[0]

        to_table = tuple(table_gradient(*rows) for rows in _per_copy(len(copies), indices, g, weights))
        found = products.lookup(ids, valid, g.reshape(*ids.shape, width), link)
        return (None, None, None, weights), (to_table, found)

    batched.defvjp(forward, backward)
    out, scale, array = row_operation(plain, batched)((indices, ids, valid, scale), (weight.copies, probe))
    return out, scale, Link(ids, valid, array) if tied else None


def copy(products: Products, weight: Weight, probe: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A copy of a parameter for every row, which may then be used in any way and any number of times.

    Its cotangent is the row's whole gradient, so this is exact for every use; it is meant for small parameters.

    Args:
      products: for pairs or for tokens.
      weight: the parameter.
      probe: its cotangent are the products.
      scale: passed through.

    Returns:
      The row's copy, and scale.
    """

    def plain(rows: Tree, shared: Tree) -> Tree:
        return shared[0][0], rows

    def every_row(rows: Tree, shared: Tree) -> Tree:
        return jnp.broadcast_to(shared[0][0], (*rows.shape, *shared[0][0].shape)), rows

    batched = jax.custom_vjp(every_row)

    def forward(rows: Tree, shared: Tree) -> tuple[Tree, Tree]:
        return every_row(rows, shared), shared[0]

    def backward(copies: Tree, cotangents: Tree) -> Tree:
        g, weights = cotangents

        def total(g: jax.Array, weights: jax.Array) -> jax.Array:
            return contract("br...,br->...", widened(g), widened(weights)).astype(copies[0].dtype)

        return weights, (tuple(total(*rows) for rows in _per_copy(len(copies), g, weights)), products.rows(g))

    batched.defvjp(forward, backward)
    return row_operation(plain, batched)(scale, (weight.copies, probe))
