"""The one door that preference pairs go through: a TFDS data set of array_record files, without TensorFlow.

A prepared set lies in a folder named after a fingerprint of its records, so records that changed are never served from
files that did not; TFDS writes it beside and renames it when it is whole, so a preparation that was killed is redone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, overload

import tensorflow_datasets as tfds
from absl import logging as absl_logging
from etils import epath

from entangle.data.records import PreferenceRecord
from entangle.errors import UserError

_FINGERPRINT_LENGTH = 16
_NAME = re.compile(r"[A-Za-z0-9_.-]+")

with tfds.core.registered.skip_registration():  # it cannot be built by name alone

    class PreferencePairs(tfds.core.GeneratorBasedBuilder):
        """TFDS builder of preference pairs that are already in memory; made by `prepare_pairs`.

        Args:
          name: name of the set.
          splits: split name -> records.
          data_dir: root of the prepared sets.
        """

        VERSION = tfds.core.Version("1.0.0")
        code_path: ClassVar[epath.Path] = epath.Path(__file__)
        """Set because TFDS finds it through importlib_resources, which it does not install."""

        def __init__(self, name: str, splits: Mapping[str, Sequence[PreferenceRecord]], data_dir: str | Path) -> None:
            """Name the folder after the records."""
            self._records = splits
            config = tfds.core.BuilderConfig(
                name=f"{name}-{fingerprint(splits)[:_FINGERPRINT_LENGTH]}", version="1.0.0"
            )
            super().__init__(data_dir=Path(data_dir), config=config, file_format="array_record")

        def _info(self) -> tfds.core.DatasetInfo:
            features: dict[str, Any] = {field: tfds.features.Text() for field in PreferenceRecord._fields}
            return tfds.core.DatasetInfo(
                builder=self,
                description="Preference pairs as text.",
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
            del dl_manager
            return {split: self._generate_examples(records) for split, records in self._records.items()}

        def _generate_examples(self, records: Sequence[PreferenceRecord]) -> Iterator[tuple[int, dict[str, Any]]]:
            for index, record in enumerate(records):
                yield index, record._asdict()


class StoredPairs(Sequence[PreferenceRecord]):
    """Records on disk with random access, in the order in which they were given.

    Args:
      source: a TFDS data source of `PreferencePairs`.
    """

    def __init__(self, source: Any) -> None:
        """Take over a data source."""
        self._source = source

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> PreferenceRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[PreferenceRecord]: ...
    def __getitem__(self, index: int | slice) -> PreferenceRecord | list[PreferenceRecord]:
        """Return one record, or the records of a slice."""
        if isinstance(index, slice):
            return [_record(example) for example in self._source.__getitems__(list(range(len(self))[index]))]
        return _record(self._source[range(len(self))[index]])

    def __iter__(self) -> Iterator[PreferenceRecord]:
        """Iterate in order; the records are read together, which is faster than one by one."""
        return iter(self[:])


def prepare_pairs(name: str, splits: Mapping[str, Sequence[PreferenceRecord]], data_dir: str | Path) -> PreferencePairs:
    """Write preference pairs as a TFDS data set, unless the very same ones are there already.

    Args:
      name: name of the set, for people who look into the folder.
      splits: split name -> records, none empty.
      data_dir: root of the prepared sets.

    Returns:
      The prepared data set.

    Raises:
      UserError: no splits, an empty split, a name that is no file name, or a folder that cannot be written.

    Example:
      >>> import tempfile
      >>> records = [PreferenceRecord("Tweet: hi", " good", " bad", "here:1")]
      >>> handle = prepare_pairs("demo", {"train": records}, tempfile.mkdtemp())
      >>> load_pairs(handle, "train")[0].chosen
      ' good'
    """
    if not splits:
        raise UserError(f"pair set {name!r} has no splits")
    for split, records in splits.items():
        if not records:
            raise UserError(f"pair set {name!r}: split {split!r} is empty")
    if not _NAME.fullmatch(name):
        raise UserError(f"pair set {name!r}: a name has letters, digits and _ . - alone")
    with quiet_tfds():
        builder = PreferencePairs(name, splits, data_dir)
        try:
            builder.download_and_prepare()
        except OSError as error:
            # another process that prepares the same records may have been first; renaming then fails, its files serve
            if not builder.data_path.exists():
                raise UserError(f"{data_dir}: pair set {name!r} cannot be stored there ({error})") from error
            builder = PreferencePairs(name, splits, data_dir)
    return builder


def load_pairs(handle: PreferencePairs, split: str) -> StoredPairs:
    """Open a split of a prepared data set.

    Args:
      handle: what `prepare_pairs` returned.
      split: name of the split.

    Returns:
      Its records, with random access.

    Raises:
      UserError: it has no such split.
    """
    if split not in handle.info.splits:
        raise UserError(f"{handle.data_path}: no split {split!r}: it has {', '.join(handle.info.splits)}")
    with quiet_tfds():
        return StoredPairs(handle.as_data_source(split=split))


def fingerprint(splits: Mapping[str, Sequence[PreferenceRecord]]) -> str:
    """Return the hexadecimal SHA-256 of all records, their order and their splits.

    Example:
      >>> fingerprint({"a": []}) == fingerprint({"b": []})
      False
    """
    digest = hashlib.sha256()
    for split, records in splits.items():
        digest.update(json.dumps([split, len(records)]).encode())
        for record in records:
            digest.update(json.dumps(record).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Keep TFDS from printing: its progress bars, its log lines and what it writes to standard output."""
    tfds.disable_progress_bar()
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        absl_logging.set_verbosity(verbosity)


def _record(example: Mapping[str, Any]) -> PreferenceRecord:
    return PreferenceRecord(*(example[field].decode("utf-8") for field in PreferenceRecord._fields))
