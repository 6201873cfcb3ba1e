"""A plan as lines to read and as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from entangle.errors import UserError
from entangle.plan.chips import CHIPS, GIB, Chip, chips_of, parse_topology
from entangle.plan.compiled import Measured, mesh_text
from entangle.plan.config import PlanConfig
from entangle.plan.search import Try

FILE = "plan.json"
_RECEIVED = {"all-reduce": 2.0}
"""What a chip receives over what a collective gives it, for large rings; 1 for the others."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a step on a slice.

    Attributes:
      settings: what was planned, the slice found where it was left open.
      measured: of the step.
      plain: of the same step without geometry; None where there is none to compare.
      tries: settings that were tried.
    """

    settings: PlanConfig
    measured: Measured
    plain: Measured | None = None
    tries: tuple[Try, ...] = ()

    @property
    def chip(self) -> Chip:
        """The chip that it is planned for."""
        return CHIPS[parse_topology(self.settings.topology)[0]]

    def seconds(self) -> dict[str, float]:
        """How long a step takes by the compiler's cycles, by operations alone and by collectives alone."""
        measured = self.measured
        received = sum(entry["bytes"] * _RECEIVED.get(kind, 1.0) for kind, entry in measured.collectives.items())
        return {
            "estimated": measured.cycles / self.chip.clock,
            "operations": measured.flops / self.chip.flops,
            "collectives": received / self.chip.links,
        }

    def bound(self) -> str:
        """What holds a step up: links, where collectives take longer than all else is estimated to; operations, where they
        alone take half of the estimate; else memory.
        """
        seconds = self.seconds()
        if seconds["collectives"] > seconds["estimated"]:
            return "the links between chips"
        return "operations" if seconds["operations"] >= 0.5 * seconds["estimated"] else "memory"


def lines(plan: Plan) -> list[str]:
    """The plan as a person reads it."""
    settings, measured = plan.settings, plan.measured
    _, shape = parse_topology(settings.topology)
    assert shape is not None
    mesh = mesh_text(settings, chips_of(shape))
    said = [
        f"{settings.model}, {settings.objective}, {_trained(settings)}, geometry {'on' if settings.geometry else 'off'}: "
        f"{settings.batch_size} pairs of 2 x {settings.max_length} tokens a step",
        f"{settings.topology} ({chips_of(shape)} chips), mesh {mesh}",
        "",
        f"bytes on a chip, of {plan.chip.hbm / GIB:.0f} GiB:",
        *_table([(name, _gib(size)) for name, size in measured.bytes_by_kind.items()]),
    ]
    if measured.fits:
        said += _table([("all", f"{_gib(measured.needed)}  fits")])
    elif measured.needed:
        said += _table([("all", f"{_gib(measured.needed)}  DOES NOT FIT, says the compiler")])
    else:
        said += ["  DOES NOT FIT, says the compiler"]
    said += _costs(plan)
    if plan.tries:
        said += ["", "tried:", *(f"  {line}" for line in map(tried, plan.tries))]
    return said


def _trained(settings: PlanConfig) -> str:
    return "all parameters trained" if settings.lora == "none" else f"adapters {settings.lora!r} on a frozen base"


def _costs(plan: Plan) -> list[str]:
    measured, seconds = plan.measured, plan.seconds()
    if not measured.fits:
        return []
    rows = [
        ("operations", f"{measured.flops:.3e}"),
        ("bytes read and written, at most", f"{measured.bytes:.3e}"),
        *((kind, f"{e['times']} times, {_gib(e['bytes']).strip()}") for kind, e in measured.collectives.items()),
        ("time, by the compiler's cycles", f"{seconds['estimated']:.3f} s"),
        ("time, operations at the chip's peak", f"{seconds['operations']:.3f} s"),
        ("time, collectives at the links' peak", f"{seconds['collectives']:.3f} s"),
    ]
    said = ["", "a step on a chip:", *_table(rows)]
    said.append(f"  held up by {plan.bound()}; waiting for other chips is not in the compiler's cycles")
    if plan.plain is None:
        return said
    plain = plan.plain
    rows = [
        ("operations", f"{measured.flops / plain.flops - 1:+.1%}"),
        ("bytes on a chip", f"{(measured.needed - plain.needed) / 2**20:+.0f} MiB"),
        ("compiler's cycles", f"{measured.cycles / max(1, plain.cycles) - 1:+.1%}"),
    ]
    for kind in sorted({*measured.collectives, *plain.collectives}):
        rows.append((kind, f"{_times(measured, kind) - _times(plain, kind):+d} times"))
    return [*said, "", "geometry, against the same step without it:", *_table(rows)]


def _times(measured: Measured, kind: str) -> int:
    return measured.collectives.get(kind, {}).get("times", 0)


def tried(one: Try) -> str:
    """One setting that was tried, as a line.

    Example:
      >>> from entangle.plan.report import tried
      >>> from entangle.plan.search import Try
      >>> tried(Try({"batch_size": "8"}, None))
      '--batch-size 8: does not fit: what goes in is larger than the memory'
    """
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in one.change.items())
    if one.measured is None:
        return f"{flags}: does not fit: what goes in is larger than the memory"
    size = f", {_gib(one.measured.needed)} a chip" if one.measured.needed else ""
    return f"{flags}: {'fits' if one.fits else 'does not fit'}{size}"


def _gib(size: int) -> str:
    return f"{size / GIB:8.3f} GiB"


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return [f"  {name:<38} {value}" for name, value in rows]


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-able data; bytes, operations and seconds are those of one chip."""
    return {
        "kind": "plan",
        "settings": {**dataclasses.asdict(plan.settings), "out": str(plan.settings.out)},
        "fits": plan.measured.fits,
        "hbm": plan.chip.hbm,
        "step": dataclasses.asdict(plan.measured),
        "seconds": plan.seconds(),
        "bound": plan.bound() if plan.measured.fits else None,
        "without_geometry": None if plan.plain is None else dataclasses.asdict(plan.plain),
        "tries": [{**dataclasses.asdict(one), "fits": one.fits} for one in plan.tries],
    }


def check_folder(out: Path) -> None:
    """Refuse a folder that holds something else than a plan.

    Raises:
      UserError: it does.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not _is_plan(out / FILE):
        raise UserError(f"--out {out}: holds something else than a plan; nothing was written")


def _is_plan(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["kind"] == "plan")
    except (OSError, ValueError, KeyError, TypeError):
        return False
