"""The block ``Formulas:`` of an objective's docstring, as text to print and as expressions to evaluate."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

_REFERENCE = re.compile(r"\b(r_w|r_l|h|ref_w|ref_l)\b")


class Formulas(NamedTuple):
    """What a docstring says.

    Attributes:
      summary: its first sentence.
      lines: the block as it stands.
      assignments: name and expression, in order: what is short for what, then L, d_w and d_l.
      ratio: the expression for d_w / d_l, or None where none is given.
      negative: coefficient -> the condition under which it is negative; None for "at times".
      source: the section ``References:``, in one line.
    """

    summary: str
    lines: list[str]
    assignments: list[tuple[str, str]]
    ratio: str | None
    negative: dict[str, str | None]
    source: str

    @property
    def needs_reference(self) -> bool:
        """Whether the formulas have the reference's log-probabilities in them."""
        return any(_REFERENCE.search(expression) for _, expression in self.assignments)


def parse(function: Callable[..., Any]) -> Formulas:
    """Read a docstring.

    Raises:
      ValueError: it lacks a section, or a line of the block cannot be read.
    """
    doc = inspect.cleandoc(function.__doc__ or "")
    lines = _section(doc, "Formulas")
    assignments, negative, ratio = [], {}, None
    for line in lines:
        if match := re.fullmatch(r"(d_[wl]) < 0 (?:where (.*)|at times)", line):
            negative[match[1]] = match[2]
        elif match := re.fullmatch(r"d_w / d_l = (.*)", line):
            ratio = match[1]
        elif match := re.fullmatch(r"(\w+) = (.*)", line):
            assignments.append((match[1], match[2]))
        else:
            raise ValueError(f"{function.__name__}: cannot read the formula {line!r}")
    summary = " ".join(doc.split("\n\n")[0].split())
    return Formulas(summary, lines, assignments, ratio, negative, " ".join(_section(doc, "References")))


def _section(doc: str, name: str) -> list[str]:
    match = re.search(rf"^{name}:\n((?:  .*\n)+)", doc + "\n", re.MULTILINE)
    if not match:
        raise ValueError(f"no section {name} in {doc.splitlines()[0]!r}")
    return [line.strip() for line in match[1].splitlines()]
