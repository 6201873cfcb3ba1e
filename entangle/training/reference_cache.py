"""The reference's log-probabilities on disk: computed once, found again by a fingerprint of what they were computed from.

A file is whole or absent, whenever the process is killed, and no file is ever overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from entangle import distributed
from entangle.errors import NonFiniteError, UserError
from entangle.types import Params

KIND = "entangle reference log-probabilities, version 1"
_REMEDY = "name another path, or delete the file to have it computed anew"
_SHOWN = 5


class ReferenceFingerprint(NamedTuple):
    """What log-probabilities were computed from; digests are the first 16 hexadecimal digits of a SHA-256.

    Not in it: device, version and numerical settings of JAX, and how many pairs were scored at a time. They change how
    numbers are rounded: who wants the same bits keeps a file for each.

    Attributes:
      model: digest of the model's configuration and of its parameters: names, dtypes, shapes and values. None where the
        model is not known yet: then it is not compared, and nothing can be written.
      tokenizer: digest of the tokenizer.
      data: digest of all splits: their names, tokens and completion masks, without the padding.
      length: T, tokens of a row.
    """

    model: str | None
    tokenizer: str
    data: str
    length: int


class PairRows(Protocol):
    """N pairs as arrays; ``types.PairBatch`` and ``data.EncodedPairs`` are such."""

    @property
    def tokens(self) -> Any:
        """``[N, 2, T]`` token ids, padded on the right."""

    @property
    def completion_mask(self) -> Any:
        """``[N, 2, T]`` bool, true on the completion's tokens."""


def reference_fingerprint(
    config: Mapping[str, Any], params: Params | None, tokenizer: str, splits: Mapping[str, PairRows]
) -> ReferenceFingerprint:
    """Fingerprint of what the reference's log-probabilities are computed from.

    Args:
      config: the model's configuration, JSON-able.
      params: the reference's parameters, a pytree of arrays; None where they are not known yet.
      tokenizer: what tells the tokenizer from others: ``data.Tokenizer.fingerprint``.
      splits: split -> its pairs.

    Returns:
      The fingerprint.

    Raises:
      ValueError: there is no split, or the splits differ in T.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.training.reference_cache import reference_fingerprint
      >>> from entangle.types import PairBatch
      >>> pairs = PairBatch(jnp.array([[[0, 1], [0, 2]]]), jnp.array([[[False, True]] * 2]))
      >>> one, other = (reference_fingerprint({"layers": 1}, {"w": w}, "bpe", {"train": pairs}) for w in jnp.eye(2))
      >>> one.model == other.model, one[1:] == other[1:], one.length
      (False, True, 2)
    """
    lengths = {np.shape(rows.tokens)[-1] for rows in splits.values()}
    if len(lengths) != 1:
        raise ValueError(f"one row length for all splits is needed, got {sorted(lengths)}")
    model = None
    if params is not None:
        leaves = ((jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(params))
        model = _digest([("config", _as_bytes(json.dumps(config, sort_keys=True))), *leaves])
    rows = (part for name in sorted(splits) for part in _without_padding(name, splits[name]))
    return ReferenceFingerprint(model, _digest([("tokenizer", _as_bytes(tokenizer))]), _digest(rows), lengths.pop())


def check_reference(path: str | os.PathLike[str], fingerprint: ReferenceFingerprint, counts: Mapping[str, int]) -> None:
    """Refuse, before anything is computed, a file that :func:`reference_log_probs` could not use or not write.

    Args:
      path: the file.
      fingerprint: of what the log-probabilities should come from; its model may be None.
      counts: split -> N, its number of pairs.

    Raises:
      UserError: the file is stale or broken, see reference_log_probs, or there is none and its folder cannot be written.

    Example:
      >>> import tempfile
      >>> from entangle.training.reference_cache import ReferenceFingerprint, check_reference
      >>> check_reference(f"{tempfile.mkdtemp()}/new.safetensors", ReferenceFingerprint(None, "t", "d", 8), {"train": 4})
    """
    path = Path(path)
    if os.path.lexists(path):
        _read(path, fingerprint, counts)
    else:
        _check_place(path)


def reference_log_probs(
    path: str | os.PathLike[str],
    fingerprint: ReferenceFingerprint,
    counts: Mapping[str, int],
    compute: Callable[[], Mapping[str, Any]],
) -> dict[str, np.ndarray]:
    """The reference's log-probabilities: out of the file where there is one, else computed and written to it.

    Where two programs compute at once, the first to be done writes the file and both return what is in it. Of the processes
    of one program all compute, process 0 writes and all read.

    Args:
      path: the file, in the safetensors format; made with its folder.
      fingerprint: of what the log-probabilities come from.
      counts: split -> N, its number of pairs.
      compute: called where there is no file: split -> ``[N, 2]`` float32 log-probabilities, nats.

    Returns:
      Split -> ``[N, 2]`` float32, bit for bit what was computed.

    Raises:
      UserError: the file is stale, that is of another fingerprint (its parts are named); it is broken, a folder, or no
        file of this kind, or has other splits, shapes, dtypes or numbers than were written; or it cannot be written.
      NonFiniteError: a computed number is not finite; nothing is written.
      ValueError: the fingerprint has no model, or compute returns other splits, shapes or dtypes.

    Example:
      >>> import tempfile
      >>> from entangle.training.reference_cache import ReferenceFingerprint, reference_log_probs
      >>> path, fingerprint = f"{tempfile.mkdtemp()}/reference.safetensors", ReferenceFingerprint("m", "t", "d", 8)
      >>> def compute():
      ...     print("computing")
      ...     return {"train": np.full((4, 2), -0.5, np.float32)}
      >>> for _ in range(2):
      ...     print(reference_log_probs(path, fingerprint, {"train": 4}, compute)["train"][0])
      computing
      [-0.5 -0.5]
      [-0.5 -0.5]
      >>> reference_log_probs(path, fingerprint._replace(length=9), {"train": 4}, compute)
      Traceback (most recent call last):
      entangle.errors.UserError: ...: stale reference log-probabilities: length is 8 there and 9 here; name another path, ...
    """
    path = Path(path)
    if fingerprint.model is None:
        raise ValueError("log-probabilities come from a model: the fingerprint has none")
    if not distributed.from_writer(lambda: _is_there(path)):
        arrays = _computed(path, counts, compute())
        distributed.from_writer(lambda: _write(path, fingerprint, arrays))
    return distributed.together(lambda: _read(path, fingerprint, counts))


def _is_there(path: Path) -> bool:
    there = os.path.lexists(path)
    if not there:
        _check_place(path)
    return there


def _as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _digest(parts: Iterable[tuple[str, Any]]) -> str:
    total = hashlib.sha256()
    for name, part in parts:
        array = np.asarray(part)
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]


def _without_padding(name: str, rows: PairRows) -> Iterator[tuple[str, np.ndarray]]:
    # what padding there is follows from the length, which is told apart
    tokens, mask = np.asarray(rows.tokens), np.asarray(rows.completion_mask)
    positions = np.arange(tokens.shape[-1], dtype=np.int32)
    ends = np.max(np.where(mask, positions + 1, 0), axis=-1, keepdims=True, initial=0)
    inside = positions < ends
    yield from ((f"{name} ends", ends), (f"{name} tokens", tokens[inside]), (f"{name} mask", mask[inside]))


def _check_place(path: Path) -> None:
    try:
        folder = next(folder for folder in path.absolute().parents if folder.exists())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    if not folder.is_dir():
        raise UserError(f"{path}: cannot be written: {folder} is a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written: no permission to write in {folder}")


def _computed(path: Path, counts: Mapping[str, int], found: Mapping[str, Any]) -> dict[str, np.ndarray]:
    arrays = {split: np.asarray(values) for split, values in found.items()}
    shapes = {split: (str(values.dtype), values.shape) for split, values in arrays.items()}
    if shapes != (expected := {split: ("float32", (count, 2)) for split, count in counts.items()}):
        raise ValueError(f"computed {shapes}, expected {expected}")
    if culprits := _not_finite(arrays):
        raise NonFiniteError(f"the reference's log-probabilities are not finite: {culprits}; {path} was not written")
    return arrays


def _not_finite(arrays: Mapping[str, np.ndarray]) -> str:
    found = []
    for split, values in arrays.items():
        rows = np.flatnonzero(~np.isfinite(values).all(axis=-1)).tolist()
        if rows:
            more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
            found.append(f"{split} {', '.join(map(str, rows[:_SHOWN]))}{more}")
    return "; ".join(found)


def _write(path: Path, fingerprint: ReferenceFingerprint, arrays: Mapping[str, np.ndarray]) -> None:
    parts = {name: str(part) for name, part in fingerprint._asdict().items()}
    metadata = {"kind": KIND, **parts, "values": _digest(sorted(arrays.items()))}
    content = save({split: np.ascontiguousarray(values) for split, values in arrays.items()}, metadata)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            _publish(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _publish(partial: Path, path: Path) -> None:
    """Give a whole file its name, unless another process's file has it by now."""
    try:
        os.link(partial, path)  # unlike os.replace, takes no other file's place
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        if not os.path.lexists(path):
            os.replace(partial, path)


def _read(path: Path, fingerprint: ReferenceFingerprint, counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    try:
        if not path.is_file():
            raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'is no file'}; name another path")
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            _refuse_stale(path, metadata, fingerprint)
            _refuse_shapes(path, file, counts)
            arrays = {split: file.get_tensor(split) for split in counts}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {' '.join(str(error).split())}; {_REMEDY}") from None
    if metadata["values"] != _digest(sorted(arrays.items())):
        raise UserError(f"{path}: broken: its numbers are not those that were written; {_REMEDY}")
    return arrays


def _refuse_stale(path: Path, metadata: Mapping[str, str], fingerprint: ReferenceFingerprint) -> None:
    expected = {name: str(part) for name, part in fingerprint._asdict().items() if part is not None}
    if metadata.get("kind") != KIND or not metadata.keys() >= {*expected, "values"}:
        raise UserError(f"{path}: holds no reference log-probabilities of this version; name another path")
    if different := [name for name, part in expected.items() if metadata[name] != part]:
        parts = ", ".join(f"{name} is {metadata[name]} there and {expected[name]} here" for name in different)
        raise UserError(f"{path}: stale reference log-probabilities: {parts}; {_REMEDY}")


def _refuse_shapes(path: Path, file: Any, counts: Mapping[str, int]) -> None:
    if set(file.keys()) != set(counts):
        found, expected = (", ".join(sorted(names)) or "none" for names in (file.keys(), counts))
        raise UserError(f"{path}: broken: its splits are {found}, expected {expected}; {_REMEDY}")
    for split, count in counts.items():
        header = file.get_slice(split)
        dtype, shape = header.get_dtype(), tuple(header.get_shape())
        if (dtype, shape) != ("F32", (count, 2)):
            raise UserError(f"{path}: broken: {split} is {dtype} {shape}, expected F32 {(count, 2)}; {_REMEDY}")
