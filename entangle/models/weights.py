"""The tensors of a checkpoint folder: one safetensors file or several with an index, read and written slice by slice."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from entangle.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16")
"""Types of tensors that are read."""

Read = Callable[[Sequence[slice]], np.ndarray]
Files = dict[Path, set[str] | None]


class Weights:
    """A checkpoint's tensors, opened and not read; a context manager.

    Args:
      path: that messages name.
      files: every file with the tensors that it should have, if that is said; see :func:`weight_files`.
      prefix: that names may have; it is taken off.
      ignored: regular expression of tensors that are passed over.

    Raises:
      UserError: a file is broken, the index and the files disagree, or a name is there twice.
    """

    def __init__(self, path: Path, files: Files, prefix: str, ignored: str) -> None:
        """Open the files and take note of their tensors."""
        self._stack = contextlib.ExitStack()
        self.path = path
        self._found: dict[str, tuple[Path, Any, str]] = {}
        try:
            for file, names in files.items():
                self._open(file, names, prefix, ignored)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, path: Path, names: set[str] | None, prefix: str, ignored: str) -> None:
        with _readable(path):
            file = self._stack.enter_context(safe_open(path, "numpy"))
            stored = set(file.keys())
        if names is not None and (missing := sorted(names - stored)):
            refuse(path, f"tensors missing, which {INDEX} says are here", missing)
        for name in sorted(stored):
            bare = name.removeprefix(prefix)
            if re.fullmatch(ignored, bare):
                continue
            if bare in self._found:
                raise UserError(f"{path}: tensor {bare} is there with and without the prefix {prefix}, or in two files")
            self._found[bare] = path, file, name

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def names(self) -> frozenset[str]:
        """Of the tensors, without prefix."""
        return frozenset(self._found)

    def stored_name(self, name: str) -> str:
        """The name of a tensor as the file has it."""
        return self._found[name][2]

    def reader(self, name: str, shape: tuple[int, ...]) -> Read:
        """A function that reads a part of a tensor.

        Args:
          name: without prefix.
          shape: that it must have.

        Raises:
          UserError: the tensor has another shape, or is of a type that is not read.
        """
        path, file, stored = self._found[name]
        with _readable(path):
            header = file.get_slice(stored)
        if tuple(header.get_shape()) != shape:
            raise UserError(f"{path}: tensor {stored} has shape {tuple(header.get_shape())}, expected {shape}")
        if header.get_dtype() not in FLOATS:
            raise UserError(
                f"{path}: tensor {stored} has type {header.get_dtype()}, expected one of {', '.join(FLOATS)}"
            )

        def read(index: Sequence[slice]) -> np.ndarray:
            with _readable(path):
                return np.asarray(header[tuple(index)] if shape else file.get_tensor(stored))

        return read


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {' '.join(str(error).split())}") from None


def weight_files(folder: Path) -> tuple[Path, Files]:
    """The files of a checkpoint folder.

    Args:
      folder: has ``config.json`` and ``model.safetensors``, or ``model.safetensors.index.json`` and the files it names.

    Returns:
      The path that messages name, and every file with the tensors that it should have, if that is said.

    Raises:
      UserError: the folder or a file is missing, or the index cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if (folder / WEIGHTS).is_file():
        files: Files = {folder / WEIGHTS: None}
        path = folder / WEIGHTS
    elif (folder / INDEX).is_file():
        path, files = folder / INDEX, _read_index(folder / INDEX)
    elif (folder / "pytorch_model.bin").is_file() or (folder / "pytorch_model.bin.index.json").is_file():
        raise UserError(
            f"{folder}: has pytorch_model.bin only, which is pickled and never loaded; convert to safetensors"
        )
    else:
        raise UserError(f"{folder}: has no {WEIGHTS} and no {INDEX}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: has no config.json")
    return path, files


def _read_index(path: Path) -> Files:
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files: Files = {}
        for name, file in where.items():
            names = files.setdefault(path.parent / Path(file).name, set())
            assert names is not None
            names.add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no index of safetensors files: {' '.join(str(error).split())}") from None
    if missing := sorted(file.name for file in files if not file.is_file()):
        refuse(path, "files missing", missing)
    return files


def write_weights(folder: Path, tensors: Sequence[tuple[str, int, Callable[[], np.ndarray]]], limit: int) -> None:
    """Write tensors into a folder, one file of them in memory at a time.

    Args:
      folder: exists.
      tensors: name, bytes and what makes it.
      limit: most bytes of one file; a tensor that is larger has a file of its own.
    """
    files: list[list[tuple[str, int, Callable[[], np.ndarray]]]] = [[]]
    room = limit
    for tensor in tensors:
        if files[-1] and tensor[1] > room:
            files.append([])
            room = limit
        files[-1].append(tensor)
        room -= tensor[1]
    where: dict[str, str] = {}
    for number, part in enumerate(files, start=1):
        name = WEIGHTS if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        made = {tensor: np.ascontiguousarray(make()) for tensor, _, make in part}
        save_file(made, folder / name, metadata={"format": "pt"})
        # safetensors makes its file readable by the owner alone, whatever the umask.
        (folder / name).chmod((folder / "config.json").stat().st_mode)
        where |= dict.fromkeys(made, name)
    if len(files) > 1:
        index: Mapping[str, Any] = {
            "metadata": {"total_size": sum(size for _, size, _ in tensors)},
            "weight_map": where,
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def refuse_existing(folder: Path) -> None:
    """Raise a UserError where a folder, or anything else, is there already."""
    if folder.exists():
        raise UserError(f"{folder}: already exists; nothing was written")


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that appears under its name when all is written, or not at all.

    Args:
      folder: must not exist.

    Raises:
      UserError: it exists, or cannot be written.
    """
    refuse_existing(folder)
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, folder)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse(path: Path, what: str, names: Sequence[str]) -> None:
    """Raise a UserError that lists names, the first five of them, if there are any."""
    shown, hidden = names[:5], len(names) - 5
    if shown:
        raise UserError(f"{path}: {what}: {', '.join(shown)}" + (f" and {hidden} more" if hidden > 0 else ""))
