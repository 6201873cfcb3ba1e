"""One small step of every remedy from one start point, in float64: to first order and in fact, for every pair."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from entangle import losses, training
from entangle.losses import Coefficients, Objective
from entangle.paths import nodes_of
from entangle.training import PairChain, PreferenceExamples
from entangle.training.gradients import PairRule, pair_log_probs
from entangle.types import LogProbFn, PairBatch, PairGeometry, PairGradients, Params
from experiments.one_step_changes import ALONE, ON_BATCH, SETTINGS, Changes, Measured, agreement

SAME = 1e-9
"""Relative distance of two updates below which they are one, and looked at once: many rules share a direction."""
AGREEMENT, SHORTER, TRIES = 0.99, 0.1, 3
"""Share of rows that first order must be right about, or the step is made shorter, so much and so often."""


class Remedy(NamedTuple):
    """A pair chain and what it is called."""

    name: str
    pair_chain: PairChain

    @property
    def rule(self) -> PairRule | None:
        """On the coefficients of every pair, or None."""
        return self.pair_chain.rule

    def chain(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        """The whole chain; PairGradients in, an update out."""
        return self.pair_chain.around(optax.chain(self.pair_chain.head, optimizer))


SGD, ADAM = optax.scale(-1.0), optax.chain(optax.scale_by_adam(), optax.scale(-1.0))


class Programs(NamedTuple):
    """Compiled functions, made once for all start points; the model's own are of one shape each, since they compile longest.

    Attributes:
      remedies: what is measured, margin first.
      rows: params and PART pairs to log-probabilities ``[PART, 2]`` and their gradients ``[PART, 2, P]``.
      log_probs: params and PART pairs to ``[PART, 2]``.
      alone: params, one pair, its gradients, directions ``[R, 2]``, their number and a length to both changes ``[R, 2]``.
      coefficients: log-probabilities, the reference's and pairs to coefficients.
      directions: geometry and coefficients to every remedy's step on each pair alone, ``[R, N, 2]``.
      updates: of every remedy: gradients, those of the warm batches, and Adam's moments after margin's to the updates by
        setting and its own moments.
    """

    remedies: tuple[Remedy, ...]
    rows: Callable[..., tuple[jax.Array, jax.Array]]
    log_probs: Callable[..., jax.Array]
    alone: Callable[..., tuple[jax.Array, jax.Array]]
    coefficients: Callable[..., Coefficients]
    directions: Callable[..., jax.Array]
    updates: dict[str, Callable[..., Any]]


PART = 8
"""Pairs at a time."""


def programs(log_prob_fn: LogProbFn, objective: Objective, names: Sequence[str]) -> Programs:
    """Make the compiled functions.

    Args:
      log_prob_fn: the policy.
      objective: of single pairs.
      names: remedies; margin is measured in any case.
    """
    found = tuple(Remedy(name, training.pair_chain(name)) for name in dict.fromkeys(("margin", *names)))

    def rows(params: Params, part: PairBatch) -> tuple[jax.Array, jax.Array]:
        def one(pair: PairBatch) -> tuple[jax.Array, jax.Array]:
            def both(p: Params) -> tuple[jax.Array, jax.Array]:
                log_probs = log_prob_fn(p, jax.tree.map(lambda leaf: leaf[None], pair))[0]
                return log_probs, log_probs

            gradients, log_probs = jax.jacrev(both, has_aux=True)(params)
            return log_probs, jax.vmap(lambda tree: ravel_pytree(tree)[0])(gradients)

        return jax.vmap(one)(part)

    def coefficients(log_probs: jax.Array, reference: jax.Array, pairs: PairBatch) -> Coefficients:
        lp = pair_log_probs(log_probs, PreferenceExamples(pairs, reference))
        d = losses.loss_and_coefficients(objective, lp)[1]
        return Coefficients(*(x.astype(log_probs.dtype) for x in d))

    return Programs(
        found,
        jax.jit(rows),
        jax.jit(log_prob_fn),
        jax.jit(functools.partial(_alone, log_prob_fn)),
        jax.jit(coefficients),
        jax.jit(lambda s, d: jnp.stack([_directions(one, s, d) for one in found])),
        {one.name: jax.jit(functools.partial(_updates, one)) for one in found},
    )


class _Point(NamedTuple):
    """A start point in float64: parameters, N pairs, and what was found there."""

    params: Params
    pairs: PairBatch
    coefficients: Coefficients
    geometry: PairGeometry
    norms: np.ndarray


def measure(
    made: Programs, reference: Params, params: Params, pairs: PairBatch, warm: PairBatch, step: float
) -> Measured:
    """Make every remedy's step in every setting, in float64, whatever the parameters come in.

    Args:
      made: the compiled functions.
      reference: parameters of the reference model.
      params: the start point.
      pairs: N pairs that the step is made on.
      warm: ``[K, B, ...]``, other batches of B pairs, for Adam's moments.
      step: length of every update; shorter where first order is wrong about too many rows.
    """
    with jax.enable_x64(True):
        reference, params = jax.tree.map(_widened, (reference, params))
        point = _look(made, reference, params, pairs)
        other = _look(made, reference, params, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), warm))
        gradients = _gradients(made, point, 1)
        plain = jax.tree.map(lambda leaf: leaf[0], gradients[None])
        lengths = np.array([jnp.linalg.norm(v) for v in (*plain, plain.chosen - plain.rejected)])
        updates = _all_updates(made, gradients, _gradients(made, other, len(warm.tokens)))
        changes = _measure(made, point, updates, step)
        return Measured(changes, np.stack(point.coefficients, 1), point.norms, lengths)


def _widened(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _parts(pairs: PairBatch) -> Iterator[tuple[PairBatch, slice]]:
    """PART pairs at a time, the last ones filled up with the first pair; and which of all pairs they are."""
    count = len(pairs.tokens)
    for start in range(0, count, PART):
        index = np.arange(start, start + PART)
        yield jax.tree.map(lambda leaf, i=index: leaf[np.where(i < count, i, 0)], pairs), slice(start, start + PART)


def _log_probs(made: Programs, params: Params, pairs: PairBatch) -> np.ndarray:
    found = [made.log_probs(params, part) for part, _ in _parts(pairs)]
    return np.concatenate(found)[: len(pairs.tokens)]


def _look(made: Programs, reference: Params, params: Params, pairs: PairBatch) -> _Point:
    now, grams = [], []
    for part, _ in _parts(pairs):
        log_probs, rows = made.rows(params, part)
        now.append(log_probs)
        grams.append(jnp.einsum("nsp,ntp->nst", rows, rows))
    count = len(pairs.tokens)
    gram = jnp.concatenate(grams)[:count]
    s = PairGeometry(gram[:, 0, 0], gram[:, 1, 1], gram[:, 0, 1])
    before = jnp.asarray(_log_probs(made, reference, pairs))
    d = made.coefficients(jnp.concatenate(now)[:count], before, pairs)
    norms = np.sqrt(np.stack([s.chosen_sq_norm, s.rejected_sq_norm], 1))
    return _Point(params, pairs, d, s, norms)


def _gradients(made: Programs, point: _Point, batches: int) -> dict[str | None, PairGradients]:
    """Of as many batches of equal size, ``[batches, P]``, after every remedy's rule; under None without one.

    A gradient is one vector: chains take any tree, and one leaf compiles fast.
    """
    d, s = point.coefficients, point.geometry
    weights = {None: d} | {one.name: one.rule(d, s) for one in made.remedies if one.rule is not None}
    table = np.stack([np.stack(w, 1) for w in weights.values()])  # [rules, N, 2]
    size = table.shape[1] // batches
    means = []
    for batch in (slice(k * size, (k + 1) * size) for k in range(batches)):
        total: Any = 0.0
        for part, places in _parts(jax.tree.map(lambda leaf, b=batch: leaf[b], point.pairs)):
            weighed = table[:, batch][:, places] / size
            rows = made.rows(point.params, part)[1][: weighed.shape[1]]
            total = total + jnp.einsum("rns,nsp->rsp", weighed, rows)
        means.append(total)
    each = jnp.stack(means, 1)  # [rules, batches, 2, P]
    return {name: PairGradients(both[:, 0], both[:, 1]) for name, both in zip(weights, each, strict=True)}


def _unit(vector: jax.Array) -> jax.Array:
    length = jnp.sqrt(jnp.vdot(vector, vector))
    return jnp.where(length > 0, vector / jnp.where(length > 0, length, 1), 0)


def _updates(
    one: Remedy, gradients: PairGradients, warm: PairGradients, plain: Any
) -> tuple[dict[str, jax.Array], Any]:
    """Updates of length 1 by setting, and Adam's moments after the remedy's own warm batches."""
    params = gradients.chosen

    def update(optimizer: optax.GradientTransformation, state: Any = None) -> jax.Array:
        tx = one.chain(optimizer)
        return _unit(tx.update(gradients, tx.init(params) if state is None else state, params)[0])

    tx = one.chain(ADAM)
    fresh = tx.init(params)
    own = jax.lax.scan(lambda state, g: (tx.update(g, state, params)[1], None), fresh, warm)[0]
    (last,) = nodes_of(own, optax.ScaleByAdamState)
    warm_start = _with_adam(fresh, last if plain is None else plain)
    by_setting = (update(SGD), update(ADAM), update(ADAM, warm_start), update(ADAM, own))
    return dict(zip(ON_BATCH, by_setting, strict=True)), last


def _with_adam(state: Any, moments: optax.ScaleByAdamState) -> Any:
    """A chain's state with Adam's moments in the place of its own."""

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    return jax.tree.map(lambda node: moments if is_adam(node) else node, state, is_leaf=is_adam)


def _all_updates(
    made: Programs, gradients: dict[str | None, PairGradients], warm: dict[str | None, PairGradients]
) -> dict[tuple[str, str], np.ndarray]:
    moments = None
    updates: dict[tuple[str, str], np.ndarray] = {}
    for one in made.remedies:  # margin is the first of them
        key = None if one.rule is None else one.name
        batch = jax.tree.map(lambda leaf: leaf[0], gradients[key])
        found, last = made.updates[one.name](batch, warm[key], moments)
        moments = last if moments is None else moments
        updates |= {(setting, one.name): np.asarray(update) for setting, update in found.items()}
    return updates


def _measure(
    made: Programs, point: _Point, updates: dict[tuple[str, str], np.ndarray], step: float
) -> dict[str, dict[str, Changes]]:
    which, distinct = _distinct(list(updates.values()))
    owns, own = _distinct(list(np.asarray(made.directions(point.geometry, point.coefficients))))
    stacked, back = jnp.asarray(np.stack(distinct)), ravel_pytree(point.params)[1]
    directions = np.zeros((len(made.remedies), *own[0].shape))
    directions[: len(own)] = own
    count, before = len(point.norms), _log_probs(made, point.params, point.pairs)
    slopes, own_slopes = np.zeros((count, 2, len(distinct))), np.zeros((count, len(directions), 2))
    moved: dict[float, np.ndarray] = {}  # a length to the changes [N, R, 2] of every pair alone

    def alone(length: float) -> np.ndarray:
        if length in moved:
            return moved[length]
        moved[length] = np.zeros_like(own_slopes)
        for part, places in _parts(point.pairs):
            rows = made.rows(point.params, part)[1]
            if length == step:
                slopes[places] = jnp.einsum("nsp,kp->nsk", rows, stacked)[: len(slopes[places])]
            for n in range(len(slopes[places])):
                pair = jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], part)
                given = directions[:, places.start + n]
                found = made.alone(point.params, pair, rows[n], given, len(own), length)
                own_slopes[places.start + n], moved[length][places.start + n] = found
        return moved[length]

    def together(k: int, length: float) -> np.ndarray:
        params = jax.tree.map(lambda p, u: p + length * u, point.params, back(stacked[k]))
        return _log_probs(made, params, point.pairs) - before

    alone(step)
    apart = [
        _short_enough(own_slopes[:, k], functools.partial(lambda k, t: alone(t)[:, k], k), point.norms, step)
        for k in range(len(own))
    ]
    whole = [
        _short_enough(slopes[..., k], functools.partial(together, k), point.norms, step) for k in range(len(distinct))
    ]
    changes: dict[str, dict[str, Changes]] = {setting: {} for setting in SETTINGS}
    changes[ALONE] = {one.name: apart[index] for one, index in zip(made.remedies, owns, strict=True)}
    for (setting, name), index in zip(updates, which, strict=True):
        changes[setting][name] = whole[index]
    return changes


def _short_enough(
    slopes: np.ndarray, realised: Callable[[float], np.ndarray], norms: np.ndarray, step: float
) -> Changes:
    for attempt in range(TRIES):
        length = step * SHORTER**attempt
        changes = Changes(length * slopes, realised(length), length)
        if agreement(changes, norms) > AGREEMENT:
            break
    return changes


def _distinct(vectors: list[np.ndarray]) -> tuple[list[int], list[np.ndarray]]:
    """For every vector the number of the first one that it equals, and those."""
    which: list[int] = []
    distinct: list[np.ndarray] = []
    for vector in vectors:
        near = (k for k, other in enumerate(distinct) if np.linalg.norm(vector - other) <= SAME * np.linalg.norm(other))
        index = next(near, len(distinct))
        if index == len(distinct):
            distinct.append(vector)
        which.append(index)
    return which, distinct


def _directions(one: Remedy, s: PairGeometry, d: Coefficients) -> jax.Array:
    """Unit vectors of every pair's own plain step, ``[N, 2]``, in an orthonormal basis of its two gradients.

    The chain itself is run, on the gradients' coordinates: it sees them through their inner products only.
    """
    d_w, d_l = d if one.rule is None else one.rule(d, s)
    tx = one.chain(SGD)

    def pair(d_w: jax.Array, d_l: jax.Array, s: PairGeometry) -> jax.Array:
        chosen, rejected = _coordinates(s)
        gradients = PairGradients(d_w * chosen, d_l * rejected)
        return _unit(tx.update(gradients, tx.init(chosen), chosen)[0])

    return jax.vmap(pair)(d_w, d_l, s)


def _coordinates(s: PairGeometry) -> tuple[jax.Array, jax.Array]:
    """Of both gradients of a pair: the first axis lies along the chosen one's."""
    length = jnp.sqrt(s.chosen_sq_norm)
    along = s.inner_product / length
    across = jnp.sqrt(jnp.maximum(s.rejected_sq_norm - along**2, 0))
    return jnp.stack([length, jnp.zeros_like(length)]), jnp.stack([along, across])


def _alone(
    log_prob_fn: LogProbFn,
    params: Params,
    pair: PairBatch,
    rows: jax.Array,
    directions: jax.Array,
    count: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Slopes and realised changes of one pair under steps on itself alone."""
    back = ravel_pytree(params)[1]
    first = _unit(rows[0])
    second = _unit(rows[1] - jnp.vdot(first, rows[1]) * first)
    before = log_prob_fn(params, pair)[0]

    def move(k: jax.Array, found: jax.Array) -> jax.Array:
        update = back(step * (directions[k, 0] * first + directions[k, 1] * second))
        return found.at[k].set(log_prob_fn(jax.tree.map(jnp.add, params, update), pair)[0] - before)

    realised = jax.lax.fori_loop(0, count, move, jnp.zeros_like(directions))
    return directions @ (jnp.stack([first, second]) @ rows.T), realised
