"""The mirror of a run in Weights & Biases; the only place that imports wandb. Nothing reads it back."""

from __future__ import annotations

import netrc
import os
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlparse

if TYPE_CHECKING:
    import wandb


class Tracker(Protocol):
    """What the loop needs of a tracker."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Mirror the metrics of one step."""

    def close(self) -> None:
        """End the mirror; the run may be resumed later under the same id."""


class NoTracker:
    """Mirrors nothing.

    Example:
      >>> from entangle.training.tracking import NoTracker
      >>> NoTracker().log(1, {"loss": 0.5})
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def run_id(folder: str | os.PathLike[str]) -> str:
    """The id under which a run folder is mirrored: drawn once and kept in the folder, wherever that is moved to.

    Example:
      >>> import tempfile
      >>> from entangle.training.tracking import run_id
      >>> folder = tempfile.mkdtemp()
      >>> run_id(folder) == run_id(folder), run_id(folder) == run_id(tempfile.mkdtemp())
      (True, False)
    """
    file = Path(folder) / "wandb_id.txt"
    if not file.exists():
        partial = file.with_suffix(".partial")
        partial.write_text(secrets.token_hex(8), encoding="utf-8")
        partial.replace(file)
    return file.read_text(encoding="utf-8")


def _key_is_configured(host: str) -> bool:
    # W&B's own check verifies the key over the network, and a mirror that is down must not stop a run.
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


# Not tried again by this process: a sweep would wait for it at every trial.
_unreachable: set[str] = set()


class WandbTracker:
    """Mirrors metrics to W&B: online when a key is configured, else offline inside the run folder.

    The key itself stays where W&B keeps it. ``WANDB_MODE`` overrides the choice.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: Mapping[str, Any],
        project: str = "entangle",
        group: str | None = None,
    ):
        """Start or resume the mirror of a run folder.

        Args:
          folder: the run folder; W&B's files go into its ``wandb`` folder.
          config: the run's configuration.
          project: W&B project.
          group: W&B's group of the run, for example its sweep.
        """
        import wandb  # takes a second, which runs that mirror nothing need not wait

        def start(mode: Any) -> wandb.Run:
            return wandb.init(
                project=project,
                group=group,
                reinit="create_new",  # trials of one program are mirrored at the same time
                dir=str(folder),
                id=run_id(folder),
                name="/".join(Path(folder).resolve().parts[-4:]),
                config=dict(config),
                resume="allow",
                mode=mode,
                settings=wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True),
            )

        host = urlparse(wandb.setup().settings.base_url).hostname or ""
        online = _key_is_configured(host) and host not in _unreachable
        mode = os.environ.get("WANDB_MODE") or ("online" if online else "offline")
        try:
            self._run = start(mode)
        except wandb.errors.Error as error:
            warnings.warn(f"W&B cannot be reached ({error}); the mirror of {folder} is offline", stacklevel=2)
            _unreachable.add(host)
            wandb.teardown()  # its service still holds the run's id
            self._run = start("offline")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Mirror the metrics of one step."""
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """End the mirror."""
        self._run.finish()
