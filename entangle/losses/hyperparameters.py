"""The ranges in which objectives' hyperparameters make sense, said once, in their annotations."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

from entangle.errors import UserError


class Range(NamedTuple):
    """An interval of real numbers.

    Attributes:
      low: lower end.
      high: upper end.
      with_low: whether the lower end belongs to it.
      with_high: whether the upper end does.

    Example:
      >>> from entangle.losses.hyperparameters import Range
      >>> str(Range(0.0, 0.5, with_low=True)), Range(0.0, 0.5, with_low=True).holds(0.5)
      ('[0, 0.5)', False)
    """

    low: float
    high: float
    with_low: bool = False
    with_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value lies in it; NaN lies in none."""
        above = value > self.low or (self.with_low and value == self.low)
        return above and (value < self.high or (self.with_high and value == self.high))

    def __str__(self) -> str:
        return f"{'[' if self.with_low else '('}{self.low:g}, {self.high:g}{']' if self.with_high else ')'}"


_INFINITY = float("inf")

Real = Annotated[float, Range(-_INFINITY, _INFINITY)]
Positive = Annotated[float, Range(0.0, _INFINITY)]
NonNegative = Annotated[float, Range(0.0, _INFINITY, with_low=True)]
Share = Annotated[float, Range(0.0, 1.0, with_high=True)]
Unit = Annotated[float, Range(0.0, 1.0, with_low=True, with_high=True)]
Decay = Annotated[float, Range(0.0, 1.0, with_low=True)]
FlipProbability = Annotated[float, Range(0.0, 0.5, with_low=True)]
StrictFlipProbability = Annotated[float, Range(0.0, 0.5)]


def ranges(function: Callable[..., Any]) -> dict[str, Range]:
    """Range of every annotated parameter, by name.

    Example:
      >>> from entangle import losses
      >>> from entangle.losses.hyperparameters import ranges
      >>> {name: str(found) for name, found in ranges(losses.cdpo).items()}
      {'beta': '(0, inf)', 'label_smoothing': '[0, 0.5)'}
    """
    function = inspect.unwrap(function)
    while hasattr(function, "func"):
        function = inspect.unwrap(function.func)
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):  # a user's annotations need not be there when it runs
        return {}
    marks = {name: list(_marks(hint)) for name, hint in hints.items()}
    return {name: found[0] for name, found in marks.items() if found}


def _marks(hint: Any) -> Iterator[Range]:
    yield from (mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Range))
    for part in typing.get_args(hint):
        yield from _marks(part)


def check_ranges(name: str, function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Refuse values outside of their ranges.

    Args:
      name: what the message calls the function.
      function: whose annotations say the ranges.
      values: parameter -> value.

    Raises:
      UserError: a value is no number, or lies outside.
    """
    for parameter, range_ in ranges(function).items():
        if parameter not in values:
            continue
        value = values[parameter]
        if getattr(value, "ndim", 0):
            continue  # one value a pair
        if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
            raise UserError(f"objective {name!r}: {parameter} {value!r} is no number")
        try:
            inside = range_.holds(float(value))
        except OverflowError:
            inside = False
        if not inside:
            raise UserError(f"objective {name!r}: {parameter} {value} is not in {range_}")
