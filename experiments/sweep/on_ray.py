"""A sweep on many machines: Ray runs shares of its trials, and the run folders say what is over.

The machines need this package with the extra ``ray`` (installed, or the checkout at the same path) and a file system that they
share, whose locks hold between machines (NFS: mounted with ``lookupcache=positive``), with the command's working directory and
the sweep's folder on it. A share is a task in a process of its own; what it prints is in Ray's logs on its machine. When the
process or its node dies, Ray starts the task again, and it goes on from the checkpoints.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from entangle.errors import MissingExtraError, NonFiniteError, UnfinishedError, UserError
from entangle.training.run_folder import CONFIG, in_use
from experiments.pairs import stages
from experiments.sweep import folder_of, trial_runs, waiting
from experiments.sweep.progress import Progress
from experiments.sweep.settings import OnRay, Packing
from experiments.sweep.trial_runs import TrialOf

POLL = 1.0
"""Seconds between two looks at the folders."""
AGAIN = (OSError, jax.errors.JaxRuntimeError)
"""What a task is started again after, too: file systems and devices fail for a while."""


def run(
    out: Path, trials: Sequence[TrialOf], tracker: stages.TrackerFactory, packing: Packing, settings: OnRay, room: int
) -> None:
    """Run or continue those of the trials that are not over, on the cluster that this process is connected to.

    Prints a line whenever a trial ends. A trial that is not finite is marked as failed; one that another process is still
    training after ``settings.patience`` is left to it.

    Args:
      out: the sweep's folder.
      trials: its trials, or some of them.
      tracker: makes the mirror of a run.
      packing: how many trials share a program.
      settings: what a task takes of a node, and how often it is started again.
      room: tasks that run at once, see ``ray_cluster.connected``.

    Raises:
      UserError: bad input, as a task found it; a task does not see the sweep's folder.
      NonFiniteError: a base or SFT model is not finite.
      UnfinishedError: processes or nodes died too often; all that could be run is over.
    """
    tasks = shares(trial_runs.groups(out, trials), room)
    print(f"Ray: {len(tasks)} tasks, up to {room} at once", flush=True)
    progress = Progress(out, trials)
    where = Path.cwd()
    if len(tasks) > 1 and not trial_runs.prepared(out, trials):
        print("Ray: base and SFT models", flush=True)
        job = _remote(_prepare, settings).remote(where, out, trials, tracker)
        _raise_unfinished(_follow({job: trials}, progress)[1], progress)
    train = _remote(_train, settings)
    jobs = {train.remote(where, out, task, tracker, packing, settings): task for task in tasks}
    elsewhere, crashed = _follow(jobs, progress)
    end = time.monotonic() + settings.patience
    while progress.left.keys() - elsewhere - crashed.keys() and time.monotonic() < end:
        time.sleep(POLL)  # network file systems may tell late what another machine has written
        progress.look()
    for name in sorted(progress.left.keys() & elsewhere):
        print(f"left to another process: {name}")
    _raise_unfinished(crashed, progress)


def shares(groups: Sequence[Sequence[TrialOf]], room: int) -> list[list[TrialOf]]:
    """Groups split further, so that there is a share for every task that can run at once, and the largest one is small.

    A group is one program, compiled once a share: none is split more often than that. The largest share comes first, since
    the last one to begin should be short.

    Args:
      groups: trials that one program can serve.
      room: tasks that run at once.

    Example:
      >>> from experiments.sweep.on_ray import shares
      >>> [len(share) for share in shares([range(2), range(10)], 5)]
      [3, 3, 2, 2, 2]
      >>> [len(share) for share in shares([range(2)], 5)]
      [1, 1]
    """
    pieces = [1] * len(groups)
    while sum(pieces) < room:
        place = max(range(len(groups)), key=lambda i: -(-len(groups[i]) // pieces[i]))
        if pieces[place] == len(groups[place]):
            break
        pieces[place] += 1
    # neighbours stay together: they have fewer objectives to compile
    found = [
        list(group[len(group) * i // count : len(group) * (i + 1) // count])
        for group, count in zip(groups, pieces, strict=True)
        for i in range(count)
    ]
    return sorted(found, key=len, reverse=True)


def _remote(function: Callable[..., Any], settings: OnRay) -> Any:
    import ray

    remote: Any = ray.remote  # its annotations know no list of exceptions
    return remote(
        num_cpus=settings.cpus,
        num_gpus=settings.gpus,
        resources=settings.resources,
        max_retries=settings.retries,
        retry_exceptions=list(AGAIN),
        max_calls=1,  # a process of its own: what devices it sees is settled when JAX begins
        scheduling_strategy="SPREAD",
    )(function)


def _prepare(where: Path, out: Path, trials: Sequence[TrialOf], tracker: stages.TrackerFactory) -> None:
    """A task: what the trials begin with."""
    _enter(where, out)
    trial_runs.prepare(out, trials, tracker)


def _train(
    where: Path,
    out: Path,
    trials: Sequence[TrialOf],
    tracker: stages.TrackerFactory,
    packing: Packing,
    settings: OnRay,
) -> list[str]:
    """A task: run the trials that are not over, and wait for those that others hold, but not for ever; the names of these."""
    _enter(where, out)
    packing = _own(packing, settings)
    end = time.monotonic() + settings.patience
    while left := waiting(out, trials):
        if free := [trial for trial in left if not in_use(folder_of(out, trial))]:
            trial_runs.run(out, free, tracker, packing)
        elif time.monotonic() > end:
            break
        else:
            time.sleep(POLL)
    return [trial.name for trial in left]


def _own(packing: Packing, settings: OnRay) -> Packing:
    """Tasks side by side on one host share its memory, as they share its CPUs."""
    if packing.memory_gib or jax.default_backend() != "cpu":
        return packing
    share = min(1.0, (settings.cpus or 1.0) / (os.cpu_count() or 1))
    return dataclasses.replace(packing, memory_gib=share * trial_runs.memory() / 2**30)


def _enter(where: Path, out: Path) -> None:
    try:
        os.chdir(where)  # relative paths mean what they mean to the command
    except OSError as error:
        raise UserError(
            f"{where} on {socket.gethostname()}: {error.strerror}; it has to be a folder of all machines"
        ) from None
    if not (out / CONFIG).exists():
        raise UserError(f"{out.absolute()} on {socket.gethostname()}: not there; it has to be a folder of all machines")


def _follow(jobs: Mapping[Any, Sequence[TrialOf]], progress: Progress) -> tuple[set[str], dict[str, str]]:
    """Until all tasks have ended; the names of trials that they left to others, and of those that crashed, and why."""
    import ray

    pending, elsewhere, crashed = list(jobs), set[str](), dict[str, str]()
    while pending:
        ended, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL)
        for job in ended:
            left, reason = _end(job)
            elsewhere |= set(left)
            crashed |= {trial.name: reason for trial in jobs[job] if reason}
        progress.look()
    return elsewhere, crashed


def _end(job: Any) -> tuple[list[str], str]:
    """What a task returned, and why it came to nothing, if it did, for a reason that is not the input's."""
    import ray

    try:
        return ray.get(job) or [], ""
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (UserError, MissingExtraError, NonFiniteError)):
            raise error.cause from None
        last = str(error).strip().splitlines()[-1]
        if last.startswith(("ModuleNotFoundError", "ImportError")):
            raise UserError(f"a machine of the cluster lacks the package or an extra of it: {last}") from None
        print(error, file=sys.stderr)
        return [], last
    except ray.exceptions.RayError as error:
        return [], str(error).strip().split(". ")[0].splitlines()[0]


def _raise_unfinished(crashed: dict[str, str], progress: Progress) -> None:
    left = {name: reason for name, reason in crashed.items() if name in progress.left}
    for name, reason in left.items():
        print(f"not over: {name}: {reason}")
    if left:
        raise UnfinishedError(
            f"{len(left)} trials are not over, the reason is above; the same command goes on with them"
        )
