"""A model's program for one row, planned place by place, and its run on all rows of a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import primitives

from entangle import jaxprs
from entangle.geometry import independence, meshes, taps, uses, views
from entangle.geometry.dense_axes import DenseForm
from entangle.geometry.pairs import count_pairs
from entangle.geometry.plan import Dense, Lookup, Place, Scope
from entangle.geometry.products import accumulator_dtype
from entangle.geometry.taps import Products, Weight
from entangle.types import PairGeometry, Params

SpmdAxisName = str | tuple[str, ...] | None


def _parameter_names(named: Sequence[tuple[Any, Any]]) -> list[str]:
    """Names of leaves with their paths, if there are any and all of them are floating arrays."""
    names = ["params" + jax.tree_util.keystr(path) for path, _ in named]
    if not names:
        raise ValueError("params: at least one array is needed")
    for name, (_, leaf) in zip(names, named, strict=True):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            kind = type(leaf).__name__ if dtype is None else f"an array of dtype {dtype}"
            raise ValueError(f"{name}: a floating array is needed, got {kind}; close over what is not trained")
    return names


def _check_result(result: Any, lead: tuple[int, ...], ndim: int) -> None:
    """Whether what a model returns for rows with these leading axes has a number (or ``[T]``) for each of them."""
    shape = getattr(result, "shape", None)
    if shape is None:
        raise ValueError(f"log_prob_fn: an array is needed, got {type(result).__name__}")
    if not jnp.issubdtype(result.dtype, jnp.floating):
        raise ValueError(f"log_prob_fn: floating numbers are needed, got {result.dtype}")
    if shape[:2] == lead and len(shape) == 2 + ndim:
        return
    wanted = f"{lead}" if ndim == 0 else f"({lead[0]}, {lead[1]}, T)"
    hint = "; arrays of the whole batch that it closes over belong into the batch" if lead == (1, 1) else ""
    raise ValueError(f"log_prob_fn: shape {wanted} is needed for {lead[0]} by {lead[1]} rows, got {shape}{hint}")


class Program:
    """A model's program for one row, and the places where its parameters meet the row."""

    def __init__(
        self,
        log_prob_fn: Callable[[Params, Any], jax.Array],
        params: Params,
        batch: Any,
        copy_limit: int,
        ndim: int = 0,
        spmd_axis_name: SpmdAxisName = None,
    ) -> None:
        """Trace and plan; ``ndim`` is the rank of what the model returns for one row."""
        self.spmd_axis_name = spmd_axis_name
        self.pairs = count_pairs(batch)
        named, self.tree = jax.tree_util.tree_flatten_with_path(params)
        self.names = _parameter_names(named)
        self.dtype = accumulator_dtype(params)

        def checked(params: Params, batch: Any) -> jax.Array:
            result = log_prob_fn(params, batch)
            _check_result(result, jax.tree.leaves(batch)[0].shape[:2], ndim)
            return result

        def row_fn(params: Params, row: Any) -> jax.Array:
            return checked(params, jax.tree.map(lambda leaf: leaf[None, None], row))[0, 0]

        def shapes_of(tree: Any, lead: int) -> Any:
            weak = lambda leaf: bool(getattr(leaf, "weak_type", False))  # noqa: E731
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape[lead:], leaf.dtype, weak_type=weak(leaf)), tree
            )

        with meshes.automatic_mesh():
            whole = jaxprs.flat_jaxpr(checked, shapes_of(params, 0), shapes_of(batch, 0))
            independence.hold_rows_apart(whole, range(len(named), len(whole.jaxpr.invars)))
            self.closed = jaxprs.flat_jaxpr(row_fn, shapes_of(params, 0), shapes_of(batch, 2))
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

        return jax.vmap(jax.vmap(run), spmd_axis_name=self.spmd_axis_name)(batch, scale)

    def per_parameter(self, found: Mapping[int, jax.Array]) -> Any:
        """A tree of PairGeometry from what every place found, ``[..., B, 3]``."""
        leaves = []
        for leaf in range(len(self.names)):
            places = [number for number, place in enumerate(self.places) if place.leaf == leaf]
            arrays = [found[number] for number in places]
            layered = all(self.places[number].layered for number in places)
            if not layered or len({array.shape for array in arrays}) > 1:  # in a scan here, outside of it there
                arrays = [array.reshape(-1, self.pairs, 3).sum(0) for array in arrays]
            whole = functools.reduce(jnp.add, arrays) if arrays else jnp.zeros((self.pairs, 3), self.dtype)
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
        links: Mapping[int, _Linked] = MappingProxyType({}),
    ) -> tuple[list[Any], jax.Array]:
        """Results of a scope and scale; parameters come in as Weight, and stay so until they meet the row.

        Links are those of lookups outside, by the lookup's place.
        """
        environment: dict[Any, Any] = {}
        links = dict(links)

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
            inputs = [jaxprs.read(environment, atom) for atom in eqn.invars]
            plan = scope.equations.get(index)
            if isinstance(plan, Dense):
                link = None if plan.tied is None else self._link(plan, links[plan.tied.lookup])
                result, scale = self._dense(eqn, plan, inputs, probes[plan.place], scale, link)
                results = [result]
            elif isinstance(plan, Lookup):
                result, scale, link = self._lookup(eqn, plan, inputs, probes[plan.place], scale)
                results = [result]
                if link is not None:
                    links[plan.place] = _Linked(link, 0)
            elif isinstance(plan, Scope):
                results, scale = self._inner(eqn, plan, inputs, probes, scale, links)
            else:
                results = _apply(eqn, inputs)
            scale = write(eqn.outvars, results, scale)
        return [jaxprs.read(environment, atom) for atom in scope.jaxpr.outvars], scale

    def _dense(
        self, eqn: Any, plan: Dense, inputs: Sequence[Any], probe: jax.Array, scale: jax.Array, link: taps.Link | None
    ) -> tuple[jax.Array, jax.Array]:
        side = plan.axes.side

        def dot(x: jax.Array, u: jax.Array) -> jax.Array:
            (result,) = jaxprs.bind(eqn, (x, u) if side else (u, x))
            return result

        rows = link is None and self.by_rows(self.places[plan.place].sizes)
        how = DenseForm(plan.axes, rows, eqn.params["precision"])
        return taps.dense(dot, how, self.products, inputs[1 - side], inputs[side], probe, scale, link)

    def _link(self, plan: Dense, linked: _Linked) -> taps.Link:
        """The link of a head that sees some rows of the table, in columns of their own."""
        link, number = linked
        if plan.tied is None or plan.tied.columns is None:
            return link
        columns = jnp.array(plan.tied.columns, jnp.int32)
        found = jnp.take(columns, jnp.where(link.valid, link.ids, 0), mode="clip")
        width = self.places[plan.place].sizes[3]
        here = link.valid & (found >= 0) & (found // width == number)
        return taps.Link(jnp.where(here, found % width, 0), here, link.array)

    def _lookup(
        self, eqn: Any, plan: Lookup, inputs: Sequence[Any], probe: jax.Array, scale: jax.Array
    ) -> tuple[jax.Array, jax.Array, Any]:
        def gather(table: jax.Array, indices: jax.Array) -> jax.Array:
            (result,) = jaxprs.bind(eqn, (table, indices))
            return result

        table, indices = inputs
        ids, valid = uses.read_ids(eqn, indices)
        return taps.lookup(gather, self.products, indices, ids, valid, table, probe, scale, plan.tied)

    def _inner(
        self,
        eqn: Any,
        plan: Scope,
        inputs: Sequence[Any],
        probes: Mapping[int, jax.Array],
        scale: jax.Array,
        links: Mapping[int, _Linked],
    ) -> tuple[list[Any], jax.Array]:
        mine = {number: probes[number] for number in _places_in(plan)}
        taken = {place: links[place] for place in _lookups_outside(plan)}
        if eqn.primitive is not primitives.scan_p:
            return jaxprs.run_checkpointed(eqn, (inputs, mine, scale, taken), lambda given: self.run(plan, (), *given))
        consts, length = eqn.params["jaxpr"].consts, eqn.params["length"]

        def body(values: list[Any], scale: jax.Array, sliced: Any) -> tuple[list[Any], jax.Array]:
            probes, iteration = sliced
            inside = {p: _Linked(one.link, one.iteration * length + iteration) for p, one in taken.items()}
            return self.run(plan, consts, values, probes, scale, inside)

        iterations = jnp.arange(length, dtype=jnp.int32) if taken else None
        return jaxprs.run_scan(eqn, inputs, body, scale, (mine, iterations))


class _Linked(NamedTuple):
    """A lookup's link, and which iteration this is of the scans between the lookup and here."""

    link: taps.Link
    iteration: Any


def _places_in(scope: Scope) -> list[int]:
    places = set(scope.copies.values())
    for plan in scope.equations.values():
        places.update(_places_in(plan) if isinstance(plan, Scope) else [plan.place])
    return sorted(places)


def _lookups_outside(scope: Scope) -> set[int]:
    """Places of the lookups that heads inside are tied to."""
    plans = scope.equations.values()
    heads = {plan.tied.lookup for plan in plans if isinstance(plan, Dense) and plan.tied is not None}
    inside = set().union(*(_lookups_outside(plan) for plan in plans if isinstance(plan, Scope)))
    return (heads | inside) - {plan.place for plan in plans if isinstance(plan, Lookup)}


def _apply(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """Apply an equation that no parameter meets a row in."""
    if not any(isinstance(value, Weight) for value in inputs):
        return jaxprs.bind(eqn, inputs)
    (weight,) = inputs
    if eqn.primitive is primitives.stop_gradient_p:
        return jaxprs.bind(eqn, weight.copies[:1])
    if not views.is_view(eqn):
        raise AssertionError(f"{eqn.primitive.name} of a parameter was not planned")  # rather than a wrong number
    return [Weight(copies) for copies in zip(*(jaxprs.bind(eqn, [copy]) for copy in weight.copies), strict=True)]
