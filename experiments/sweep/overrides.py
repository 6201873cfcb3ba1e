"""A sweep is data: an iterator of overrides, dicts from a configuration's fields, dotted, to values."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import random
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import typeguard

from entangle.errors import UserError

Config = TypeVar("Config")
Overrides = dict[str, Any]
"""``{"objective": "ipo", "objective_args.beta": 0.1, "preference.optimizer.learning_rate": 1e-5, "seed": 2}``."""


def product(*axes: Mapping[str, Iterable[Any]] | Iterable[Overrides]) -> Iterator[Overrides]:
    """Every combination, the last axis fastest.

    Args:
      axes: fields with the values that each takes, or sweeps made before.

    Example:
      >>> from experiments.sweep import product
      >>> [list(point.values()) for point in product({"objective": ["dpo", "ipo"], "seed": range(2)})]
      [['dpo', 0], ['dpo', 1], ['ipo', 0], ['ipo', 1]]
      >>> list(product([{"objective": "sppo"}], {"seed": [7]}))
      [{'objective': 'sppo', 'seed': 7}]
    """
    sweeps: list[list[Overrides]] = []
    for axis in axes:
        if isinstance(axis, Mapping):
            sweeps += [[{name: value} for value in values] for name, values in axis.items()]
        else:
            sweeps.append(list(axis))
    for points in itertools.product(*sweeps):
        yield {name: value for point in points for name, value in point.items()}


def zipped(axes: Mapping[str, Sequence[Any]]) -> Iterator[Overrides]:
    """The fields' first values together, then their second ones, and so on.

    Raises:
      UserError: the fields have different numbers of values.

    Example:
      >>> from experiments.sweep import zipped
      >>> list(zipped({"objective": ["dpo", "simpo"], "objective_args.beta": [0.1, 2.0]}))[1]
      {'objective': 'simpo', 'objective_args.beta': 2.0}
    """
    counts = {name: len(values) for name, values in axes.items()}
    if len(set(counts.values())) > 1:
        raise UserError(
            f"zipped fields need as many values each: {', '.join(f'{n} has {c}' for n, c in counts.items())}"
        )
    for values in zip(*axes.values(), strict=True):
        yield dict(zip(axes, values, strict=True))


def subset(sweep: Iterable[Overrides], count: int, seed: int = 0) -> list[Overrides]:
    """A random part of a sweep, in its order: a function of the seed.

    Raises:
      UserError: the sweep has fewer points.

    Example:
      >>> from experiments.sweep import product, subset
      >>> subset(product({"seed": range(100)}), 3) == subset(product({"seed": range(100)}), 3)
      True
    """
    points = list(sweep)
    if not 0 <= count <= len(points):
        raise UserError(f"a random part of {count} trials: the sweep has {len(points)}")
    return [points[place] for place in sorted(random.Random(seed).sample(range(len(points)), count))]


def override(config: Config, overrides: Mapping[str, Any]) -> Config:
    """A configuration with other values.

    Args:
      config: a frozen dataclass; fields that are dataclasses or dicts are reached with dots.
      overrides: dotted name -> value.

    Raises:
      UserError: no such field, a value of the wrong type, or one that the configuration refuses.

    Example:
      >>> from experiments.pairs.pair_config import PairSettings
      >>> from experiments.sweep import override
      >>> override(PairSettings(), {"preference.optimizer.learning_rate": 1, "objective_args.beta": 0.5}).objective_args
      {'beta': 0.5}
      >>> override(PairSettings(), {"preference.lerning_rate": 1e-5})
      Traceback (most recent call last):
      entangle.errors.UserError: override preference.lerning_rate: there is no such field (did you mean
      preference.optimizer.learning_rate?)
    """
    for name, value in overrides.items():
        config = _replaced(config, name.split("."), value, name, config)
    return config


def fields(config: Any, head: str = "") -> dict[str, Any]:
    """Every field of a configuration that is no dataclass itself, by its dotted name.

    Example:
      >>> from entangle.training import OptimizerConfig
      >>> from experiments.sweep.overrides import fields
      >>> fields(OptimizerConfig())["learning_rate"]
      0.001
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{head}{field.name}"
        found |= fields(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _replaced(config: Any, path: Sequence[str], value: Any, name: str, root: Any) -> Any:
    first, *rest = path
    kind: Any = type(config)
    hints = _hints(kind)
    if first not in {field.name for field in dataclasses.fields(config)}:
        raise _unknown(name, root)
    now = getattr(config, first)
    if rest and dataclasses.is_dataclass(now):
        value = _replaced(now, rest, value, name, root)
    elif rest and isinstance(now, dict) and len(rest) == 1:
        value = now | {rest[0]: _checked(value, typing.get_args(hints[first])[1], name)}
    elif rest:
        raise _unknown(name, root)
    else:
        value = _checked(value, hints[first], name)
    try:
        return dataclasses.replace(config, **{first: value})
    except UserError as error:
        raise error if str(error).startswith("override ") else UserError(f"override {name}: {error}") from None


def _checked(value: Any, hint: Any, name: str) -> Any:
    value = value.item() if hasattr(value, "item") else value  # numpy's and jax's scalars
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)  # 1 and 1.0 are one trial
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        value = tuple(value)
    if typing.get_origin(hint) is dict and isinstance(value, Mapping):
        value = {key: _checked(item, typing.get_args(hint)[1], f"{name}.{key}") for key, item in value.items()}
    try:
        if isinstance(value, bool) and hint in (int, float):
            raise typeguard.TypeCheckError("")
        return typeguard.check_type(value, hint)
    except typeguard.TypeCheckError:
        wanted = getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
        raise UserError(f"override {name}: {wanted} is needed, not {type(value).__name__} {value!r}") from None


def _unknown(name: str, root: Any) -> UserError:
    known = {known.rsplit(".", 1)[-1]: known for known in fields(root)} | {known: known for known in fields(root)}
    near = difflib.get_close_matches(name, known, 1) or difflib.get_close_matches(name.rsplit(".", 1)[-1], known, 1)
    hint = f" (did you mean {known[near[0]]}?)" if near else ""
    return UserError(f"override {name}: there is no such field{hint}")
