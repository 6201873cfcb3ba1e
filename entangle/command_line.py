"""What every command line shares: presets, and errors that end in one line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from entangle import distributed, extras
from entangle.errors import MissingExtraError, NonFiniteError, PreemptedError, UnfinishedError, UserError

Config = TypeVar("Config")


def parse(presets: Mapping[str, Config], arguments: Sequence[str] | None = None, *, description: str) -> Config:
    """Read a configuration from the command line: ``--preset`` names the defaults, any other flag overrides one.

    Args:
      presets: name -> frozen dataclass with a field ``preset``; the first is the default.
      arguments: the words of the command line; None takes the process's.
      description: what ``--help`` begins with.

    Returns:
      The configuration.

    Raises:
      UserError: no such preset, no such flag, or a value that is none of its flag.
      SystemExit: help was asked for.

    Example:
      >>> import dataclasses
      >>> from entangle.command_line import parse
      >>> @dataclasses.dataclass(frozen=True)
      ... class Toy:
      ...     preset: str = "short"
      ...     steps: int = 1
      >>> parse({"short": Toy(), "long": Toy("long", 9)}, ["--preset", "long"], description="A toy.").steps
      9
    """
    extras.require("train", "tyro")
    import tyro

    words = list(sys.argv[1:] if arguments is None else arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=next(iter(presets)))
    name = first.parse_known_args(words)[0].preset
    if name not in presets:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(presets)}")
    default = presets[name]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(type(default), args=words, default=default, description=description)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """What a box of tyro's says: sections between rules, the first rule with a title in it or above it."""
    lines = [line.strip(" │") for line in box.splitlines()]
    sections: list[list[str]] = [[]]
    for line in lines:
        if line.startswith(("╭", "├", "╰")) or (line and not line.strip("-─")):
            sections.append([])
        elif line:
            sections[-1].append(line)
    said = []
    for section in filter(None, sections[1:]):
        if section[0].startswith("Argument helptext:"):
            said.append(f" ({section[1]})")
        elif not section[0].startswith("For full helptext"):
            said.append(("; " if said else "") + " ".join(section))
    return "".join(said) or " ".join(filter(None, lines))


def refuse_unused(settings: Any, default: Any, names: Sequence[str], why: str) -> None:
    """Refuse flags that would change nothing, rather than let a user believe that they did.

    Args:
      settings: the configuration read from the command line, a dataclass.
      default: the preset that it started from.
      names: fields without effect, dotted; a group stands for all that is in it.
      why: what the message says of the reason.

    Raises:
      UserError: one of the fields differs from the preset.

    Example:
      >>> import dataclasses
      >>> from entangle.command_line import refuse_unused
      >>> @dataclasses.dataclass(frozen=True)
      ... class Toy:
      ...     batch_size: int = 1
      >>> refuse_unused(Toy(2), Toy(), ["batch_size"], "there are no batches")
      Traceback (most recent call last):
      entangle.errors.UserError: --batch-size 2 has no effect: there are no batches
    """
    given, usual = (dict(leaves(dataclasses.asdict(x))) for x in (settings, default))
    for name, value in given.items():
        if value != usual.get(name) and any(f"{name}.".startswith(f"{group}.") for group in names):
            words = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise UserError(f"--{name.replace('_', '-')} {words} has no effect: {why}")


def leaves(tree: Mapping[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    """What lies in nested dicts, by dotted name.

    Example:
      >>> from entangle.command_line import leaves
      >>> dict(leaves({"sft": {"steps": 3}, "out": "x"}))
      {'sft.steps': 3, 'out': 'x'}
    """
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{head}{name}.")
        else:
            yield f"{head}{name}", value


def say_where(out: Path) -> None:
    """Print the devices and the output folder, as an experiment begins."""
    import jax

    if distributed.is_writer():
        print(f"devices: {', '.join(d.device_kind for d in jax.devices())}; output: {out}")


def name_files(files: Sequence[Path]) -> None:
    """Print the files that an experiment wrote.

    Example:
      >>> from pathlib import Path
      >>> from entangle.command_line import name_files
      >>> name_files([Path("runs/x/report.md")])
      <BLANKLINE>
      wrote:
        runs/x/report.md
    """
    if distributed.is_writer():
        print("\n".join(["", "wrote:", *(f"  {file}" for file in files)]))


def run(main: Callable[[], None]) -> None:
    """Run a program: bad input ends in one line and status 2; a non-finite loss, and machines that fail, in one and status 1.

    Training that SIGTERM stopped ends in status 143, an interrupted one in 130. Of several processes, one whose error is
    its own does not wait for the others, see ``distributed.leave``.

    Example:
      >>> from entangle.command_line import run
      >>> run(lambda: None)
    """
    try:
        main()
    except (UserError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        distributed.leave(2)
    except (NonFiniteError, UnfinishedError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        distributed.leave(1)
    except PreemptedError as error:
        print(f"stopped: {error}", file=sys.stderr)
        distributed.leave(143)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        distributed.leave(130)
