"""Several processes as one program: started from the environment, agreeing with one another, ended together.

Each process has its own devices; ``jax.devices()`` are those of all. Process 0 alone writes to run folders, every process
writes its part of a checkpoint. In a program of one process everything here does nothing.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from entangle.errors import UserError

T = TypeVar("T")

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Environment variables: ``host:port`` where process 0 listens, how many processes there are, which one this is."""
HEARTBEAT_SECONDS = 100
LEAVING_SECONDS = 10
_SHUTDOWN_SECONDS = 60
_BLOCK = 1024
_alone = False  # once looked for and not found, other processes are not looked for again, which JAX forbids when in use


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> None:
    """Make this process one of several, where there are several; called before anything else of JAX.

    What is not given is taken from ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``, then from the
    cluster that JAX finds itself in (Cloud TPU pods, GKE, Slurm, Open MPI). Where nothing is found, or one process is asked
    for, nothing is done, and calls that follow do not look again.

    Args:
      coordinator: ``host:port`` where process 0 listens.
      processes: how many there are.
      process_id: which one this is, from 0.
      heartbeat_seconds: after so long without a sign of life a process is taken for dead, and JAX ends the others.

    Raises:
      UserError: a number is none or out of range, the coordinator is no ``host:port``, or something is missing.
      RuntimeError: JAX has already been used.

    Example:
      >>> from entangle import distributed
      >>> distributed.initialize(processes=1)
      >>> distributed.initialize("10.0.0.1:1234", 4, 4)
      Traceback (most recent call last):
      entangle.errors.UserError: process 4 of 4: processes are counted from 0
    """
    coordinator = coordinator or os.environ.get(ADDRESS) or None
    processes = _number(os.environ, COUNT) if processes is None else processes
    process_id = _number(os.environ, INDEX) if process_id is None else process_id
    global _alone
    given = any(part is not None for part in (coordinator, processes, process_id))
    if processes == 1 or jax.distributed.is_initialized() or (_alone and not given):
        return
    if processes is not None and (processes < 1 or not 0 <= (process_id or 0) < processes):
        raise UserError(f"process {process_id} of {processes}: processes are counted from 0")
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"{ADDRESS}={coordinator}: write host:port, such as 10.0.0.1:1234")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    found = (coordinator, processes, process_id)
    try:
        jax.distributed.initialize(
            *found,
            # what is known in full is not looked for
            cluster_detection_method="deactivate" if None not in found else None,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        if given:
            said = ", ".join(f"{name}={part}" for name, part in zip((ADDRESS, COUNT, INDEX), found, strict=True))
            raise UserError(f"several processes need all of {said}, or a cluster that JAX knows") from error
        _alone = True


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if text and not text.isdecimal():
        raise UserError(f"{name}={text} is no number")
    return int(text) if text else None


def several() -> bool:
    """Whether this process is one of several.

    Example:
      >>> from entangle import distributed
      >>> distributed.several()
      False
    """
    # asked first: a program that never computes must not take the devices
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_writer() -> bool:
    """Whether this process is the one that writes to run folders: process 0.

    Example:
      >>> from entangle import distributed
      >>> distributed.is_writer()
      True
    """
    return not several() or jax.process_index() == 0


def gathered(value: T) -> list[T]:
    """What every process has, in the processes' order; called by all of them.

    Args:
      value: JSON-able; tuples become lists.

    Example:
      >>> from entangle import distributed
      >>> distributed.gathered({"rows": [1, 2]})
      [{'rows': [1, 2]}]
    """
    if not several():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.asarray(text.size, np.int32)))
    padded = np.zeros(-(-int(sizes.max()) // _BLOCK) * _BLOCK, np.uint8)  # few shapes, few compilations
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes.tolist(), strict=True)]


def together(make: Callable[[], T]) -> T:
    """Call a function on every process; what one of them refuses ends all, with the same message.

    Args:
      make: of this process.

    Returns:
      What it returned on this process.

    Raises:
      UserError: it was raised on this or another process.

    Example:
      >>> from entangle import distributed
      >>> distributed.together(lambda: 3)
      3
    """
    if not several():
        return make()
    value, refused = None, None
    try:
        value = make()
    except UserError as error:
        refused = str(error)
    if errors := [error for error in gathered(refused) if error is not None]:
        raise UserError(errors[0])
    return value  # type: ignore[return-value]


def from_writer(make: Callable[[], T]) -> T:
    """Call a function on process 0 alone; every process gets what it returned, or refuses what it refused.

    Args:
      make: to something JSON-able.

    Raises:
      UserError: it was raised on process 0.

    Example:
      >>> from entangle import distributed
      >>> distributed.from_writer(lambda: 3)
      3
    """
    return gathered(together(lambda: make() if is_writer() else None))[0]  # type: ignore[return-value]


def writer_first(make: Callable[[], T]) -> T:
    """Call a function on process 0, then on the others, which find what it prepared on a disk that they share.

    Args:
      make: of this process.

    Raises:
      UserError: see :func:`together`.

    Example:
      >>> from entangle import distributed
      >>> distributed.writer_first(lambda: 3)
      3
    """
    first = together(lambda: make() if is_writer() else None)
    others = together(lambda: None if is_writer() else make())
    return first if is_writer() else others  # type: ignore[return-value]


def to_host(tree: T) -> T:
    """Arrays as whole NumPy arrays on every process, also those of which a process holds only a part; called by all.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import distributed
      >>> distributed.to_host({"loss": jnp.ones(2)})
      {'loss': array([1., 1.], dtype=float32)}
    """

    def whole(leaf: Any) -> Any:
        divided = isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
        return multihost_utils.process_allgather(leaf, tiled=True) if divided else leaf

    return jax.device_get(jax.tree.map(whole, tree))


def leave(status: int) -> NoReturn:
    """End this process, whose error has been told: with the others where they end too, else by itself.

    Left to itself, JAX would wait for the others, who wait for this one in the middle of a step. Once this one is gone, JAX
    ends them after their ``heartbeat_seconds``.

    Args:
      status: the exit status.

    Example:
      >>> from entangle import distributed
      >>> distributed.leave(2)
      Traceback (most recent call last):
      SystemExit: 2
    """
    if several():
        farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        farewell.start()
        farewell.join(LEAVING_SECONDS)
        if farewell.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    raise SystemExit(status)
