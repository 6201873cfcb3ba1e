"""Optional dependencies: say which extra to install instead of naming a module nobody asked for."""

from __future__ import annotations

import importlib.util

from entangle.errors import MissingExtraError


def require(extra: str, *modules: str) -> None:
    """Check that the modules of an extra can be imported.

    Args:
      extra: name of the extra in ``setup.cfg``.
      *modules: top-level module names that the extra installs.

    Raises:
      MissingExtraError: one of them is missing; the message has the command that installs it.

    Example:
      >>> from entangle import extras
      >>> extras.require("train", "json")
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise MissingExtraError(
            f'{names} not installed: it comes with the extra "{extra}": scripts/setup {extra}, or pip install -e ".[{extra}]"'
        )
