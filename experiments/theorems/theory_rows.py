"""The table of measured points on disk, and the parts of it that figures and claims look at."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from entangle.errors import UserError
from experiments.theorems.theory_setups import Point

FILE = "theory.csv"
Row = dict[str, Any]
_TEXT = ("setup", "objective")


def write(out: Path, rows: Sequence[Row]) -> None:
    """Write ``theory.csv``: a row a point, a blank where a point has no such number."""
    partial = out / f"{FILE}.partial"
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(out / FILE)


def read(out: Path) -> list[Row]:
    """Read it back.

    Raises:
      UserError: the folder has none.

    Example:
      >>> import pathlib, tempfile
      >>> from experiments.theorems import theory_rows
      >>> out = pathlib.Path(tempfile.mkdtemp())
      >>> theory_rows.write(out, [{"setup": "suffix", "cosine": 0.5}, {"setup": "random", "case": 0.0}])
      >>> theory_rows.read(out)
      [{'setup': 'suffix', 'cosine': 0.5}, {'setup': 'random', 'case': 0.0}]
    """
    if not (out / FILE).exists():
        raise UserError(f"{out}: no measured points ({FILE} is missing); run the experiment to its end first")
    with (out / FILE).open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    return [{k: v if k in _TEXT else float(v) for k, v in line.items() if v != ""} for line in lines]


def pick(rows: Sequence[Row], *varied: str, **fixed: Any) -> list[Row]:
    """The points whose every field is that of the default point, but for some.

    Args:
      rows: of the table.
      *varied: fields of ``Point`` that may have any value.
      **fixed: fields of ``Point`` that have another value than the default.

    Example:
      >>> import dataclasses
      >>> from experiments.theorems.theory_rows import pick
      >>> from experiments.theorems.theory_setups import Point
      >>> rows = [dataclasses.asdict(Point(suffix=n, bits=bits)) for n in range(3) for bits in (32, 64)]
      >>> [row["suffix"] for row in pick(rows, "suffix", bits=32)]
      [0, 1, 2]
    """
    wanted = dataclasses.asdict(Point(**fixed))
    tests = {name: value for name, value in wanted.items() if name not in varied}
    return [row for row in rows if all(row[name] == value for name, value in tests.items())]


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    """One number of every row.

    Example:
      >>> from experiments.theorems.theory_rows import column
      >>> column([{"a": 1.0}, {"a": 2.0}], "a").tolist()
      [1.0, 2.0]
    """
    return np.array([row[name] for row in rows])


def values(rows: Sequence[Row], name: str) -> list[Any]:
    """The values of a field, each once, in order.

    Example:
      >>> from experiments.theorems.theory_rows import values
      >>> values([{"a": 2.0}, {"a": 1.0}, {"a": 2.0}], "a")
      [1.0, 2.0]
    """
    return sorted({row[name] for row in rows})
