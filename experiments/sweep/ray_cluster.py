"""A Ray cluster as a sweep needs it: reached within seconds or refused, and how many tasks it has room for."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from entangle import extras
from entangle.errors import UserError
from experiments.sweep.settings import OnRay

LOCAL = "local"
REACHED_WITHIN = 18.0
"""Seconds after which a cluster counts as unreachable."""
HEADS = ("JAX_", "XLA_", "TF_CPP_")
PASSED_ON = ("HF_HUB_OFFLINE", "MPLBACKEND", "NO_GCE_CHECK", "TFDS_DATA_DIR", "WANDB_ERROR_REPORTING", "WANDB_MODE")
"""Environment variables that tasks get from the command's own; none of them holds a secret, since Ray shows them."""


@contextlib.contextmanager
def connected(settings: OnRay) -> Iterator[int]:
    """Connect to the cluster, or start one of this machine alone; yields the number of tasks that it has room for.

    Raises:
      MissingExtraError: Ray is not installed.
      UserError: the cluster cannot be reached, or none of its nodes has what a task takes.

    Example:
      >>> from experiments.sweep.ray_cluster import connected
      >>> from experiments.sweep.settings import OnRay
      >>> with connected(OnRay("cluster:port")):
      ...     pass
      Traceback (most recent call last):
      entangle.errors.UserError: --ray.address cluster:port: auto, local or HOST:PORT is needed
    """
    extras.require("ray", "ray")
    _check(settings.address)
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if settings.address != LOCAL:
        _reach(settings.address)
    with _sigterm_as_before():
        _start(settings)
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            yield _checked_room(settings, nodes)
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _sigterm_as_before() -> Iterator[None]:
    # Ray's answer to SIGTERM stays behind after ray.shutdown, and training that comes later would not hear the signal
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _start(settings: OnRay) -> None:
    import ray

    with warnings.catch_warnings():
        # JAX warns of every fork, and what Ray forks becomes another program at once
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        ray.init(
            settings.address,
            log_to_driver=False,  # one line for every trial instead
            logging_level=logging.ERROR,
            include_dashboard=False if settings.address == LOCAL else None,
            runtime_env={"env_vars": environment(settings, os.environ)},
        )


def room(needs: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many tasks can run at once.

    Args:
      needs: what a task takes of a node, by name.
      nodes: what each of them has.

    Example:
      >>> from experiments.sweep.ray_cluster import room
      >>> room({"CPU": 2, "GPU": 0.5}, [{"CPU": 8, "GPU": 1}, {"CPU": 3, "GPU": 8}, {"CPU": 64}])
      3
    """
    asked = {name: amount for name, amount in needs.items() if amount}
    # the nudge: 0.3 / 0.1 is less than 3
    return sum(min(int(node.get(name, 0) / amount + 1e-6) for name, amount in asked.items()) for node in nodes)


def environment(settings: OnRay, given: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of the tasks, beside those of the nodes.

    A task without accelerators of its own keeps off those that others were given, and tasks that share a GPU share its
    memory; what the command was given comes first.

    Args:
      settings: what a task takes.
      given: the command's own environment.

    Example:
      >>> from experiments.sweep.ray_cluster import environment
      >>> from experiments.sweep.settings import OnRay
      >>> environment(OnRay("auto"), {"XLA_FLAGS": "--x", "WANDB_API_KEY": "secret"})
      {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--x'}
      >>> environment(OnRay("auto", gpus=0.5), {})
      {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.45'}
    """
    found = {name: value for name, value in given.items() if name in PASSED_ON or name.startswith(HEADS)}
    if not settings.gpus and not settings.resources:
        found = {"JAX_PLATFORMS": "cpu", **found}
    elif 0 < settings.gpus < 1:
        found = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 * settings.gpus:.2f}", **found}
    return found


def _check(address: str) -> None:
    host, _, port = address.rpartition(":")
    if address not in ("auto", LOCAL) and not (host and "/" not in host and port.isdigit()):
        raise UserError(f"--ray.address {address}: auto, {LOCAL} or HOST:PORT is needed")


def _reach(address: str) -> None:
    # in a process of its own: from an address without a cluster Ray comes back after minutes, with the process's end
    words = [sys.executable, "-c", f"import ray; ray.init({address!r}, log_to_driver=False)"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=REACHED_WITHIN, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"--ray.address {address}: no Ray cluster answers there") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise UserError(f"--ray.address {address}: no Ray cluster can be used there: {''.join(last)}")


def _checked_room(settings: OnRay, nodes: Sequence[Mapping[str, Any]]) -> int:
    if not (found := room(settings.needs, nodes)):
        needs = ", ".join(f"{amount:g} {name}" for name, amount in settings.needs.items() if amount)
        raise UserError(f"--ray.address {settings.address}: no node has what a task takes ({needs})")
    if not settings.gpus and (idle := sum(node.get("GPU", 0) for node in nodes)):
        print(f"the cluster's {idle:g} GPUs stay idle: tasks take none without --ray.gpus")
    return found
