"""Checkpoints of state and data position; the only place that imports orbax."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from entangle import distributed
from entangle.errors import UserError
from entangle.paths import named_leaves
from entangle.training.run_folder import FULL
from entangle.training.step import TrainState
from entangle.types import Params

T = TypeVar("T")

_SHOWN = 3
_OWN_FILES = 2**20  # bytes beside the arrays: names, shapes, shardings, the data position; 0.1 MB for fourteen arrays


class Checkpoints:
    """The checkpoints of one run. A save is whole or absent, whenever the process is killed.

    Of several processes all open, save and restore, each its own part, in a folder that all of them see. What one number of
    processes and mesh saved, another restores.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> from entangle.training.checkpoints import Checkpoints
      >>> checkpoints = Checkpoints(tempfile.mkdtemp())
      >>> checkpoints.save(3, {"w": jnp.ones(2)}, {"next_index": 3})
      >>> state, position = checkpoints.restore({"w": jnp.zeros(2)})
      >>> state["w"].tolist(), position
      ([1.0, 1.0], {'next_index': 3})
      >>> checkpoints.close()
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2):
        """Open the folder, making it if needed.

        Args:
          folder: where the checkpoints are.
          keep: how many of the latest to keep.
        """
        self.folder = Path(folder).resolve()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "position": ocp.JsonCheckpointHandler()},
        )

    @property
    def latest(self) -> int | None:
        """Step of the latest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: Mapping[str, Any]) -> None:
        """Save the state (pytree of arrays) and the data position (JSON-able) under a step; done when it returns.

        The latest step is not saved again: its checkpoint stays as it is.

        Raises:
          UserError: the disk is full; the checkpoints before it are still there, and no part of it is.
          ValueError: there is a checkpoint of a later step.
        """
        if step == self.latest:
            return
        if self.latest is not None and step < self.latest:
            raise ValueError(f"{self.folder}: step {step} cannot be saved after step {self.latest}")
        # asked before: one of several processes that failed in the middle of a save would leave the others waiting for it
        distributed.from_writer(lambda: self._refuse_full(step, state))
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(dict(position)))
        try:
            self._manager.save(step, args=args)
        except (OSError, ValueError) as error:
            self._remove_partial(f"{step}.*")
            if (code := _error_number(error)) not in FULL:
                raise
            raise self._not_saved(step, os.strerror(code)) from error

    def _refuse_full(self, step: int, state: Any) -> None:
        needed = _OWN_FILES + sum(_bytes(leaf) for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise self._not_saved(step, f"it needs {needed:,} bytes, {free:,} are free")

    def _not_saved(self, step: int, reason: str) -> UserError:
        return UserError(
            f"{self.folder}: the checkpoint of step {step} cannot be written: {reason}; {self._instead(step)}"
        )

    def _instead(self, step: int) -> str:
        before = [other for other in self._manager.all_steps() if other != step]
        return f"the latest before it is {self.folder / str(max(before))}" if before else "there is none before it"

    def tidy(self) -> None:
        """Remove what saves that were killed have left; only while no other process saves here."""
        if distributed.is_writer():
            self._remove_partial("*.*")

    def _remove_partial(self, steps: str) -> None:
        for partial in self.folder.glob(f"{steps}orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)

    def restore(self, like: T, step: int | None = None) -> tuple[T, dict[str, Any]]:
        """Restore a checkpoint.

        Args:
          like: pytree of arrays (or shapes) with the structure, dtypes and shardings wanted; shapes without a sharding are
            restored whole on every device.
          step: which one; None takes the latest.

        Returns:
          State and data position.

        Raises:
          UserError: there is no checkpoint, it is of another model or optimizer, or it cannot be read.
        """
        step = self.latest if step is None else step
        if step is None:
            raise UserError(f"{self.folder} holds no checkpoint")
        abstract = jax.tree.map(_placed, like)
        with self._reading(step):
            saved = self._manager.item_metadata(step)["state"]
        self._refuse_other(step, dict(named_leaves(saved.tree)), dict(named_leaves(abstract)))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
        with self._reading(step):
            restored = self._manager.restore(step, args=args)
        return restored["state"], restored["position"]

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax raises this very class, too, where an array's bytes are damaged
            if isinstance(error, (OSError, jax.errors.JaxRuntimeError)) and not isinstance(error, FileNotFoundError):
                raise  # a file system or a device that fails, no checkpoint that is damaged
            raise UserError(
                f"{self.folder}, step {step}: cannot be read: {_reason(error)}; "
                f"{self._instead(step)}: remove the folder of step {step} to go on from there"
            ) from error

    def _refuse_other(self, step: int, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        different = []
        for name in [*wanted, *(name for name in saved if name not in wanted)]:
            there, here = (_said(leaves.get(name)) for leaves in (saved, wanted))
            if there != here:
                different.append(f"{name} is {there} there and {here} here")
        if different:
            more = f" (and {len(different) - _SHOWN} more)" if len(different) > _SHOWN else ""
            raise UserError(f"{self.folder}, step {step}: does not fit this run: {'; '.join(different[:_SHOWN])}{more}")

    def close(self) -> None:
        """Release the folder."""
        self._manager.close()


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """What is wanted of a leaf; the sharding that was saved may name devices that are not here."""
    shape = ocp.utils.to_shape_dtype_struct(leaf)
    return shape if shape.sharding is not None else shape.update(sharding=_everywhere())


def _everywhere() -> Sharding:
    if jax.device_count() == 1:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(Mesh(np.asarray(jax.devices()), ("all",)), P())


def _bytes(leaf: Any) -> int:
    return leaf.nbytes if isinstance(leaf, jax.Array | np.ndarray) else np.asarray(leaf).nbytes


def _said(leaf: Any) -> str:
    return "missing" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _error_number(error: Exception) -> int | None:
    """What the operating system said, also where TensorStore tells it in words alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\[os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON ({error})"
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return line.split(" [tensorstore_spec")[0].split(" See full TensorStore details")[0][:300]


def final_params(folder: Path, like: TrainState) -> Params:
    """Parameters of a run's latest checkpoint.

    Args:
      folder: the run folder.
      like: a state (arrays or shapes) of the same structure.

    Raises:
      UserError: there is no checkpoint, or it does not fit.
    """
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        return checkpoints.restore(like)[0].params
    finally:
        checkpoints.close()
