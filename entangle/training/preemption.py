"""SIGTERM as a request to stop after a step, which several processes agree on."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

_last_asked = 0


class Preemption:
    """While it is entered, SIGTERM does not end the process but is told to who asks after every step.

    Where ``jax.distributed`` runs, JAX itself hears the signal and tells all processes, whichever got it. Elsewhere the main
    thread listens, unless somebody else does already; in another thread, SIGTERM ends the process as ever.

    Example:
      >>> from entangle.training.preemption import Preemption
      >>> with Preemption() as preemption:
      ...     for step in range(1, 4):
      ...         if preemption.reached(step):
      ...             break  # save, and end
      >>> step
      3
    """

    def __init__(self) -> None:
        """Listen to nothing yet."""
        self._came = self._listens = False

    def __enter__(self) -> Preemption:
        """Listen."""
        self._listens = (
            not jax.distributed.is_initialized()
            and threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        )
        if self._listens:
            signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True

    def __exit__(self, *error: object) -> None:
        """Listen no longer."""
        if self._listens:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; of several processes all ask, after every step."""
        if not jax.distributed.is_initialized():
            return self._came
        # JAX's numbers of steps only ever rise, also where one program trains twice
        global _last_asked
        _last_asked = max(step, _last_asked + 1)
        return multihost_utils.reached_preemption_sync_point(_last_asked)
