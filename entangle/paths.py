"""What a tree holds: its leaves by name, as functions of "a parameter's path" are given them, and its nodes by type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

Node = TypeVar("Node")


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """Every leaf with its path, as ``jax.tree_util.keystr(path, simple=True, separator="/")`` writes it, in the tree's order.

    Example:
      >>> from entangle.paths import named_leaves
      >>> named_leaves({"layers": [1.0, 2.0], "head": 3.0})
      [('head', 3.0), ('layers/0', 1.0), ('layers/1', 2.0)]
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def nodes_of(tree: Any, kind: type[Node]) -> list[Node]:
    """Every node of a type, however deep in the tree, for example a transform's state in that of a chain.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from entangle.paths import nodes_of
      >>> [state.count.tolist() for state in nodes_of(optax.adam(1e-3).init(jnp.zeros(2)), optax.ScaleByAdamState)]
      [0]
    """
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]
