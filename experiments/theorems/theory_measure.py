"""Measures points: geometry, coefficients and predicted changes by the library, then one small step and what it changed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from entangle import geometry, losses
from entangle.errors import UserError
from entangle.types import PairLogProbs
from experiments.theorems.theory_predictions import predict
from experiments.theorems.theory_setups import Pair, Point, Problem, log_probs, problem

Row = dict[str, Any]
Arrays = dict[str, jax.Array]


@functools.cache
def objective_of(words: str) -> losses.Objective:
    """An objective of single pairs from its name and hyperparameters.

    Raises:
      UserError: there is no such objective or hyperparameter, or its loss of a pair depends on other pairs.

    Example:
      >>> from experiments.theorems.theory_measure import objective_of
      >>> objective_of("cpo,nll_weight")
      Traceback (most recent call last):
      entangle.errors.UserError: objective cpo,nll_weight: write it as cpo or as cpo,nll_weight=0.5
    """
    name, *settings = words.split(",")
    try:
        values = {key: float(value) for key, value in (setting.split("=") for setting in settings)}
    except ValueError:
        raise UserError(f"objective {words}: write it as cpo or as cpo,nll_weight=0.5") from None
    found = losses.get_objective(name, **values)
    if isinstance(found, losses.BatchObjective):
        raise UserError(f"objective {words}: it looks at other pairs, and here is one at a time")
    return found


def measure(overrides: Mapping[str, Any]) -> Row:
    """Measure one point.

    Args:
      overrides: fields of ``Point`` that differ from the default.

    Returns:
      The point's fields, what was measured, and under ``theory_`` what was predicted; changes are in units of C.

    Raises:
      UserError: there is no such point.

    Example:
      >>> from experiments.theorems.theory_measure import measure
      >>> row = measure({"setup": "suffix", "suffix": 8})
      >>> round(row["realised_chosen"], 2), round(row["theory_chosen"], 2), round(row["cosine"], 2)
      (-0.04, -0.04, 0.75)
    """
    return measure_all([overrides])[0]


def measure_all(overrides: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Measure many points, those of one shape at once; see :func:`measure`."""
    points = [Point(**fields) for fields in overrides]
    problems = [problem(point) for point in points]
    groups: dict[Any, list[int]] = {}
    for i, (point, made) in enumerate(zip(points, problems, strict=True)):
        groups.setdefault((point.bits, type(made.pair), made.params.shape[-1], point.width), []).append(i)
    rows: list[Row] = [{} for _ in points]
    for (bits, *_), members in groups.items():
        with jax.enable_x64(bits == 64):
            found = _measure([points[i] for i in members], [problems[i] for i in members])
        for i, row in zip(members, found, strict=True):
            rows[i] = row
    return rows


def _measure(points: list[Point], problems: list[Problem]) -> list[Row]:
    params, pairs = _stacked(problems, points[0].bits)
    before = np.asarray(jax.jit(jax.vmap(_one_log_probs))(params, pairs))
    d_w, d_l = _coefficients(points, before, np.asarray(pairs.mask).sum(-1))
    largest = np.maximum(abs(d_w), abs(d_l))
    rates = np.array([point.step for point in points]) / np.where(largest > 0, largest, 1)
    positions = jnp.asarray([point.position for point in points])
    found = jax.jit(jax.vmap(_step))(
        params, pairs, positions, *(jnp.asarray(x, params.dtype) for x in (d_w, d_l, rates))
    )
    rows = []
    columns = {name: np.asarray(values, np.float64).tolist() for name, values in found.items()}
    for i, (point, made) in enumerate(zip(points, problems, strict=True)):
        row = {name: values[i] for name, values in columns.items()}
        row = {name: v / point.step if name.endswith(("chosen", "rejected")) else v for name, v in row.items()}
        if point.position < 0:
            row = {name: v for name, v in row.items() if not name.startswith("position_")}
        x, y = (float(d[i] / largest[i]) if largest[i] else 0.0 for d in (d_w, d_l))
        row |= {"d_w": float(d_w[i]), "d_l": float(d_l[i])}
        theory = {f"theory_{name}": value for name, value in predict(point, made, (x, y)).items()}
        rows.append(dataclasses.asdict(point) | row | theory)
    return rows


def _stacked(problems: list[Problem], bits: int) -> tuple[jax.Array, Any]:
    """Parameters ``[N, ...]`` and pairs ``[N, 2, T, ...]``, padded on the right to one length."""
    length = max(one.pair.tokens.shape[-1] for one in problems)

    def padded(array: np.ndarray, axis: int) -> np.ndarray:
        missing = length - array.shape[axis]
        return np.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)])

    def joined(arrays: list[np.ndarray]) -> jax.Array:
        joint = np.stack(arrays)
        return jnp.asarray(joint.astype(f"float{bits}") if joint.dtype == np.float64 else joint)

    # logits have a row for every position, a head has none
    rows = [padded(one.params, 0) if len(one.params) == one.pair.tokens.shape[-1] else one.params for one in problems]
    pairs = [jax.tree.map(lambda leaf: padded(leaf, 1), one.pair) for one in problems]
    return joined(rows), jax.tree.map(lambda *leaves: joined(list(leaves)), *pairs)


def _coefficients(points: list[Point], before: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``d_w`` and ``d_l`` of every point under its objective."""
    found = np.zeros_like(before)
    (w, l), n = before.T, lengths.T
    fallen = np.array([point.fallen for point in points], before.dtype)
    lp = PairLogProbs(*map(jnp.asarray, (w, l, w + fallen, l, *n)))
    for words in dict.fromkeys(point.objective for point in points):
        # of all points, so that every objective is compiled for one shape
        d = jax.jit(functools.partial(losses.coefficients, objective_of(words)))(lp)
        mine = np.array([point.objective == words for point in points])
        found[mine] = np.stack(d, 1)[mine]
    return found[:, 0], found[:, 1]


def _one_log_probs(params: jax.Array, pair: Pair) -> jax.Array:
    return log_probs(params, jax.tree.map(lambda leaf: leaf[None], pair))[0]


def _step(params: jax.Array, pair: Pair, position: jax.Array, *scalars: jax.Array) -> Arrays:
    """One plain step on one pair, and what it changed: of the whole responses, and at one position alone."""
    here = jnp.arange(pair.mask.shape[-1]) == position
    alone = pair._replace(mask=pair.mask & here[None])
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), pair, alone)
    d_w, d_l, rate = scalars
    pull_back = geometry.vjp_with_geometry(log_probs, params, both)[1]
    # the mean of two pairs, of which the second has no coefficients
    gradient, geometries = pull_back(*(jnp.stack([2 * d, jnp.zeros_like(d)]) for d in (d_w, d_l)))
    updates, _ = optax.scale(-rate).update(gradient, optax.EmptyState())
    changes = geometry.step_changes(log_probs, params, updates, optax.apply_updates(params, updates), both)
    s, at = (jax.tree.map(lambda leaf, i=i: leaf[i], geometries) for i in (0, 1))
    found = {
        **s._asdict(),
        "cosine": geometry.cosine(s),
        "case": geometry.case_of(s, d_w, d_l),
        "position_inner_product": at.inner_product,
    }
    for side, value in geometry.predicted_changes(s, d_w, d_l, rate)._asdict().items():
        found[f"predicted_{side}"] = value
    for kind, change in changes._asdict().items():
        for side, value in change._asdict().items():
            found |= {f"{kind}_{side}": value[0], f"position_{kind}_{side}": value[1]}
    return found
