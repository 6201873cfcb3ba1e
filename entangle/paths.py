"""Names of a tree's leaves, written in one way: what functions of "a parameter's path" are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """Every leaf with its path, as ``jax.tree_util.keystr(path, simple=True, separator="/")`` writes it, in the tree's order.

    Example:
      >>> from entangle.paths import named_leaves
      >>> named_leaves({"layers": [1.0, 2.0], "head": 3.0})
      [('head', 3.0), ('layers/0', 1.0), ('layers/1', 2.0)]
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
