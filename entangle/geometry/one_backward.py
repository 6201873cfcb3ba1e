"""One forward and one backward for the training gradient of any margin objective and the exact geometry of every pair.

The model is a plain function: its program is read once (``uses``), every place where a parameter meets a row is replaced
by an operation whose backward gives that place's products, too (``taps``), and the whole is differentiated as usual.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import primitives
from jax.sharding import PartitionSpec as P

from entangle.geometry import meshes, taps, uses
from entangle.geometry.products import accumulator_dtype
from entangle.geometry.taps import PairProducts, Products, Weight
from entangle.geometry.uses import COPY_LIMIT, Dense, Lookup, Place, Scope
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
) -> tuple[jax.Array, PullBack]:
    """Log-probabilities of a batch, and the pull-back to the training gradient and the exact geometry of every pair.

    One backward gives both, whatever the coefficients are: they weigh the rows only where a parameter's gradient is
    summed, while the geometry is that of the log-probabilities themselves. Pull back twice for a rule that needs the
    geometry before it can name the coefficients; the forward is not repeated.

    ``log_prob_fn`` is traced for one row and mapped over rows, so nothing in it may depend on other rows, and with random
    numbers inside every row draws the same ones. Any pure function will do, with ``jax.jit``, ``jax.lax.scan`` over
    stacked layers and ``jax.checkpoint`` inside. :func:`parameter_uses` tells which exact form is taken for each
    parameter.

    Args:
      log_prob_fn: pure function of params and a batch of leaves ``[B, R, ...]`` to ``[B, R]``, row by row (LogProbFn).
      params: pytree of trainable arrays; what is frozen is closed over, or part of the batch.
      batch: pytree of arrays with leading axes ``[B, 2]``, for example a PairBatch.
      apart: return the two gradients apart, as PairGradients, in the place of their difference.
      per_parameter: return a tree like params of PairGeometry in the place of the sum, see :func:`total`.
      copy_limit: largest parameter, in numbers, of which every row is given a copy where no shorter form is known.

    Returns:
      Log-probabilities ``[B, 2]``, and a function of the coefficients d_w ``[B]`` and d_l ``[B]``, of any sign, that
      returns ``mean(d_l g_l - d_w g_w)`` (or PairGradients of ``mean(d_w g_w)`` and ``mean(d_l g_l)``) and PairGeometry
      of fields ``[B]``, float32 (float64 for float64 parameters). Under ``per_parameter`` a parameter that a scan runs
      over has fields ``[L, B]``.

    Raises:
      ValueError: batch or log_prob_fn have other shapes than these.
      UnsupportedModelError: a parameter is used in a way whose products have no known short form, and it is larger than
        ``copy_limit``. :func:`scan_geometry` is exact for every model.

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
    pairs = _pairs(batch)
    program = Program(log_prob_fn, params, batch, copy_limit)
    dtype = program.dtype
    runner = Runner(program.places, PairProducts(), lambda sizes: by_rows(*sizes, with_gradient=True))

    def forward(batch: Any, copies: tuple[Params, ...], probes: Mapping[int, jax.Array], scale: jax.Array) -> Any:
        return program.run_rows(runner, copies, batch, probes, scale)

    rows = P(meshes.pair_spec(batch), None)
    forward = functools.partial(meshes.automatic(forward, (rows, rows)), batch)
    copies = (params, params) if apart else (params,)
    probes = {
        n: meshes.placed(zeros, P(*(None,) * (zeros.ndim - 2), *rows)) for n, zeros in program.probes(pairs, 3).items()
    }
    unscaled = meshes.placed(jnp.zeros((pairs, 2), dtype), rows)
    (log_probs, _), pull = jax.vjp(forward, copies, probes, unscaled)

    def pull_back(d_w: jax.Array, d_l: jax.Array) -> tuple[Any, Any]:
        scale = jnp.stack([d_w if apart else -d_w, d_l], axis=1).astype(dtype) / pairs
        gradients, found, _ = pull((jnp.ones_like(log_probs), meshes.placed(scale, rows)))
        tree = program.per_parameter(found, pairs)
        return PairGradients(*gradients) if apart else gradients[0], tree if per_parameter else total(tree)

    return log_probs, pull_back


def pair_geometry(
    log_prob_fn: LogProbFn,
    params: Params,
    batch: Any,
    *,
    batch_size: int | None = None,
    per_parameter: bool = False,
    copy_limit: int = COPY_LIMIT,
) -> Any:
    """Exact ``|g_w|^2``, ``|g_l|^2`` and ``<g_w, g_l>`` of every pair, without any gradient of the parameters' size.

    Args:
      log_prob_fn: see :func:`vjp_with_geometry`.
      params: pytree of trainable arrays.
      batch: pytree of arrays with leading axes ``[B, 2]``, for example a PairBatch.
      batch_size: pairs at a time, which bounds memory. None takes all at once.
      per_parameter: see :func:`vjp_with_geometry`.
      copy_limit: see :func:`vjp_with_geometry`.

    Returns:
      PairGeometry of fields ``[B]``, float32 (float64 for float64 parameters), or a tree of them.

    Raises:
      UnsupportedModelError: see :func:`vjp_with_geometry`.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry
      >>> features = jnp.array([[[1.0, 0.0], [1.0, 1.0]]])
      >>> geometry.pair_geometry(lambda params, x: x @ params, jnp.zeros(2), features).inner_product
      Array([1.], dtype=float32)
    """

    def some(batch: Any) -> Any:
        _, pull_back = vjp_with_geometry(log_prob_fn, params, batch, per_parameter=per_parameter, copy_limit=copy_limit)
        unused = jnp.zeros(_pairs(batch))
        return pull_back(unused, unused)[1]

    pairs = _pairs(batch)
    if batch_size is None or batch_size >= pairs:
        return some(batch)
    whole = pairs // batch_size * batch_size
    chunks = jax.tree.map(lambda a: a[:whole].reshape(-1, batch_size, *a.shape[1:]), batch)
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
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, PairGeometry))
    groups: dict[str, list[PairGeometry]] = {}
    for path, leaf in leaves:
        groups.setdefault(group(jax.tree_util.keystr(path, simple=True, separator="/")), []).append(leaf)
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

    Gram form takes ``6 T^2 (I + O)`` operations a pair. Row gradients take ``4 T I O``, which a training step spends
    anyway; then they cost memory traffic, as much as half of that by measurement (``scripts/benchmark geometry_step``).

    Args:
      e: weights that are applied side by side.
      t: positions.
      i: input width.
      o: output width.
      with_gradient: whether the weight's gradient is wanted, too.
    """
    return 3 * t * (i + o) >= (1 if with_gradient else 2) * i * o


def _pairs(batch: Any) -> int:
    return jax.tree.leaves(batch)[0].shape[0]


class Program:
    """A model's program for one row, and the places where its parameters meet the row."""

    def __init__(
        self,
        log_prob_fn: Callable[[Params, Any], jax.Array],
        params: Params,
        batch: Any,
        copy_limit: int,
        ndim: int = 0,
    ) -> None:
        """Trace and plan; ``ndim`` is the rank of what the model returns for one row."""
        shapes = {leaf.shape[:2] for leaf in jax.tree.leaves(batch)}
        if len(shapes) != 1 or any(len(shape) < 2 or shape[1] != 2 for shape in shapes):
            raise ValueError(f"batch: every array needs the leading axes [B, 2] of B pairs, got {sorted(shapes)}")
        named, self.tree = jax.tree_util.tree_flatten_with_path(params)
        self.names = ["params" + jax.tree_util.keystr(path) for path, _ in named]
        self.dtype = accumulator_dtype(params)

        def row_fn(params: Params, row: Any) -> jax.Array:
            return log_prob_fn(params, jax.tree.map(lambda leaf: leaf[None, None], row))[0, 0]

        shape_of = lambda leaf, lead: jax.ShapeDtypeStruct(leaf.shape[lead:], leaf.dtype)  # noqa: E731
        arguments = (
            jax.tree.map(lambda leaf: shape_of(leaf, 0), params),
            jax.tree.map(lambda leaf: shape_of(leaf, 2), batch),
        )
        with meshes.automatic_mesh():
            self.closed = uses.flat_jaxpr(row_fn, *arguments)
        shape = self.closed.out_avals[0].shape
        if len(shape) != ndim:
            raise ValueError(
                f"log_prob_fn: {'a number' if ndim == 0 else '[T]'} is needed for each row, got shape {shape}"
            )
        self.scope, self.places = uses.find_uses(self.closed.jaxpr, self.names, copy_limit)

    def probes(self, *shape: int) -> dict[int, jax.Array]:
        """A zero array for every place: of the given shape, behind the lengths of the scans around the place."""
        return {number: jnp.zeros((*place.lengths, *shape), self.dtype) for number, place in enumerate(self.places)}

    def run_rows(
        self,
        runner: Runner,
        copies: tuple[Params, ...],
        batch: Any,
        probes: Mapping[int, jax.Array],
        scale: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """The model's results for rows with leading axes ``[B, 2]``, and scale ``[B, 2]`` as it came in."""
        weights = [Weight(leaves) for leaves in zip(*map(jax.tree.leaves, copies), strict=True)]

        def run(row: Any, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
            values = [*weights, *jax.tree.leaves(row)]
            (result,), scale = runner.run(self.scope, self.closed.consts, values, probes, scale)
            return result, scale

        return jax.vmap(jax.vmap(run))(batch, scale)

    def per_parameter(self, found: Mapping[int, jax.Array], pairs: int) -> Any:
        """A tree of PairGeometry from what every place found, ``[..., B, 3]``."""
        leaves = []
        for leaf in range(len(self.names)):
            arrays = [found[number] for number, place in enumerate(self.places) if place.leaf == leaf]
            if len({array.shape for array in arrays}) > 1:  # in a scan here, outside of it there
                arrays = [array.reshape(-1, pairs, 3).sum(0) for array in arrays]
            whole = functools.reduce(jnp.add, arrays) if arrays else jnp.zeros((pairs, 3), self.dtype)
            leaves.append(PairGeometry(whole[..., 0], whole[..., 1], whole[..., 2]))
        return jax.tree.unflatten(self.tree, leaves)


class Runner:
    """Evaluates a planned program on one row."""

    def __init__(self, places: Sequence[Place], products: Products, by_rows: Callable[[tuple[int, ...]], bool]) -> None:
        """See ``taps`` for products; ``by_rows`` tells which dense places form row gradients, from E, T, I and O."""
        self.places, self.products, self.by_rows = places, products, by_rows

    def run(
        self,
        scope: Scope,
        consts: Iterable[Any],
        values: Iterable[Any],
        probes: Mapping[int, jax.Array],
        scale: jax.Array,
    ) -> tuple[list[Any], jax.Array]:
        """Results of a scope and scale; parameters come in as Weight, and stay so until they meet the row."""
        environment: dict[Any, Any] = {}
        links: dict[int, taps.Link] = {}

        def write(variables: Iterable[Any], values: Iterable[Any], scale: jax.Array) -> jax.Array:
            for var, value in zip(variables, values, strict=True):
                if var in scope.copies:
                    value, scale = taps.copy(self.products, value, probes[scope.copies[var]], scale)
                environment[var] = value
            return scale

        scale = write((*scope.jaxpr.constvars, *scope.jaxpr.invars), (*consts, *values), scale)
        for index, eqn in enumerate(scope.jaxpr.eqns):
            if index not in scope.live:
                continue
            inputs = [uses.read(environment, atom) for atom in eqn.invars]
            plan = scope.equations.get(index)
            if isinstance(plan, Dense):
                link = None if plan.tied is None else links[plan.tied]
                result, scale = self._dense(eqn, plan, inputs, probes[plan.place], scale, link)
                results = [result]
            elif isinstance(plan, Lookup):
                result, scale, links[index] = self._lookup(eqn, plan, inputs, probes[plan.place], scale)
                results = [result]
            elif isinstance(plan, Scope):
                results, scale = self._inner(eqn, plan, inputs, probes, scale)
            else:
                results = _apply(eqn, inputs)
            scale = write(eqn.outvars, results, scale)
        return [uses.read(environment, atom) for atom in scope.jaxpr.outvars], scale

    def _dense(
        self, eqn: Any, plan: Dense, inputs: Sequence[Any], probe: jax.Array, scale: jax.Array, link: taps.Link | None
    ) -> tuple[jax.Array, jax.Array]:
        side = plan.axes.side

        def dot(x: jax.Array, u: jax.Array) -> jax.Array:
            (result,) = uses.bind(eqn, (x, u) if side else (u, x))
            return result

        rows = link is None and self.by_rows(self.places[plan.place].sizes)
        return taps.dense(dot, plan.axes, self.products, rows, inputs[1 - side], inputs[side], probe, scale, link)

    def _lookup(
        self, eqn: Any, plan: Lookup, inputs: Sequence[Any], probe: jax.Array, scale: jax.Array
    ) -> tuple[jax.Array, jax.Array, Any]:
        def gather(table: jax.Array, indices: jax.Array) -> jax.Array:
            (result,) = uses.bind(eqn, (table, indices))
            return result

        table, indices = inputs
        ids, valid = uses.read_ids(eqn, indices)
        return taps.lookup(gather, self.products, indices, ids, valid, table, probe, scale, plan.tied)

    def _inner(
        self, eqn: Any, plan: Scope, inputs: Sequence[Any], probes: Mapping[int, jax.Array], scale: jax.Array
    ) -> tuple[list[Any], jax.Array]:
        mine = {number: probes[number] for number in _places_in(plan)}
        if eqn.primitive is primitives.scan_p:
            consts = eqn.params["jaxpr"].consts
            body = lambda values, scale, probes: self.run(plan, consts, values, probes, scale)  # noqa: E731
            return uses.run_scan(eqn, inputs, body, scale, mine)
        return uses.run_checkpointed(eqn, (inputs, mine, scale), lambda given: self.run(plan, (), *given))


def _places_in(scope: Scope) -> list[int]:
    places = set(scope.copies.values())
    for plan in scope.equations.values():
        places.update(_places_in(plan) if isinstance(plan, Scope) else [plan.place])
    return sorted(places)


def _apply(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """Apply an equation that no parameter meets a row in."""
    if not any(isinstance(value, Weight) for value in inputs):
        return uses.bind(eqn, inputs)
    (weight,) = inputs
    if eqn.primitive is primitives.stop_gradient_p:
        return uses.bind(eqn, weight.copies[:1])
    if not uses.is_view(eqn):
        raise AssertionError(f"{eqn.primitive.name} of a parameter was not planned")  # rather than a wrong number
    return [Weight(copies) for copies in zip(*(uses.bind(eqn, [copy]) for copy in weight.copies), strict=True)]
