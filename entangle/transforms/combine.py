"""The head of a pair chain: PairGradients in, one update tree out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from entangle.geometry import gram
from entangle.geometry.products import accumulator_dtype
from entangle.transforms.weightings import PairWeights, RunningWeighting, Weighting, as_running
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
      stacked: path to whether the parameter's leading axis is the layers of a scan: every layer is then a group of its own,
        within its group if there are groups.

    Returns:
      An optax transform whose updates are PairGradients going in and a tree like the parameters coming out, leaf
      dtypes kept; its state is a CombinePairState, which :func:`combined` finds in the chain's state.

    Raises:
      TypeError: at trace time, when the updates are not PairGradients.
      ValueError: at init, when a group has no weighting or a weighting no group, or when parameters of one group have
        different numbers of layers.

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

    def parts(params: Params) -> dict[str, _Part]:
        return _parts(params, group or (lambda path: _ALL), stacked or (lambda path: False))

    def weighting_of(name: str) -> RunningWeighting:
        return as_running(weighting[name] if isinstance(weighting, Mapping) else weighting)

    def shown(by_name: dict[str, Any]) -> Any:
        return by_name if group is not None else by_name[_ALL]

    def init_fn(params: Params) -> CombinePairState:
        found = parts(params)
        if isinstance(weighting, Mapping) and set(weighting) != set(found):
            raise ValueError(f"weightings are for the groups {sorted(weighting)}, the parameters' are {sorted(found)}")
        dtype = accumulator_dtype(params)
        zeros = {name: jnp.zeros(() if part.layers is None else part.layers, dtype) for name, part in found.items()}
        grams = {name: PairGeometry(zero, zero, zero) for name, zero in zeros.items()}
        weights = {name: PairWeights(zero, zero) for name, zero in zeros.items()}
        memory = {name: weighting_of(name).init(g) for name, g in grams.items()}
        return CombinePairState(shown(grams), shown(weights), shown(memory))

    def update_fn(
        updates: PairGradients, state: CombinePairState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, CombinePairState]:
        del params, extra_args
        require_pair(updates, "combine_pair")
        chosen, tree = jax.tree.flatten(updates.chosen)
        rejected = jax.tree.leaves(updates.rejected)
        result = [*chosen]
        grams, weights, memory = {}, {}, {}
        for name, part in parts(updates.chosen).items():
            two = PairGradients([chosen[i] for i in part.leaves], [rejected[i] for i in part.leaves])
            grams[name] = gram(two, leading_axes=0 if part.layers is None else 1)
            before = state.memory[name] if group is not None else state.memory
            found, memory[name] = weighting_of(name).update(grams[name], before)
            weights[name] = PairWeights(*(jnp.asarray(w, grams[name].inner_product.dtype) for w in found))
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
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, CombinePairState))
    return [leaf for leaf in leaves if isinstance(leaf, CombinePairState)]


def require_pair(updates: Any, name: str) -> None:
    """Refuse updates that are not PairGradients, naming what to do.

    Raises:
      TypeError: they are something else.
    """
    if not isinstance(updates, PairGradients):
        raise TypeError(
            f"{name} takes PairGradients, got {type(updates).__name__}: "
            "put it first in the chain and pass PairGradients(chosen, rejected) as the updates"
        )


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


def _parts(params: Params, group: Callable[[str], str], stacked: Callable[[str], bool]) -> dict[str, _Part]:
    parts: dict[str, _Part] = {}
    for index, (key_path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        layers = leaf.shape[0] if stacked(path) else None
        part = parts.setdefault(group(path), _Part([], layers))
        if part.layers != layers:
            raise ValueError(f"{path} has {_counted(layers)}, others of group {group(path)!r} {_counted(part.layers)}")
        part.leaves.append(index)
    return parts


def _counted(layers: int | None) -> str:
    return "no layers" if layers is None else f"{layers} layers"
