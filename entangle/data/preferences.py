"""Preference pairs from JSONL files, in the three forms that they are published in."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from entangle.data import dialogues
from entangle.data.chat_templates import TemplateError
from entangle.data.records import PreferenceRecord
from entangle.errors import UserError

_SHOWN = 5
_HOLD_OUT_EVERY = 8


class BadLine(NamedTuple):
    """A line that holds no preference pair.

    Attributes:
      source: ``"file:line"``.
      reason: what is wrong with it.
    """

    source: str
    reason: str


class ReadReport(NamedTuple):
    """What became of the lines of a preference file.

    Attributes:
      path: the file.
      lines_read: number of lines that are not blank.
      bad_lines: the lines that were left out, in order.
      text_lines: the sources of the pairs whose completions are text, not chat messages, in order.
    """

    path: str
    lines_read: int
    bad_lines: tuple[BadLine, ...]
    text_lines: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the report as lines to print: the counts, then the first bad lines.

        Example:
          >>> ReadReport("a.jsonl", 2, (BadLine("a.jsonl:2", "no field 'chosen'"),)).lines()
          ['a.jsonl: 1 of 2 lines read, 1 bad', "  a.jsonl:2: no field 'chosen'"]
        """
        bad = len(self.bad_lines)
        shown = [f"  {source}: {reason}" for source, reason in self.bad_lines[:_SHOWN]]
        rest = [f"  and {bad - _SHOWN} more"] if bad > _SHOWN else []
        return [f"{self.path}: {self.lines_read - bad} of {self.lines_read} lines read, {bad} bad", *shown, *rest]


def read_preferences(
    path: str | Path, form: dialogues.ChatForm = dialogues.hh_rlhf
) -> tuple[list[PreferenceRecord], ReadReport]:
    """Read a preference file, one JSON object a line.

    A line is one of: ``prompt``, ``chosen`` and ``rejected`` as strings; the same as lists of chat messages (``role``,
    ``content``), where the prompt may be left to what chosen and rejected share; ``chosen`` and ``rejected`` as two
    whole dialogues in hh-rlhf's format. See `entangle.data.dialogues` for how these become text. Lines that are none of
    these are left out and named in the report; blank lines are passed over.

    Args:
      path: a ``.jsonl`` or ``.jsonl.gz`` file.
      form: writes chat messages out, for example a `ChatTemplate`.

    Returns:
      The pairs, in order, with sources ``"file:line"``, and the report.

    Raises:
      UserError: the file cannot be read, has not one good line, or one that the template cannot write.
    """
    path = Path(path)
    records: list[PreferenceRecord] = []
    bad: list[BadLine] = []
    text: list[str] = []
    for number, line in _numbered_lines(path):
        source = f"{path.name}:{number}"
        try:
            fields = _parse_object(line)
            records.append(PreferenceRecord(*dialogues.parse_pair(fields, form), source))
        except dialogues.NotAPairError as error:
            bad.append(BadLine(source, str(error)))
        except TemplateError as error:
            raise UserError(f"{source}: {error}") from error
        else:
            text += [source] if dialogues.is_text(fields) else []
    if not records:
        first = f"; the first bad one is {bad[0].source}: {bad[0].reason}" if bad else ""
        raise UserError(f"{path}: no preference pair in {len(bad)} lines{first}")
    return records, ReadReport(path.name, len(records) + len(bad), tuple(bad), tuple(text))


def divide_by_prompt(
    records: Sequence[PreferenceRecord], held_out: Sequence[PreferenceRecord] | None = None
) -> tuple[list[PreferenceRecord], list[PreferenceRecord]]:
    """Make training and held-out pairs that share no prompt.

    Args:
      records: the pairs to train on, at least one.
      held_out: the pairs to evaluate on; None holds out every eighth prompt of ``records``, with all its pairs.

    Returns:
      Training and held-out pairs, in order; training pairs whose prompt is held out are left out.

    Raises:
      UserError: too few prompts to hold any out, or none left to train on.

    Example:
      >>> records = [PreferenceRecord(f"prompt {i // 2}", " yes", " no", f"a.jsonl:{i + 1}") for i in range(32)]
      >>> [len(part) for part in divide_by_prompt(records)]
      [28, 4]
    """
    if held_out is None:
        prompts = list(dict.fromkeys(record.prompt for record in records))
        if len(prompts) < _HOLD_OUT_EVERY:
            raise UserError(
                f"{records[0].source} and after: {len(prompts)} different prompts are too few to hold every "
                f"{_HOLD_OUT_EVERY}th out; name a held-out file"
            )
        apart = set(prompts[_HOLD_OUT_EVERY - 1 :: _HOLD_OUT_EVERY])
        held_out = [record for record in records if record.prompt in apart]
    else:
        apart = {record.prompt for record in held_out}
    train = [record for record in records if record.prompt not in apart]
    if not train:
        raise UserError(f"{records[0].source} and after: no pair is left to train on, every prompt is held out")
    return train, list(held_out)


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _parse_object(line: bytes) -> dict[str, object]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise dialogues.NotAPairError(f"not UTF-8 ({error.reason} at byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")
        raise dialogues.NotAPairError(f"not JSON ({reason} at character {error.pos + 1} of the line)") from error
    except RecursionError as error:
        raise dialogues.NotAPairError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise dialogues.NotAPairError("not a JSON object")
    return value
