"""The head of a pair chain: PairGradients in, one update tree out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from entangle.geometry import gram
from entangle.geometry.products import accumulator_dtype
from entangle.paths import named_leaves, nodes_of
from entangle.transforms.weightings import PairWeights, RunningWeighting, Weighting, as_running, check_function
from entangle.types import PairGeometry, PairGradients, Params

AnyWeighting = Weighting | RunningWeighting


class CombinePairState(NamedTuple):
    """What the head saw at its last step, for logging, and what its weighting remembers.

    With groups each field is a dictionary: name of the group to what follows.

    Attributes:
      gram: Gram of the two batch gradients, scalars; ``[L]`` for a group of stacked layers.
      weights: the two weights, of the same shape.
      memory: of a ``RunningWeighting``, else ``()``.
    """

    gram: PairGeometry | dict[str, PairGeometry]
    weights: PairWeights | dict[str, PairWeights]
    memory: Any = ()


def combine_pair(
    weighting: AnyWeighting | Mapping[str, AnyWeighting],
    *,
    group: Callable[[str], str] | None = None,
    stacked: Callable[[str], bool] | None = None,
    where: Callable[[str], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Combine PairGradients into ``y rejected - x chosen``, the descent gradient that the rest of an optax chain expects.

    Put it first in the chain. With :func:`margin` the result is exactly the gradient of the mean loss.

    Scope: without ``group`` there is one Gram of all parameters, and what the weighting promises holds for the two batch
    sums. With it every group has a Gram and weights of its own, and the promise holds for every group's share of the change,
    so for their sum, too: that is the stronger demand, and mostly the shorter step.

    Args:
      weighting: from the Gram of the two gradients to the weights (x, y); with ``group`` also one for every group by name.
      group: a parameter's path, as ``jax.tree_util.keystr(path, simple=True, separator="/")`` writes it, to the name of its
        group: ``lambda path: path`` is a group for every parameter, ``lambda path: path.split("/")[0]`` one for every block.
      where: path to whether the parameter is trained; the others are in no Gram and get zero. Name them here when a
        transform after the head freezes them: a Gram that counts what never moves promises nothing.
      stacked: path to whether the parameter's leading axis is the layers of a scan: every layer is then a group of its own,
        within its group. Parameters beside the stack need other groups.

    Returns:
      An optax transform whose updates are PairGradients going in and a tree like the parameters coming out, leaf
      dtypes kept; its state is a CombinePairState, which :func:`combined` finds in the chain's state.

    Raises:
      TypeError: the weighting is none; or, at trace time, it does not give two weights, or the updates are not PairGradients
        of floating arrays.
      ValueError: at init, when a group has no weighting or a weighting no group, or when parameters of one group have
        different numbers of layers; at trace time, when chosen and rejected are not alike, or have
        other groups or layers than the parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from entangle import transforms
      >>> from entangle.types import PairGradients
      >>> tx = optax.chain(transforms.combine_pair(transforms.margin()), optax.sgd(0.5))
      >>> params = jnp.array([1.0, 1.0])
      >>> gradients = PairGradients(chosen=jnp.array([1.0, 0.0]), rejected=jnp.array([0.0, 1.0]))
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> updates.tolist()  # towards the chosen response, away from the rejected one
      [0.5, -0.5]

      One Gram for every parameter, read from the state:

      >>> params = {"body": jnp.ones(2), "head": jnp.ones(2)}
      >>> tx = transforms.combine_pair(transforms.normalized(), group=lambda path: path)
      >>> gradients = PairGradients({"body": jnp.array([3.0, 4.0]), "head": jnp.array([0.0, 2.0])}, params)
      >>> _, state = tx.update(gradients, tx.init(params), params)
      >>> {name: round(float(w.chosen), 3) for name, w in state.weights.items()}
      {'body': 0.2, 'head': 0.5}
    """
    if isinstance(weighting, Mapping) and group is None:
        raise ValueError("weightings by name of a group need group, a function of a parameter's path to its name")

    for name, function in ("group", group), ("stacked", stacked), ("where", where):
        check_function(name, function, "a parameter's path")
    for one in weighting.values() if isinstance(weighting, Mapping) else [weighting]:
        as_running(one)  # refuses what is none, before anything is compiled

    def parts(params: Params) -> dict[str, _Part]:
        return _parts(params, group or (lambda path: _ALL), stacked, where or (lambda path: True))

    def weighting_of(name: str) -> RunningWeighting:
        return as_running(weighting[name] if isinstance(weighting, Mapping) else weighting)

    def shown(by_name: dict[str, Any]) -> Any:
        return by_name if group is not None else by_name[_ALL]

    def zeros(part: _Part, dtype: jnp.dtype, kind: Any) -> Any:
        # an array each: what shares a buffer cannot be donated
        return kind(*(jnp.zeros(() if part.layers is None else part.layers, dtype) for _ in kind._fields))

    def init_fn(params: Params) -> CombinePairState:
        found = parts(params)
        if isinstance(weighting, Mapping) and set(weighting) != set(found):
            raise ValueError(f"weightings are for the groups {sorted(weighting)}, the parameters' are {sorted(found)}")
        leaves = jax.tree.leaves(params)
        dtypes = {name: accumulator_dtype([leaves[i] for i in part.leaves]) for name, part in found.items()}
        grams = {name: zeros(part, dtypes[name], PairGeometry) for name, part in found.items()}
        weights = {name: zeros(part, dtypes[name], PairWeights) for name, part in found.items()}
        memory = {name: weighting_of(name).init(g) for name, g in grams.items()}
        return CombinePairState(shown(grams), shown(weights), shown(memory))

    def update_fn(
        updates: PairGradients, state: CombinePairState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, CombinePairState]:
        del params, extra_args
        require_pair(updates, "combine_pair")
        chosen, tree = jax.tree.flatten(updates.chosen)
        rejected = jax.tree.leaves(updates.rejected)
        result = [jnp.zeros_like(leaf) for leaf in chosen]
        grams, weights, memory = {}, {}, {}
        found_parts = parts(updates.chosen)
        _require_parts(found_parts, {_ALL: state.gram} if group is None else state.gram)
        for name, part in found_parts.items():
            two = PairGradients([chosen[i] for i in part.leaves], [rejected[i] for i in part.leaves])
            fields: tuple[Any, ...] = tuple(state)
            before: Any = state if group is None else CombinePairState(*(field[name] for field in fields))
            # in the dtype of the state, which is the parameters', where gradients are narrower or wider
            dtype = before.gram.inner_product.dtype
            products = gram(two, leading_axes=0 if part.layers is None else 1)
            grams[name] = PairGeometry(*(x.astype(dtype) for x in products))
            found, memory[name] = weighting_of(name).update(grams[name], before.memory)
            weights[name] = PairWeights(*(w.astype(dtype) for w in found))
            for i in part.leaves:
                result[i] = weighed(weights[name], chosen[i], rejected[i])
        return jax.tree.unflatten(tree, result), CombinePairState(shown(grams), shown(weights), shown(memory))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def combined(opt_state: Any) -> list[CombinePairState]:
    """What the heads of a chain saw at the last step, found in the chain's state, however deep.

    Args:
      opt_state: of any chain with :func:`combine_pair` in it; wrappers of optax and dictionaries are looked into.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from entangle import transforms
      >>> tx = optax.chain(transforms.combine_pair(transforms.pcgrad()), optax.adamw(1e-3))
      >>> [state.weights.chosen.tolist() for state in transforms.combined(tx.init(jnp.zeros(2)))]
      [0.0]
    """
    return nodes_of(opt_state, CombinePairState)


def require_pair(updates: Any, name: str) -> None:
    """Refuse updates that are not PairGradients, naming what to do, and those whose two trees are not alike.

    Raises:
      TypeError: they are something else, or a leaf is no array of real floating numbers.
      ValueError: the two trees have other leaves, or leaves of other shapes.
    """
    if not isinstance(updates, PairGradients):
        raise TypeError(
            f"{name} takes PairGradients, got {type(updates).__name__}: "
            "put it first in the chain, which has one such head, and pass PairGradients(chosen, rejected) as the updates"
        )
    require_alike(name, "chosen and rejected", *updates)
    for side, tree in updates._asdict().items():
        for path, leaf in named_leaves(tree):
            kind = getattr(leaf, "dtype", type(leaf))
            if isinstance(kind, type) or not jnp.issubdtype(kind, jnp.floating):
                found = getattr(kind, "__name__", "float0" if kind == jax.dtypes.float0 else str(kind))
                raise TypeError(
                    f"{name}: {side} has {found} at {path or 'its root'}, and an array of real floating numbers is needed: "
                    "close over what is not trained, so that it has no gradient"
                )


def require_alike(name: str, what: str, one: Params, other: Params) -> None:
    """Refuse two trees that differ in structure or shapes, naming the first parameter where they do.

    Args:
      name: the transform's.
      what: the two trees', for the message.
      one: a tree.
      other: another.

    Raises:
      ValueError: they differ.
    """
    found = [[(path, jnp.shape(leaf)) for path, leaf in named_leaves(tree)] for tree in (one, other)]
    structures: list[Any] = [jax.tree.structure(tree) for tree in (one, other)]
    if found[0] == found[1] and structures[0] == structures[1]:
        return
    shapes = [dict(side) for side in found]
    apart = [path for path in {**shapes[0], **shapes[1]} if shapes[0].get(path) != shapes[1].get(path)]
    if apart:
        where = f"{apart[0]} is {' and '.join(str(side.get(apart[0], 'missing')) for side in shapes)}"
    else:
        where = f"{structures[0]} and {structures[1]}"
    raise ValueError(f"{name}: {what} are not trees of one structure and shapes: {where}")


def weighed(weights: PairWeights, chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """One leaf of ``y rejected - x chosen``; weights of shape ``[]``, or ``[L]`` for the layers of the leading axis."""
    wide = accumulator_dtype((chosen, rejected))
    x, y = (w.astype(wide).reshape(w.shape + (1,) * (chosen.ndim - w.ndim)) for w in weights)
    return (y * rejected.astype(wide) - x * chosen.astype(wide)).astype(chosen.dtype)


_ALL = "all"


class _Part(NamedTuple):
    """Leaves that share a Gram: their indices, and how many layers they are stacked of (None: not stacked)."""

    leaves: list[int]
    layers: int | None


def _parts(
    params: Params,
    group: Callable[[str], str],
    stacked: Callable[[str], bool] | None,
    where: Callable[[str], bool],
) -> dict[str, _Part]:
    parts: dict[str, _Part] = {}
    for index, (path, leaf) in enumerate(named_leaves(params)):
        if not where(path):
            continue
        in_stack = stacked is not None and stacked(path)
        if in_stack and not leaf.shape:
            raise ValueError(f"{path} is a scalar, and has no axis of layers")
        layers = leaf.shape[0] if in_stack else None
        part = parts.setdefault(group(path), _Part([], layers))
        if part.layers != layers:
            raise ValueError(
                f"{path} has {_counted(layers)}, others of group {group(path)!r} {_counted(part.layers)}: give them groups of "
                'their own, as group=lambda path: path.split("/")[0] does'
            )
        part.leaves.append(index)
    if not jax.tree.leaves(params):
        return {_ALL: _Part([], None)}  # what optax.tree.map_params asks with
    if stacked is not None and all(part.layers is None for part in parts.values()):
        raise ValueError("stacked says so of no parameter")
    if not parts:
        raise ValueError("no parameters are trained: where says so of all")
    return parts


def _require_parts(parts: dict[str, _Part], kept: Any) -> None:
    """Refuse gradients of other groups, or of other numbers of layers, than the Grams of the state."""
    made_for = {name: s.inner_product.shape for name, s in kept.items()}
    given = {name: () if part.layers is None else (part.layers,) for name, part in parts.items()}
    if given != made_for:
        raise ValueError(
            f"combine_pair: the gradients' groups and their layers are {given}, those of the parameters that the state "
            f"was made for are {made_for}"
        )


def _counted(layers: int | None) -> str:
    return "no layers" if layers is None else f"{layers} layers"
