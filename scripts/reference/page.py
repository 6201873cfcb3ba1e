"""What the reference pages share: written from the code, or compared with it."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def write_or_check(page: Path, text: str, module: str) -> None:
    """Write a page, or with ``--check`` say that it differs (status 1).

    Args:
      page: the file.
      text: what the code says.
      module: that writes it, for the message.
    """
    parser = argparse.ArgumentParser(description=f"Writes {page.parent.name}/{page.name} from the code.")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    if not parser.parse_args().check:
        page.write_text(text, encoding="utf-8")
    elif not page.exists() or page.read_text(encoding="utf-8") != text:
        print(f"{page.name} is not what the code says: run python -m {module}", file=sys.stderr)
        raise SystemExit(1)


def paragraphs(doc: str) -> Iterator[str]:
    """Summary and remarks of a docstring: all paragraphs before its sections, dedented."""
    yield from inspect.cleandoc(doc).split("\n\nArgs:")[0].split("\n\nReferences:")[0].split("\n\n")


def flowing(paragraph: str) -> str:
    """A docstring's paragraph as one line of Markdown.

    Example:
      >>> flowing("One ``x``,\\n  and :func:`entangle.transforms.pcgrad`.")
      'One `x`, and `pcgrad`.'
    """
    words = " ".join(paragraph.split())
    for role in (":func:`entangle.transforms.", ":func:`entangle.geometry.", ":func:`"):
        words = words.replace(role, "`")
    return words.replace("``", "`")


def source(doc: str) -> str:
    """The section References, on one line; empty where there is none."""
    parts = inspect.cleandoc(doc).split("References:")
    return "" if len(parts) == 1 else " ".join(parts[1].split("\n\n")[0].split())
