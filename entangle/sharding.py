"""One table of how everything lies on a mesh: logical axes to mesh axes, for parameters, their states and batches of pairs.

A mesh has the axes ``data`` (copies), ``fsdp`` (copies that keep a part of every parameter each) and ``tensor`` (parts of
one product). Pairs lie over the first two. Everything is ``jax.jit`` with shardings: while a mesh of Auto axes is set
(``jax.set_mesh``), decoders and training steps keep activations and gradients as the table says; without one, nothing is said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from entangle.errors import UserError
from entangle.paths import named_leaves

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")
"""Axes of a mesh, in the order of its devices: the last is that of neighbours."""

RULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "pairs": ("data", "fsdp"),
        "embed": ("fsdp",),
        "vocab": ("tensor",),
        "heads": ("tensor",),
        "key_value_heads": ("tensor",),
        "hidden": ("tensor",),
        # what follows lies whole on every device
        "layers": (),
        "positions": (),
        "rank": (),
        "side": (),
        "vector": (),
    }
)
"""Logical axis to the mesh axes that it is divided over."""

_MATRICES: Mapping[str, tuple[str, str]] = {
    "attention/qkv": ("embed", "heads"),
    "attention/query": ("embed", "heads"),
    "attention/key": ("embed", "key_value_heads"),
    "attention/value": ("embed", "key_value_heads"),
    "attention/out": ("heads", "embed"),
    "feed_forward/gate": ("embed", "hidden"),
    "feed_forward/up": ("embed", "hidden"),
    "feed_forward/down": ("hidden", "embed"),
}
_LEAVES: Mapping[str, tuple[str, ...]] = {
    "token_embedding": ("vocab", "embed"),
    "head_embedding": ("vocab", "embed"),
    "position_embedding": ("positions", "embed"),
    "scale": ("vector",),
    **{f"{matrix}/kernel": axes for matrix, axes in _MATRICES.items()},
    **{f"{matrix}/lora_a": (rows, "rank") for matrix, (rows, _) in _MATRICES.items()},
    **{f"{matrix}/lora_b": ("rank", columns) for matrix, (_, columns) in _MATRICES.items()},
    **{f"{matrix}/bias": (c if c != "embed" else "vector",) for matrix, (_, c) in _MATRICES.items()},
    "norm/bias": ("vector",),
}


def make_mesh(sizes: str | Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Lay devices out in a mesh of Auto axes.

    Args:
      sizes: sizes of the axes by name, those left out being 1; as text ``data=2,fsdp=4``.
      devices: all that the mesh is to have; those of all hosts by default.

    Returns:
      The mesh, axes ``AXES``.

    Raises:
      UserError: there is no such axis, a size is no positive whole number, or the sizes' product is not the number of
        devices.

    Example:
      >>> import jax
      >>> from entangle import sharding
      >>> dict(sharding.make_mesh("data=1", jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    named = _parse(sizes) if isinstance(sizes, str) else dict(sizes)
    if unknown := sorted(named.keys() - set(AXES)):
        raise UserError(f"mesh: no axis is called {', '.join(unknown)}: choose from {', '.join(AXES)}")
    if bad := [f"{axis}={size!r}" for axis, size in named.items() if not isinstance(size, int) or size < 1]:
        raise UserError(f"mesh: {', '.join(bad)}: sizes are whole numbers, each at least 1")
    devices = jax.devices() if devices is None else devices
    shape = tuple(named.get(axis, 1) for axis in AXES)
    if (count := math.prod(shape)) != len(devices):
        product = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        every = ", and a mesh has all of them" if count < len(devices) else ""
        raise UserError(f"mesh: {product} needs {count} devices, there are {len(devices)}{every}")
    return Mesh(np.asarray(devices, object).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _parse(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"\s*(\w+)=([1-9]\d*)\s*", part)
        if match is None or match[1] in found:
            raise UserError(f"mesh {text!r}: write sizes of different axes as data=2,fsdp=4, each at least 1")
        found[match[1]] = int(match[2])
    return found


def spec(axes: Sequence[str | None], rules: Mapping[str, tuple[str, ...]] = RULES) -> P:
    """The PartitionSpec of an array from its logical axes; None lies whole.

    Raises:
      ValueError: there is no such logical axis, or one mesh axis would divide two of the array's.

    Example:
      >>> from entangle import sharding
      >>> sharding.spec(("pairs", None, "heads"))
      P(('data', 'fsdp'), None, 'tensor')
      >>> sharding.spec(("pairs", "embed"))
      Traceback (most recent call last):
      ValueError: logical axes ('pairs', 'embed'): mesh axis fsdp would divide two of them
    """
    entries: list[tuple[str, ...]] = []
    for axis in axes:
        if axis is not None and axis not in rules:
            raise ValueError(f"no logical axis is called {axis!r}: choose from {', '.join(rules)}")
        entries.append(() if axis is None else rules[axis])
    names = [name for entry in entries for name in entry]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"logical axes {tuple(axes)}: mesh axis {', '.join(twice)} would divide two of them")
    return P(*((entry[0] if len(entry) == 1 else entry) or None for entry in entries))


def logical_axes(path: str, ndim: int) -> tuple[str, ...] | None:
    """Logical axes of a decoder's parameter, or of what is kept for it in an optimizer's state.

    Args:
      path: with slashes; what comes before the parameter's own path does not count.
      ndim: its number of axes; one more than the table says is that of scanned layers.

    Returns:
      None for what the table does not know, such as step counts.

    Example:
      >>> from entangle import sharding
      >>> sharding.logical_axes("0/mu/layers/attention/query/lora_a", 3)
      ('layers', 'embed', 'rank')
    """
    for name, axes in _LEAVES.items():
        if re.search(rf"(^|[/_]){name}$", path):
            return axes if ndim == len(axes) else ("layers", *axes) if ndim == len(axes) + 1 else None
    return None


def shardings(tree: Any, mesh: Mesh, what: str = "model") -> Any:
    """How parameters, and what is kept for them, lie on a mesh.

    Args:
      tree: pytree of arrays or shapes: parameters of a decoder, or TrainStates of them (anything with ``params``). What is
        kept for a parameter under its path and has its shape, such as a moment, lies as it does. What the table does not
        know, such as step counts, and what has another shape, such as factored moments, lies whole on every device.
      mesh: of :func:`make_mesh`.
      what: named in messages.

    Returns:
      A tree like it of NamedSharding.

    Raises:
      UserError: a mesh axis does not divide an array's axis.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from entangle import sharding
      >>> mesh = sharding.make_mesh("fsdp=1", jax.devices()[:1])
      >>> sharding.shardings({"token_embedding": jnp.zeros((4, 2)), "count": jnp.zeros(())}, mesh)["token_embedding"].spec
      P('tensor', 'fsdp')
    """
    placed = []
    for path, leaf, axes in _with_axes(tree):
        here = spec(axes)
        for size, axis, names in zip(leaf.shape, axes, here, strict=True):
            if size % (parts := _parts(mesh, names)):
                raise UserError(
                    f"{what}: {path}: {axis} of size {size} cannot be divided over {_said(mesh, names)} = {parts} devices"
                )
        placed.append(NamedSharding(mesh, here))
    return jax.tree.unflatten(jax.tree.structure(tree), placed)


def _with_axes(tree: Any) -> Iterator[tuple[str, Any, tuple[str | None, ...]]]:
    """Paths, leaves and their logical axes."""
    for path, node in named_leaves(tree, lambda node: hasattr(node, "params")):
        shapes = {name: leaf.shape for name, leaf in named_leaves(getattr(node, "params", {}))}
        for inner, leaf in named_leaves(node):
            name = "/".join(filter(None, (path, inner)))
            known = not shapes or shapes.get(_parameter_of(inner, shapes)) == leaf.shape
            yield name, leaf, (logical_axes(name, leaf.ndim) if known else None) or (None,) * leaf.ndim


def _parameter_of(path: str, parameters: Container[str]) -> str:
    """The longest end of a path that is a parameter's, or nothing."""
    while path and path not in parameters:
        path = path.partition("/")[2]
    return path


def born_sharded(make: Callable[..., T], mesh: Mesh, *arguments: Any, what: str = "model") -> T:
    """What a function makes, every device making its own part: shapes first, nothing whole on any device.

    Args:
      make: pure function to parameters or a TrainState.
      mesh: see :func:`shardings`.
      arguments: of ``make``.
      what: named in messages.

    Raises:
      UserError: see :func:`shardings`.

    Example:
      >>> import jax
      >>> from entangle import models, sharding
      >>> model = models.language_model(models.preset("tiny", 64))
      >>> params = sharding.born_sharded(model.init, sharding.make_mesh("data=1", jax.devices()[:1]), jax.random.key(0))
      >>> params["token_embedding"].sharding.spec
      P('tensor', 'fsdp')
    """
    placed = shardings(jax.eval_shape(make, *arguments), mesh, what)
    return jax.jit(make, out_shardings=placed)(*arguments)


def pair_sharding(mesh: Mesh) -> NamedSharding:
    """How the leading axis of a batch of pairs lies; the side axis, its second, is never divided.

    Example:
      >>> import jax
      >>> from entangle import sharding
      >>> sharding.pair_sharding(sharding.make_mesh("data=1", jax.devices()[:1])).spec
      P(('data', 'fsdp'),)
    """
    return NamedSharding(mesh, spec(("pairs",)))


def check_pairs(mesh: Mesh, pairs: int, flag: str) -> None:
    """Refuse a batch whose pairs cannot be divided over the devices.

    Args:
      mesh: see :func:`make_mesh`.
      pairs: B.
      flag: named in the message.

    Raises:
      UserError: they cannot.

    Example:
      >>> import jax
      >>> from entangle import sharding
      >>> sharding.check_pairs(sharding.make_mesh("data=1", jax.devices()[:1]), 3, "--preference.batch-size")
    """
    names = RULES["pairs"]
    if pairs % (parts := _parts(mesh, names)):
        raise UserError(f"{flag} {pairs}: cannot be divided over {_said(mesh, names)} = {parts} devices")


def _parts(mesh: Mesh, names: str | Sequence[str] | None) -> int:
    every = (names,) if isinstance(names, str) else names or ()
    if mesh.axis_names != AXES:
        raise UserError(f"mesh: its axes are {', '.join(mesh.axis_names)}, not {', '.join(AXES)}: see make_mesh")
    return math.prod(mesh.shape[name] for name in every)


def _said(mesh: Mesh, names: str | Sequence[str] | None) -> str:
    every = (names,) if isinstance(names, str) else names or ()
    return " x ".join(f"{name}={mesh.shape[name]}" for name in every)


def _current() -> Any:
    """The mesh that is set, if it is one of ours: Auto axes called ``AXES``."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = mesh.axis_names == AXES and all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh if ours else None


def pair_axes() -> tuple[str, ...] | None:
    """Mesh axes that pairs lie over while a mesh is set; None without one. For ``spmd_axis_name`` of ``jax.vmap``.

    Example:
      >>> import jax
      >>> from entangle import sharding
      >>> with jax.set_mesh(sharding.make_mesh("data=1", jax.devices()[:1])):
      ...     sharding.pair_axes()
      ('data', 'fsdp')
    """
    return None if _current() is None else RULES["pairs"]


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Keep an array as the table says, while a mesh is set.

    Args:
      x: an array.
      axes: its logical axes; what a mesh axis does not divide, such as a single row, lies whole.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import sharding
      >>> sharding.constrain(jnp.zeros((2, 3)), "pairs", None).shape  # no mesh is set: nothing is said
      (2, 3)
    """
    mesh = _current()
    if mesh is None:
        return x
    entries = zip(x.shape, spec(axes), strict=True)
    return jax.lax.with_sharding_constraint(x, P(*(None if n % _parts(mesh, entry) else entry for n, entry in entries)))


def constrain_like_parameters(tree: T) -> T:
    """Keep gradients as their parameters lie, while a mesh is set; leaves that the table does not know are left.

    Args:
      tree: like the parameters, or several of them, such as ``PairGradients``.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import sharding
      >>> sharding.constrain_like_parameters({"token_embedding": jnp.zeros((4, 2))})["token_embedding"].shape
      (4, 2)
    """
    if _current() is None:
        return tree
    leaves = []
    for path, leaf in named_leaves(tree):
        axes = logical_axes(path, leaf.ndim)
        leaves.append(leaf if axes is None else constrain(leaf, *axes))
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
