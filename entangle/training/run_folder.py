"""A run is a folder: config.json, environment.json, metrics.jsonl, checkpoints/, done.json. Figures read nothing else."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import platform
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from entangle import distributed
from entangle.errors import UserError

CONFIG, ENVIRONMENT, METRICS, DONE = "config.json", "environment.json", "metrics.jsonl", "done.json"
LOCK = ".lock"
BEFORE_CONFIG, PARTIAL = (ENVIRONMENT, LOCK), ".partial"
"""What a start that was killed may have left, partial files beside: the configuration is written last."""
PACKAGES = ("entangle", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "grain")


FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of the operating system that say that there is no room to write in: a full disk, a quota."""


@contextlib.contextmanager
def refusing_full_disk(path: Path) -> Iterator[None]:
    """A full disk ends in one line that names what could not be written.

    Raises:
      UserError: the disk is full.

    Example:
      >>> from pathlib import Path
      >>> from entangle.training.run_folder import refusing_full_disk
      >>> with refusing_full_disk(Path("runs/x/config.json")):
      ...     raise OSError(errno.ENOSPC, "No space left on device")
      Traceback (most recent call last):
      entangle.errors.UserError: runs/x/config.json: cannot be written: No space left on device
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text so that the file is either the old one or the whole new one, also when the process is killed.

    Raises:
      UserError: the disk is full; the old file is as it was.

    Example:
      >>> import tempfile, pathlib
      >>> from entangle.training.run_folder import write_text
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "x.txt"
      >>> write_text(path, "whole")
      >>> path.read_text(), [p.name for p in path.parent.iterdir()]
      ('whole', ['x.txt'])
    """
    # a name of its own: two processes may write one file at once
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with refusing_full_disk(path), partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON as ``write_text`` writes a text.

    Example:
      >>> import tempfile, pathlib
      >>> from entangle.training.run_folder import write_json
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "x.json"
      >>> write_json(path, {"a": 1})
      >>> path.read_text()
      '{\\n  "a": 1\\n}\\n'
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@functools.cache
def _environment() -> dict[str, Any]:
    # Versions only: the process's environment variables can hold secrets and never reach the folder.
    import jax

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    def git(*words: str) -> str | None:
        here = Path(__file__).parent
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        # only where git knows this file: an installed package may lie inside somebody else's checkout
        known = git("ls-files", "--error-unmatch", Path(__file__).name) is not None
        commit = git("rev-parse", "HEAD") if known else None
        changed = git("status", "--porcelain", "--untracked-files=no") if known else None
    except OSError:  # git is not installed
        commit = changed = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "packages": {name: found for name in PACKAGES if (found := version(name))},
        "git_commit": commit,
        "git_changed": None if changed is None else bool(changed),
    }


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [f"{path} is {json.dumps(old)} there and {json.dumps(new)} here"]


class RunFolder:
    """One run on disk. Opening a folder that holds another configuration's run is refused; nothing is overwritten.

    Of several processes all open it and take its lock; process 0 alone writes, and what it refuses ends all.

    Attributes:
      path: the folder.

    Example:
      >>> import tempfile
      >>> from entangle.training.run_folder import RunFolder
      >>> run = RunFolder(tempfile.mkdtemp(), {"seed": 0})
      >>> run.append([{"step": 1, "loss": 0.5}])
      >>> run.metrics()
      [{'step': 1, 'loss': 0.5}]
    """

    def __init__(self, path: str | os.PathLike[str], config: Mapping[str, Any]):
        """Create the folder, or open it when it holds a run of the same configuration.

        Args:
          path: folder of the run; made with its parents.
          config: JSON-able configuration that identifies the run.

        Raises:
          UserError: the path is a file or cannot be made, holds other files, or holds another configuration's run.
        """
        self.path, self._locked = Path(path), False
        distributed.from_writer(lambda: self._open(json.loads(json.dumps(config))))

    def _open(self, config: Mapping[str, Any]) -> None:
        check_folder(self.path, config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be made ({error.strerror})") from None
        if not self.done:
            self._record_environment()
        if not (self.path / CONFIG).exists():
            write_json(self.path / CONFIG, config)

    def _record_environment(self) -> None:
        # a list: a run may be continued by another commit or on another machine
        file, now = self.path / ENVIRONMENT, _environment()
        before = read_json(file) if file.exists() else []
        if before[-1:] != [now]:
            write_json(file, [*before, now])

    @property
    def done(self) -> bool:
        """Whether the run has ended well."""
        return (self.path / DONE).exists()

    def mark_done(self, summary: Mapping[str, Any]) -> None:
        """Write the done-marker with a summary, for example the last step and its metrics."""
        if distributed.is_writer():
            write_json(self.path / DONE, dict(summary))

    def append(self, records: list[dict[str, Any]]) -> None:
        """Append records to metrics.jsonl, one a line, and flush them to the disk.

        Raises:
          UserError: the disk is full.
        """
        if not distributed.is_writer():
            return
        path = self.path / METRICS
        with refusing_full_disk(path), path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """All records of metrics.jsonl; a last line torn by a kill is left out."""
        return read_metrics(self.path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder; the lock dies with its process, however that ends.

        Inside of it a second call does nothing.

        Raises:
          UserError: another process holds it.
        """
        if self._locked:
            yield
            return
        with contextlib.ExitStack() as stack:
            distributed.from_writer(lambda: self._lock(stack))
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    def _lock(self, stack: contextlib.ExitStack) -> None:
        file = stack.enter_context((self.path / LOCK).open("a"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another process is training in this folder") from None

    def rewind(self, step: int) -> None:
        """Drop the records after a step, as a resumed run writes them again."""
        if not distributed.is_writer():
            return
        kept = [record for record in self.metrics() if record["step"] <= step]
        write_text(self.path / METRICS, "".join(json.dumps(record) + "\n" for record in kept))


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process is inside of this with the same folder; made with its parents.

    The lock dies with its process, however that ends.

    Raises:
      UserError: the folder cannot be made.

    Example:
      >>> import pathlib, tempfile
      >>> from entangle.training.run_folder import one_at_a_time
      >>> with one_at_a_time(pathlib.Path(tempfile.mkdtemp())):
      ...     pass
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def in_use(path: str | os.PathLike[str]) -> bool:
    """Whether a process is training in a folder, or was when this looked.

    Example:
      >>> import tempfile
      >>> from entangle.training.run_folder import RunFolder, in_use
      >>> run = RunFolder(tempfile.mkdtemp(), {"seed": 0})
      >>> with run.locked():
      ...     in_use(run.path)
      True
      >>> in_use(run.path)
      False
    """
    try:
        with (Path(path) / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def check_folder(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a folder that cannot become or continue this run.

    Raises:
      UserError: see RunFolder.

    Example:
      >>> import tempfile, pathlib
      >>> from entangle.training.run_folder import check_folder
      >>> check_folder(pathlib.Path(tempfile.mkdtemp()), {"seed": 0})
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; a run needs a folder of its own")
    if not path.exists():
        return
    if (path / CONFIG).exists():
        there = read_json(path / CONFIG)
        if isinstance(there, dict) and "model_type" in there and "model_type" not in config:
            raise UserError(f"{path} holds a checkpoint, not a run; name another folder")
        if differences := _differences(there, json.loads(json.dumps(config))):
            more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
            differ = f"{'; '.join(differences[:3])}{more}"
            raise UserError(f"{path} holds a run of another configuration: {differ}; name another folder")
    elif strangers := sorted(p.name for p in path.iterdir() if p.name not in BEFORE_CONFIG and p.suffix != PARTIAL):
        raise UserError(f"{path} is not empty and holds no run (found {', '.join(strangers[:3])}); name another folder")


def read_json(file: Path) -> Any:
    """Read one of the JSON files of a run's or an experiment's folder.

    Raises:
      UserError: it is missing, or cannot be read.

    Example:
      >>> from pathlib import Path
      >>> from entangle.training.run_folder import read_json
      >>> read_json(Path("nowhere/pairs.json"))
      Traceback (most recent call last):
      entangle.errors.UserError: nowhere/pairs.json is missing
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Records of a run's metrics.jsonl; none when there is no file; a last line torn by a kill is left out.

    Raises:
      UserError: a line other than the last is not JSON.

    Example:
      >>> import tempfile
      >>> from entangle.training.run_folder import read_metrics
      >>> read_metrics(tempfile.mkdtemp())
      []
    """
    file = Path(path) / METRICS
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{file}:{number} is not JSON") from None
    return records
