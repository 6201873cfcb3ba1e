"""What changes on a mesh: products whose sums alone are sent around, and models inside of which every axis is Auto."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def summed_where_it_lies(
    local: Callable[[jax.Array, jax.Array], jax.Array], on_tpu: Callable[[jax.Array, jax.Array], jax.Array]
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A function of all pairs' inputs and cotangents to which every device adds the share of the features it has.

    Left alone, XLA adds up the ``T x T`` matrices inside of the function over the devices. As the function is a sum over
    one side's features for whatever the other side is, the sum over devices can come last: of one number a product.
    On TPUs it is left alone all the same, for there ``custom_partitioning`` does not compile (jax 0.10, its issue 38196):
    matrices are added up where features are divided, as by tensor parallelism, and nothing where only pairs are.

    Args:
      local: of inputs ``[B, R, E, T, I]`` and cotangents ``[B, R, E, T, O]`` to ``[B, P]``; a sum over parts of E, over
        parts of I and over parts of O.
      on_tpu: the same, as TPUs take least time for it.

    Returns:
      The same function; differentiable, and under ``vmap``, as ``local`` is.
    """
    partitioned = custom_partitioning(local)

    def partition(mesh: Any, arguments: Sequence[Any], result: Any) -> tuple[Any, ...]:
        specs = [(*a.sharding.spec, *(None,) * (5 - len(a.sharding.spec))) for a in arguments]
        pairs, side_by_side, left, right = _once(specs[0][0], specs[0][2], specs[0][4], specs[1][4])
        over = (*side_by_side, *left, *right)

        def lower(inputs: jax.Array, cotangents: jax.Array) -> jax.Array:
            # under an Explicit mesh the parts would be typed by it, which is nothing that one device's code can be
            with automatic_mesh() as cast:
                found = local(cast(inputs), cast(cotangents))
                return jax.lax.psum(found, over) if over else found

        lie = [NamedSharding(mesh, P(pairs, None, side_by_side, None, features)) for features in (left, right)]
        return mesh, lower, NamedSharding(mesh, P(pairs, None)), tuple(lie)

    partitioned.def_partition(partition, sharding_rule="b r e t i, b r e t o -> b p")

    @custom_vmap
    def batchable(inputs: jax.Array, cotangents: jax.Array) -> jax.Array:
        if AxisType.Manual in _axis_types():  # inside jax.shard_map arrays are parts already
            return jax.lax.platform_dependent(inputs, cotangents, tpu=on_tpu, default=local)
        return jax.lax.platform_dependent(inputs, cotangents, tpu=on_tpu, default=partitioned)

    @batchable.def_vmap
    def rule(size: int, mapped: Sequence[bool], *arrays: jax.Array) -> tuple[jax.Array, bool]:
        return jax.vmap(local, in_axes=tuple(0 if m else None for m in mapped), axis_size=size)(*arrays), True

    differentiable = jax.custom_jvp(batchable)
    differentiable.defjvp(lambda primals, tangents: jax.jvp(local, primals, tangents))
    return differentiable


def _once(*entries: Any) -> list[tuple[str, ...]]:
    """Names of mesh axes in entries of a PartitionSpec, every axis where it comes first."""
    seen: set[str] = set()
    found = []
    for entry in entries:
        names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        found.append(tuple(name for name in names if name not in seen))
        seen.update(names)
    return found


@contextlib.contextmanager
def automatic_mesh() -> Iterator[Callable[[Any], Any]]:
    """The current mesh with every axis Auto; yields the function that casts a pytree of arrays to it, as they lie."""
    mesh = jax.sharding.get_abstract_mesh()
    if not has_explicit_axes():
        yield lambda tree: tree
        return
    auto = mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    with jax.sharding.use_abstract_mesh(auto):
        yield lambda tree: jax.tree.map(lambda a: jax.sharding.reshard(a, NamedSharding(auto, P())), tree)


def has_explicit_axes() -> bool:
    """Whether arrays are typed by how they lie: the current mesh has Explicit axes, outside of ``jax.shard_map``."""
    return AxisType.Explicit in _axis_types() and AxisType.Manual not in _axis_types()


def _axis_types() -> tuple[AxisType, ...]:
    return jax.sharding.get_abstract_mesh().axis_types


def automatic(function: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
    """A function inside of which every axis of the mesh is Auto, so that code without a word on shardings will do.

    Args:
      function: of arrays.
      out_specs: PartitionSpecs of its results, used where the mesh has Explicit axes.
    """
    return jax.sharding.auto_axes(function, out_sharding=out_specs) if has_explicit_axes() else function


def pair_spec(batch: Any) -> Any:
    """How the leading axis of a batch lies on the mesh: an entry of a PartitionSpec; None where axes are Auto."""
    spec = jax.typeof(jax.tree.leaves(batch)[0]).sharding.spec
    return spec[0] if len(spec) else None


def placed(array: jax.Array, spec: P) -> jax.Array:
    """An array that lies so, where the mesh has Explicit axes."""
    return jax.sharding.reshard(array, spec) if has_explicit_axes() else array
