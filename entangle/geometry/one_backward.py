"""One forward and one backward for the training gradient of any margin objective and the exact geometry of every pair.

The model is a plain function: its program is read once (``uses``), every place where a parameter meets a row is replaced
by an operation whose backward gives that place's products, too (``taps``, ``program``), and the whole is differentiated as
usual.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from entangle.geometry import meshes
from entangle.geometry.pair_products import PairProducts
from entangle.geometry.pairs import count_pairs
from entangle.geometry.plan import Place
from entangle.geometry.program import Program, Runner, SpmdAxisName
from entangle.geometry.uses import COPY_LIMIT
from entangle.paths import named_leaves
from entangle.types import LogProbFn, PairGeometry, PairGradients, Params

PullBack = Callable[[jax.Array, jax.Array], tuple[Any, Any]]


def vjp_with_geometry(
    log_prob_fn: LogProbFn,
    params: Params,
    batch: Any,
    *,
    apart: bool = False,
    per_parameter: bool = False,
    copy_limit: int = COPY_LIMIT,
    spmd_axis_name: SpmdAxisName = None,
) -> tuple[jax.Array, PullBack]:
    """Log-probabilities of a batch, and the pull-back to the training gradient and the exact geometry of every pair.

    One backward gives both, whatever the coefficients are: they weigh the rows only where a parameter's gradient is
    summed, while the geometry is that of the log-probabilities themselves. Pull back twice for a rule that needs the
    geometry before it can name the coefficients; the forward is not repeated.

    ``log_prob_fn`` is traced for one row and mapped over rows, so nothing in it may depend on other rows: a sum over them is
    refused, and a warning says where rows are moved in a way that is not followed (the length of the batch as a Python
    number goes unseen). Random numbers inside are the same for every row. Any pure function will do, with ``jax.jit``,
    ``jax.lax.scan`` over stacked layers and ``jax.checkpoint`` inside. :func:`parameter_uses` tells which exact form is
    taken for each parameter.

    Args:
      log_prob_fn: pure function of params and a batch of leaves ``[B, R, ...]`` to ``[B, R]``, row by row (LogProbFn).
      params: pytree of trainable arrays; what is frozen is closed over, or part of the batch.
      batch: pytree of arrays with leading axes ``[B, 2]``, for example a PairBatch.
      apart: return the two gradients apart, as PairGradients, in the place of their difference.
      per_parameter: return a tree like params of PairGeometry in the place of the sum, see :func:`total`.
      copy_limit: largest parameter, in numbers, of which every row is given a copy where no shorter form is known.
      spmd_axis_name: mesh axes that pairs are divided over, as for ``jax.vmap``: sharding constraints inside of
        ``log_prob_fn`` keep them so, where the mesh has Auto axes.

    Returns:
      Log-probabilities ``[B, 2]``, and a function of the coefficients d_w ``[B]`` and d_l ``[B]``, of any sign, that
      returns ``mean(d_l g_l - d_w g_w)`` (or PairGradients of ``mean(d_w g_w)`` and ``mean(d_l g_l)``) and PairGeometry
      of fields ``[B]``, float32 (float64 for float64 parameters). Under ``per_parameter`` a parameter whose whole leading
      axis one scan runs over has fields ``[L, B]``.

    Raises:
      ValueError: params, batch, log_prob_fn or the coefficients are something else than these, or of other shapes.
      UnsupportedModelError: rows see each other; or a parameter is used in a way whose products have no known short form,
        and it is larger than ``copy_limit``. :func:`scan_geometry` is exact for every model of single rows.

    References:
      Yuan et al., arXiv 2410.13828, section 3, for what the products say. Goodfellow, arXiv 1510.01799, for the norm of
      a row's gradient from a layer's inputs and output cotangents.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> features = jnp.array([[[1.0, 0.0], [1.0, 1.0]]])  # one pair; log pi is linear in params
      >>> log_probs, pull_back = geometry.vjp_with_geometry(lambda params, x: x @ params, jnp.ones(2), features)
      >>> gradient, s = pull_back(jnp.array([1.0]), jnp.array([0.5]))
      >>> gradient.tolist(), float(s.rejected_sq_norm[0]), float(s.inner_product[0])
      ([-0.5, 0.5], 2.0, 1.0)
    """
    program = Program(log_prob_fn, params, batch, copy_limit, spmd_axis_name=spmd_axis_name)
    pairs = program.pairs
    log_probs, pull = _differentiate(program, params, batch, apart=apart, with_gradient=True)

    def pull_back(d_w: jax.Array, d_l: jax.Array) -> tuple[Any, Any]:
        d_w, d_l = (jnp.asarray(d).astype(program.dtype) for d in (d_w, d_l))
        if d_w.shape != (pairs,) or d_l.shape != (pairs,):
            raise ValueError(f"d_w, d_l: a number for each of {pairs} pairs, got {d_w.shape}, {d_l.shape}")
        gradients, tree = pull(jnp.stack([d_w if apart else -d_w, d_l], axis=1) / pairs)
        return PairGradients(*gradients) if apart else gradients[0], tree if per_parameter else total(tree)

    return log_probs, pull_back


def _differentiate(
    program: Program, params: Params, batch: Any, *, apart: bool, with_gradient: bool
) -> tuple[jax.Array, Callable[[jax.Array], tuple[tuple[Params, ...], Any]]]:
    """Log-probabilities, and the pull-back of the rows' weights ``[B, 2]`` to weighted sums and the tree of geometries."""
    runner = Runner(program.places, PairProducts(), lambda sizes: by_rows(*sizes, with_gradient=with_gradient))

    def forward(batch: Any, copies: tuple[Params, ...], probes: Mapping[int, jax.Array], scale: jax.Array) -> Any:
        return program.run_rows(runner, copies, batch, probes, scale)

    rows = P(meshes.pair_spec(batch), None)
    forward = functools.partial(meshes.automatic(forward, (rows, rows)), batch)
    copies = (params, params) if apart else (params,)
    probes = {
        n: meshes.placed(zeros, P(*(None,) * (zeros.ndim - 2), *rows))
        for n, zeros in program.probes(program.pairs, 3).items()
    }
    unscaled = meshes.placed(jnp.zeros((program.pairs, 2), program.dtype), rows)
    (log_probs, _), pull = jax.vjp(forward, copies, probes, unscaled)

    def pull_back(scale: jax.Array) -> tuple[tuple[Params, ...], Any]:
        gradients, found, _ = pull((jnp.ones_like(log_probs), meshes.placed(scale, rows)))
        return gradients, program.per_parameter(found)

    return log_probs, pull_back


def pair_geometry(
    log_prob_fn: LogProbFn,
    params: Params,
    batch: Any,
    *,
    batch_size: int | None = None,
    per_parameter: bool = False,
    copy_limit: int = COPY_LIMIT,
    spmd_axis_name: SpmdAxisName = None,
) -> Any:
    """Exact ``|g_w|^2``, ``|g_l|^2`` and ``<g_w, g_l>`` of every pair, without any gradient of the parameters' size.

    To be called under ``jax.jit``, which leaves out the gradients that nobody asks for.

    Args:
      log_prob_fn: see :func:`vjp_with_geometry`.
      params: pytree of trainable arrays.
      batch: pytree of arrays with leading axes ``[B, 2]``, for example a PairBatch.
      batch_size: pairs at a time, which bounds memory. None takes all at once.
      per_parameter: see :func:`vjp_with_geometry`.
      copy_limit: see :func:`vjp_with_geometry`.
      spmd_axis_name: see :func:`vjp_with_geometry`.

    Returns:
      PairGeometry of fields ``[B]``, float32 (float64 for float64 parameters), or a tree of them.

    Raises:
      ValueError: batch_size is below 1, or as :func:`vjp_with_geometry`.
      UnsupportedModelError: see :func:`vjp_with_geometry`.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> features = jnp.array([[[1.0, 0.0], [1.0, 1.0]]])
      >>> geometry.pair_geometry(lambda params, x: x @ params, jnp.zeros(2), features).inner_product
      Array([1.], dtype=float32)
    """

    def some(batch: Any) -> Any:
        program = Program(log_prob_fn, params, batch, copy_limit, spmd_axis_name=spmd_axis_name)
        _, pull = _differentiate(program, params, batch, apart=False, with_gradient=False)
        tree = pull(jnp.zeros((program.pairs, 2), program.dtype))[1]  # nobody asks for the sums, so jit leaves them out
        return tree if per_parameter else total(tree)

    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: at least 1 pair at a time, got {batch_size}")
    pairs = count_pairs(batch)
    if batch_size is None or batch_size >= pairs:
        return some(batch)
    whole = pairs // batch_size * batch_size
    chunks = jax.tree.map(lambda a: a[:whole].reshape(whole // batch_size, batch_size, *a.shape[1:]), batch)
    # [chunks, ..., b] to [..., chunks b]
    parts = [jax.tree.map(lambda a: jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], whole), jax.lax.map(some, chunks))]
    if whole < pairs:
        parts.append(some(jax.tree.map(lambda a: a[whole:], batch)))
    return jax.tree.map(lambda *a: jnp.concatenate(a, axis=-1), *parts)


def total(tree: Any) -> PairGeometry:
    """The sum over a tree of geometries, over parameters and over scanned layers: geometry is additive.

    Args:
      tree: pytree of PairGeometry with fields ``[B]`` or ``[..., B]``.

    Returns:
      PairGeometry of fields ``[B]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> one, two = (geometry.PairGeometry(*jnp.full((3, *shape), 1.0)) for shape in ((2,), (4, 2)))
      >>> geometry.total({"bias": one, "layers": two}).chosen_sq_norm.tolist()
      [5.0, 5.0]
    """
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, PairGeometry))
    sums = [[field.reshape(-1, field.shape[-1]).sum(0) for field in leaf] for leaf in leaves]
    return PairGeometry(*(functools.reduce(jnp.add, fields) for fields in zip(*sums, strict=True)))


def by_group(tree: Any, group: Callable[[str], str]) -> dict[str, PairGeometry]:
    """Sums over groups of parameters.

    Args:
      tree: what ``per_parameter`` gives.
      group: function of a parameter's path (as ``jax.tree_util.keystr(path, simple=True, separator="/")`` writes it) to
        the name of its group.

    Returns:
      Name to PairGeometry of fields ``[B]``, in the order of the tree.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> s = geometry.PairGeometry(*jnp.ones((3, 1)))
      >>> groups = geometry.by_group({"head": s, "layers": {"0": s, "1": s}}, lambda path: path.split("/")[0])
      >>> {name: s.inner_product.tolist() for name, s in groups.items()}
      {'head': [1.0], 'layers': [2.0]}
    """
    groups: dict[str, list[PairGeometry]] = {}
    for path, leaf in named_leaves(tree, lambda node: isinstance(node, PairGeometry)):
        groups.setdefault(group(path), []).append(leaf)
    return {name: total(members) for name, members in groups.items()}


class ParameterUse(NamedTuple):
    """How one parameter's share of the geometry is computed.

    Attributes:
      parameter: its path.
      form: ``gram`` (two T x T matrices a product), ``rows`` (the row's gradient is formed), ``lookup`` (cotangents at
        equal ids), ``tied lookup`` and ``tied head``, or ``copy`` (the row is given a copy of the parameter).
      where: file, line and function of the model's code, as far as known.
    """

    parameter: str
    form: str
    where: str


def parameter_uses(
    log_prob_fn: LogProbFn, params: Params, batch: Any, *, copy_limit: int = COPY_LIMIT
) -> list[ParameterUse]:
    """Every place where a parameter meets a row, and the exact form that its products take in a training step.

    Nothing is computed: params and batch may be ``jax.ShapeDtypeStruct``. A parameter that is not listed has no gradient.

    Args:
      log_prob_fn: see :func:`vjp_with_geometry`.
      params: pytree of trainable arrays.
      batch: pytree of arrays with leading axes ``[B, 2]``.
      copy_limit: see :func:`vjp_with_geometry`.

    Returns:
      The places in the order of the parameters.

    Raises:
      UnsupportedModelError: see :func:`vjp_with_geometry`.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> model = lambda params, x: jnp.tanh(x @ params["w"]).sum((-1, -2)) + params["b"]
      >>> uses = geometry.parameter_uses(model, {"w": jnp.ones((64, 64)), "b": jnp.zeros(())}, jnp.ones((1, 2, 3, 64)))
      >>> [(use.parameter, use.form) for use in uses]
      [("params['b']", 'copy'), ("params['w']", 'gram')]
    """
    program = Program(log_prob_fn, params, batch, copy_limit)

    def form(place: Place) -> str:
        rows = place.form != "dense" or by_rows(*place.sizes, with_gradient=True)
        return place.form if place.form != "dense" else "rows" if rows else "gram"

    places = sorted(program.places, key=lambda place: place.leaf)
    return [ParameterUse(program.names[place.leaf], form(place), place.where) for place in places]


def by_rows(e: int, t: int, i: int, o: int, *, with_gradient: bool) -> bool:
    """Whether a dense layer's row gradients are formed, rather than two ``T x T`` matrices a product.

    Gram form takes ``8 T^2 (I + O)`` operations a pair. Row gradients take ``4 T I O``, which a training step spends
    anyway; by measurement on CPUs their memory traffic costs a third to two thirds of that.

    Args:
      e: weights that are applied side by side.
      t: positions.
      i: input width.
      o: output width.
      with_gradient: whether the weight's gradient is wanted, too.
    """
    return 3 * t * (i + o) >= (1 if with_gradient else 2) * i * o
