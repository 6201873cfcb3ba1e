"""Whether the rows of a batch stay apart in a model: read off its program for the whole batch, before anything is computed.

Geometry takes a model row by row, and of a model whose rows see each other (statistics over the batch, attention or losses
across rows) that would be another model. Followed through the program is which axes count rows; a floating sum, maximum or
product over one of them is refused. What is not followed (a loop, a permutation of rows) is let pass: a refusal is certain,
a silence is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from entangle.errors import UnsupportedModelError
from entangle.geometry import jaxprs

Axis = tuple[tuple[int, bool], ...]
"""The lengths that an axis is made of, first the slowest, and whether they count rows."""
Axes = tuple[Axis, ...]

_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod"}
_ALONG = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"}
_PARTS = {"slice", "dynamic_slice", "dynamic_update_slice", "pad", "concatenate", "split", "top_k"}


def refuse_mixed_rows(closed: core.ClosedJaxpr, batch_inputs: Iterable[int]) -> None:
    """Refuse a program in which rows are certain to see each other.

    Args:
      closed: of the whole batch, from ``jaxprs.flat_jaxpr``.
      batch_inputs: numbers of its variables with leading axes ``[B, 2]``.

    Raises:
      UnsupportedModelError: names the operation and its line.
    """
    of_batch = set(batch_inputs)
    inputs = []
    for number, var in enumerate(closed.jaxpr.invars):
        axes = _plain(var.aval.shape)
        if number in of_batch:
            axes = (*(((axis[0][0], True),) for axis in axes[:2]), *axes[2:])
        inputs.append(axes)
    _follow(closed.jaxpr, inputs)


def _plain(shape: Sequence[int]) -> Axes:
    return tuple(((length, False),) for length in shape)


def _counts_rows(axis: Axis) -> bool:
    return any(row and length > 1 for length, row in axis)


def _length(axis: Axis) -> int:
    return math.prod(length for length, _ in axis)


def _join(left: Axes, right: Axes) -> Axes:
    return tuple(a if _counts_rows(a) else b for a, b in zip(left, right, strict=True))


def _follow(jaxpr: Any, inputs: Sequence[Axes]) -> list[Axes]:
    """Axes of a jaxpr's results, from those of its inputs."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def axes_of(atom: Any) -> Axes:
        axes = None if isinstance(atom, core.Literal) else known.get(atom)
        return _plain(getattr(atom.aval, "shape", ())) if axes is None else axes

    live = jaxprs.live_equations(jaxpr, with_effects=False)
    for index, eqn in enumerate(jaxpr.eqns):
        operands = [axes_of(atom) for atom in eqn.invars]
        if index in live and any(_counts_rows(axis) for axes in operands for axis in axes):
            known.update(zip(eqn.outvars, _apply(eqn, operands), strict=True))
    return [axes_of(atom) for atom in jaxpr.outvars]


def _apply(eqn: Any, operands: Sequence[Axes]) -> Sequence[Axes]:
    """Axes of one equation's results."""
    name = eqn.primitive.name
    if name in _RULES:
        return [_RULES[name](eqn, operands)]
    if name == "scan":
        return _scan(eqn, operands)
    inner = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
    inner = getattr(inner, "jaxpr", inner)
    if isinstance(inner, core.Jaxpr) and len(inner.invars) == len(operands):
        return _follow(inner, operands)
    if name in _ALONG:
        _refuse_over(eqn, [operands[0][eqn.params["axis"]]])
    return [_elementwise(var.aval.shape, operands, parts=name in _PARTS) for var in eqn.outvars]


def _refuse_over(eqn: Any, axes: Iterable[Axis]) -> None:
    if any(map(_counts_rows, axes)) and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        raise UnsupportedModelError(
            f"log_prob_fn: rows of the batch see each other ({eqn.primitive.name} at {jaxprs.where(eqn)}), but each row's "
            "log-probability has to depend on that row alone"
        )


def _elementwise(shape: Sequence[int], operands: Sequence[Axes], parts: bool) -> Axes:
    """Of operands that have the result's shape, or its length along some axes at least."""
    found = _plain(shape)
    for axes in operands:
        if len(axes) != len(shape):
            continue
        same = [_length(axis) == length for axis, length in zip(axes, shape, strict=True)]
        if parts or all(same):
            found = _join(found, tuple(a if s else p for a, p, s in zip(axes, _plain(shape), same, strict=True)))
    return found


def _reduce(eqn: Any, operands: Sequence[Axes]) -> Axes:
    over = eqn.params["axes"]
    _refuse_over(eqn, [operands[0][axis] for axis in over])
    return tuple(axis for number, axis in enumerate(operands[0]) if number not in over)


def _dot_general(eqn: Any, operands: Sequence[Axes]) -> Axes:
    contracted, batch = eqn.params["dimension_numbers"]
    both = list(zip(operands, contracted, batch, strict=True))
    _refuse_over(eqn, [axes[number] for axes, over, _ in both for number in over])
    shared = [_join((operands[0][a],), (operands[1][b],))[0] for a, b in zip(*batch, strict=True)]
    free = [a for axes, over, side in both for number, a in enumerate(axes) if number not in (*over, *side)]
    return (*shared, *free)


def _broadcast_in_dim(eqn: Any, operands: Sequence[Axes]) -> Axes:
    result = list(_plain(eqn.outvars[0].aval.shape))
    for axis, number in zip(operands[0], eqn.params["broadcast_dimensions"], strict=True):
        if _length(axis) == _length(result[number]):
            result[number] = axis
    return tuple(result)


def _reshape(eqn: Any, operands: Sequence[Axes]) -> Axes:
    """Axes put together and taken apart; plain ones where a length does not divide another."""
    shape = eqn.outvars[0].aval.shape
    if 0 in shape:
        return _plain(shape)
    left = [factor for axis in operands[0] for factor in axis if factor[0] > 1]
    result = []
    for length in shape:
        axis: list[tuple[int, bool]] = []
        while (wanted := length // _length(tuple(axis))) > 1:
            size, row = left.pop(0)
            taken = math.gcd(size, wanted)
            if taken != min(size, wanted):
                return _plain(shape)
            axis.append((taken, row))
            if taken < size:
                left.insert(0, (size // taken, row))
        result.append(tuple(axis) or ((1, False),))
    return tuple(result)


def _gather(eqn: Any, operands: Sequence[Axes]) -> Axes:
    """Of the indices, and of the operand's axes that are read whole."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.outvars[0].aval.shape
    indices = iter(operands[1][:-1])
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    window = iter([(a, sizes[n]) for n, a in enumerate(operands[0]) if n not in dropped])
    result = []
    for number, length in enumerate(shape):
        if number in numbers.offset_dims:
            axis, size = next(window)
            result.append(axis if size == _length(axis) else ((length, False),))
        else:
            result.append(next(indices))
    return tuple(result)


def _scan(eqn: Any, operands: Sequence[Axes]) -> list[Axes]:
    consts, carries = jaxprs.scan_inputs(eqn)
    constant, carried = operands[:consts], operands[consts : consts + carries]
    slices = [axes[1:] for axes in operands[consts + carries :]]
    inner = eqn.params["jaxpr"].jaxpr
    for _ in range(2):  # what is carried may be rows from the second iteration on
        results = _follow(inner, [*constant, *carried, *slices])
        carried = [_join(old, new) for old, new in zip(carried, results, strict=False)]
    along: Axis = ((eqn.params["length"], False),)
    return [*carried, *((along, *axes) for axes in results[carries:])]


_RULES: dict[str, Callable[[Any, Sequence[Axes]], Axes]] = {
    **dict.fromkeys(_REDUCTIONS, _reduce),
    "argmax": _reduce,
    "argmin": _reduce,
    "dot_general": _dot_general,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "transpose": lambda eqn, operands: tuple(operands[0][axis] for axis in eqn.params["permutation"]),
    "squeeze": lambda eqn, operands: tuple(
        axis for number, axis in enumerate(operands[0]) if number not in eqn.params["dimensions"]
    ),
    "gather": _gather,
}
