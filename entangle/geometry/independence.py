"""Whether the rows of a batch stay apart in a model: read off its program for the whole batch, before anything is computed.

Geometry takes a model row by row, and of a model whose rows see each other (statistics over the batch, attention or losses
across rows) that would be another model. Followed through the program is what every axis counts. A floating sum, maximum or
product over rows is refused; where rows are moved, or met by numbers of their own, in a way that is not followed, a warning
says so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from entangle import jaxprs
from entangle.errors import UnsupportedModelError

PAIRS, SIDES, UNIFORM, VARYING = range(4)
"""What an axis counts: pairs, sides, or something else, along which all numbers are the same, or are not."""
Axis = tuple[tuple[int, int], ...]
"""The lengths that an axis is made of, first the slowest, and what they count."""
Axes = tuple[Axis, ...]

_REDUCTIONS = {f"reduce_{kind}" for kind in ("sum", "max", "min", "prod", "and", "or", "xor")} | {"argmax", "argmin"}
_ALONG = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"}
_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil clamp
    clz complex conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor
    ge gt igamma igammac imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max mesh_cast min mul ne
    neg nextafter not or polygamma population_count pow pvary random_fold_in random_seed real reduce_precision
    regularized_incomplete_beta rem reshard round rsqrt select_n sharding_constraint shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
"""
_IN_PLACE = {*_ELEMENTWISE.split(), *_ALONG, "sort", "rev"}
_PARTS = {"slice", "dynamic_slice", "dynamic_update_slice", "pad", "concatenate", "split", "top_k"}


class _LostError(Exception):
    """Rows are moved in a way that is not followed."""


def hold_rows_apart(closed: core.ClosedJaxpr, batch_inputs: Iterable[int]) -> None:
    """Refuse a program in which rows are certain to see each other, and warn of one in which they may.

    Args:
      closed: of the whole batch, from ``jaxprs.flat_jaxpr``; its result has leading axes ``[B, 2]``.
      batch_inputs: numbers of its variables with these leading axes.

    Raises:
      UnsupportedModelError: names the operation and its line.
    """
    of_batch = set(batch_inputs)
    inputs: list[Axes | str] = []
    for number, var in enumerate(closed.jaxpr.invars):
        aval: Any = var.aval
        axes = _plain(aval.shape)
        if number in of_batch:
            axes = (((axes[0][0][0], PAIRS),), ((axes[1][0][0], SIDES),), *axes[2:])
        inputs.append(axes)
    (found,) = _follow(closed.jaxpr, inputs)
    if not isinstance(found, str):
        rows = zip(found[:2], (PAIRS, SIDES), strict=True)
        kinds = {kind for axis, own in rows for length, kind in axis if length > 1 and kind != own}
        found = (
            "pairs and sides are exchanged"
            if kinds & {PAIRS, SIDES}
            else "numbers no row has met"
            if VARYING in kinds
            else ""
        )
    if found:
        warnings.warn(
            f"log_prob_fn: it could not be shown that rows stay apart ({found}); they do if log_prob_fn of the batch "
            "equals the log-probabilities that come with the geometry",
            stacklevel=2,
        )


def _plain(shape: Sequence[int], kind: int = VARYING) -> Axes:
    return tuple(((length, kind),) for length in shape)


def _counts_rows(axis: Axis) -> bool:
    return any(kind in (PAIRS, SIDES) and length > 1 for length, kind in axis)


def _any_rows(all_axes: Iterable[Axes]) -> bool:
    return any(_counts_rows(axis) for axes in all_axes for axis in axes)


def _length(axis: Axis) -> int:
    return math.prod(length for length, _ in axis)


def _join_axis(left: Axis, right: Axis) -> Axis:
    """What an axis of a combination counts; rows are joined by the same rows, or by what is the same for all of them."""
    result: list[tuple[int, int]] = []
    lefts, rights = ([factor for factor in axis if factor[0] > 1] for axis in (left, right))
    while lefts and rights:
        (a, one), (b, other) = lefts.pop(0), rights.pop(0)
        size = math.gcd(a, b)
        if size != min(a, b):
            if _counts_rows(left) or _counts_rows(right):
                raise _LostError
            return ((_length(left), VARYING),)
        if one != other and UNIFORM not in (one, other):
            raise _LostError
        result.append((size, other if one == UNIFORM else one))
        if a > size:
            lefts.insert(0, (a // size, one))
        if b > size:
            rights.insert(0, (b // size, other))
    return tuple(result) or ((1, UNIFORM),)


def _join(left: Axes, right: Axes) -> Axes:
    return tuple(_join_axis(a, b) for a, b in zip(left, right, strict=True))


def _follow(jaxpr: Any, inputs: Sequence[Axes | str]) -> list[Axes | str]:
    """Axes of a jaxpr's results from those of its inputs; in their place the operation where they were lost."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def axes_of(atom: Any) -> Axes | str:
        axes = None if isinstance(atom, core.Literal) else known.get(atom)
        return _plain(getattr(atom.aval, "shape", ())) if axes is None else axes

    live = jaxprs.live_equations(jaxpr, with_effects=False)
    for index in sorted(live):
        eqn = jaxpr.eqns[index]
        operands = [axes_of(atom) for atom in eqn.invars]
        lost = next((axes for axes in operands if isinstance(axes, str)), None)
        results: Sequence[Axes | str] = [lost] * len(eqn.outvars) if lost is not None else []
        if lost is None:
            try:
                results = _apply(eqn, operands)  # type: ignore[arg-type]
            except _LostError:
                results = [f"{eqn.primitive.name} at {jaxprs.where(eqn)}"] * len(eqn.outvars)
        known.update(zip(eqn.outvars, results, strict=True))
    return [axes_of(atom) for atom in jaxpr.outvars]


def _apply(eqn: Any, operands: Sequence[Axes]) -> Sequence[Axes | str]:
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
    shapes = [var.aval.shape for var in eqn.outvars]
    if name in _PARTS:
        return [_parts(shape, operands) for shape in shapes]
    if name.startswith("scatter"):
        return [_scatter(eqn, operands)]
    if name == "optimization_barrier":
        return operands
    if name in _IN_PLACE and all(_fits(axes, s) for axes in operands for s in shapes):
        return [_elementwise(eqn, shape, operands) for shape in shapes]
    if _any_rows(operands):
        raise _LostError
    return [_plain(shape) for shape in shapes]


def _fits(axes: Axes, shape: tuple[int, ...]) -> bool:
    """Whether an operand is a scalar, or of the result's shape but for lengths of 1."""
    same = len(axes) == len(shape) and all(_length(a) in (1, n) for a, n in zip(axes, shape, strict=True))
    return not axes or same


def _over(eqn: Any, axes: Iterable[Axis]) -> None:
    """A sum, say, over these axes."""
    if not any(map(_counts_rows, axes)):
        return
    if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        raise UnsupportedModelError(
            f"log_prob_fn: rows of the batch see each other ({eqn.primitive.name} at {jaxprs.where(eqn)}), but each row's "
            "log-probability has to depend on that row alone"
        )
    raise _LostError  # counts and the like, of which a row's number need not depend


def _elementwise(eqn: Any, shape: tuple[int, ...], operands: Sequence[Axes]) -> Axes:
    """Of operands that fit the result's shape."""
    axes = _plain(shape, UNIFORM)
    for operand in operands:
        if operand:
            fitted = zip(operand, shape, strict=True)
            axes = _join(axes, tuple(axis if _length(axis) == n else ((n, UNIFORM),) for axis, n in fitted))
    name, params = eqn.primitive.name, eqn.params
    if name in _ALONG:
        _over(eqn, [axes[params["axis"]]])
    moved = {"sort": [params.get("dimension")], "rev": params.get("dimensions")}.get(name, [])
    if any(_counts_rows(axes[axis]) for axis in moved):
        raise _LostError
    along = [params["axis"]] if name in _ALONG else moved
    return tuple(((_length(axis), VARYING),) if n in along else axis for n, axis in enumerate(axes))


def _parts(shape: Sequence[int], operands: Sequence[Axes]) -> Axes:
    """Of operands of the result's rank, that may be longer or shorter than the result, but not in rows."""
    axes = _plain(shape, UNIFORM)
    for operand in operands:
        if len(operand) == len(shape):
            same = [_length(axis) == length for axis, length in zip(operand, shape, strict=True)]
            if any(_counts_rows(axis) for axis, equal in zip(operand, same, strict=True) if not equal):
                raise _LostError
            other = _plain(shape)
            axes = _join(axes, tuple(a if equal else o for a, o, equal in zip(operand, other, same, strict=True)))
    return axes


def _scatter(eqn: Any, operands: Sequence[Axes]) -> Axes:
    numbers = eqn.params["dimension_numbers"]
    placed = (*numbers.inserted_window_dims, *numbers.scatter_dims_to_operand_dims, *numbers.operand_batching_dims)
    if _any_rows(operands[1:]) or any(_counts_rows(operands[0][axis]) for axis in placed):
        raise _LostError
    return tuple(axis if _counts_rows(axis) else ((_length(axis), VARYING),) for axis in operands[0])


def _reduce(eqn: Any, operands: Sequence[Axes]) -> Axes:
    over = eqn.params["axes"]
    _over(eqn, [operands[0][axis] for axis in over])
    return tuple(axis for number, axis in enumerate(operands[0]) if number not in over)


def _dot_general(eqn: Any, operands: Sequence[Axes]) -> Axes:
    contracted, batch = eqn.params["dimension_numbers"]
    both = list(zip(operands, contracted, batch, strict=True))
    _over(eqn, [axes[number] for axes, over, _ in both for number in over])
    shared = [_join_axis(operands[0][a], operands[1][b]) for a, b in zip(*batch, strict=True)]
    free = [a for axes, over, side in both for number, a in enumerate(axes) if number not in (*over, *side)]
    return (*shared, *free)


def _convolution(eqn: Any, operands: Sequence[Axes]) -> Axes:
    numbers = eqn.params["dimension_numbers"]
    batch, *others = numbers.lhs_spec
    _over(eqn, [*(operands[0][axis] for axis in others), *operands[1]])
    result = list(_plain(eqn.outvars[0].aval.shape))
    if _length(operands[0][batch]) != _length(result[numbers.out_spec[0]]):
        raise _LostError
    result[numbers.out_spec[0]] = operands[0][batch]
    return tuple(result)


def _broadcast_in_dim(eqn: Any, operands: Sequence[Axes]) -> Axes:
    result = list(_plain(eqn.outvars[0].aval.shape, UNIFORM))
    for axis, number in zip(operands[0], eqn.params["broadcast_dimensions"], strict=True):
        if _length(axis) == _length(result[number]):
            result[number] = axis
    return tuple(result)


def _reshape(eqn: Any, operands: Sequence[Axes]) -> Axes:
    """Axes put together and taken apart."""
    shape = eqn.outvars[0].aval.shape
    left = [factor for axis in operands[0] for factor in axis if factor[0] != 1]
    result = []
    for length in shape:
        axis: list[tuple[int, int]] = []
        while left and (wanted := length // max(_length(tuple(axis)), 1)) > 1:
            size, kind = left.pop(0)
            taken = math.gcd(size, wanted)
            if taken != min(size, wanted):
                if _any_rows(operands):
                    raise _LostError
                return _plain(shape)
            axis.append((taken, kind))
            if taken < size:
                left.insert(0, (size // taken, kind))
        result.append(tuple(axis) or ((length, UNIFORM),))
    return tuple(result)


def _gather(eqn: Any, operands: Sequence[Axes]) -> Axes:
    """Of the indices, and of the operand's axes that are read whole."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = operands[0], list(operands[1][:-1])
    for axis, place in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        indices[place] = _join_axis(operand[axis], indices[place])
    if any(_counts_rows(operand[axis]) for axis in numbers.collapsed_slice_dims):
        raise _LostError
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    window = iter([(axis, sizes[n]) for n, axis in enumerate(operand) if n not in dropped])
    others = iter(indices)
    result = []
    for number, length in enumerate(eqn.outvars[0].aval.shape):
        if number not in numbers.offset_dims:
            result.append(next(others))
            continue
        axis, size = next(window)
        if size != _length(axis) and _counts_rows(axis):
            raise _LostError
        result.append(axis if size == _length(axis) else ((length, VARYING),))
    return tuple(result)


def _scan(eqn: Any, operands: Sequence[Axes]) -> Sequence[Axes | str]:
    consts, carries = jaxprs.scan_inputs(eqn)
    constant, sliced = operands[:consts], operands[consts + carries :]
    along: Axis = ((eqn.params["length"], UNIFORM),)
    for axes in sliced:
        along = _join_axis(along, axes[0])
    if carries and _counts_rows(along):
        raise _LostError  # one row after the other, with something carried on
    carried: list[Axes | str] = list(operands[consts : consts + carries])
    inner = eqn.params["jaxpr"].jaxpr
    for _ in range(2):  # what is carried may be rows from the second iteration on
        results = _follow(inner, [*constant, *carried, *(axes[1:] for axes in sliced)])
        carried = [_join_carried(*both) for both in zip(carried, results[:carries], strict=True)]
    along = along if _counts_rows(along) else ((eqn.params["length"], VARYING),)
    return [*carried, *(axes if isinstance(axes, str) else (along, *axes) for axes in results[carries:])]


def _join_carried(first: Axes | str, later: Axes | str) -> Axes | str:
    """What is carried counts rows later on if not at first: then it starts with numbers that no row has met."""
    if isinstance(first, str) or isinstance(later, str):
        return first if isinstance(first, str) else later
    return tuple(b if not _counts_rows(a) else _join_axis(a, b) for a, b in zip(first, later, strict=True))


_RULES: dict[str, Callable[[Any, Sequence[Axes]], Axes]] = {
    **dict.fromkeys(_REDUCTIONS, _reduce),
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "transpose": lambda eqn, operands: tuple(operands[0][axis] for axis in eqn.params["permutation"]),
    "squeeze": lambda eqn, operands: tuple(
        axis for number, axis in enumerate(operands[0]) if number not in eqn.params["dimensions"]
    ),
    "gather": _gather,
    "random_bits": lambda eqn, operands: (*operands[0], *_plain(eqn.params["shape"])),
    "iota": lambda eqn, operands: tuple(
        ((length, VARYING if number == eqn.params["dimension"] else UNIFORM),)
        for number, length in enumerate(eqn.outvars[0].aval.shape)
    ),
}
