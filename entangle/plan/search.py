"""Which setting makes a step fit: tried with the compiler, one after the other, and never guessed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from entangle import models
from entangle.errors import UserError
from entangle.plan.chips import CHIPS, chips_of, parse_topology
from entangle.plan.compiled import Measured, inputs_bytes, measure
from entangle.plan.config import PlanConfig


@dataclasses.dataclass(frozen=True)
class Try:
    """One setting that was tried.

    Attributes:
      change: flags that differ from what was asked for.
      measured: what the compiler says; None where what goes in alone is larger than the chip's memory.
    """

    change: dict[str, str]
    measured: Measured | None

    @property
    def fits(self) -> bool:
        """Whether it fits."""
        return self.measured is not None and self.measured.fits


def candidates(settings: PlanConfig) -> Iterator[dict[str, str]]:
    """Flags to try, those that change the least about training first.

    Example:
      >>> from entangle.plan.config import PlanConfig
      >>> from entangle.plan.search import candidates
      >>> next(candidates(PlanConfig(remat="none", mesh="data=64")))
      {'remat': 'full'}
    """
    kind, shape = parse_topology(settings.topology)
    assert shape is not None
    chips, remat, mesh = chips_of(shape), {}, {}
    if settings.remat != "full":
        remat = {"remat": "full"}
        yield remat
    if settings.mesh and settings.mesh != f"fsdp={chips}":
        mesh = {"mesh": f"fsdp={chips}"}
        yield mesh
        if remat:
            yield remat | mesh
    least = remat | mesh
    pairs = settings.batch_size
    while pairs % 2 == 0 and (pairs := pairs // 2) >= chips:
        yield least | {"batch_size": str(pairs)}
    if settings.dtype != "bfloat16":
        yield least | {"dtype": "bfloat16"}
    if settings.lora == "none":
        yield least | {"lora": "paper" if _has_separate_matrices(settings) else "attention"}
    for larger in CHIPS[kind].sizes:
        if chips_of(larger) > chips and settings.batch_size % chips_of(larger) == 0:
            yield remat | {"topology": f"{kind}:{larger}", "mesh": f"fsdp={chips_of(larger)}"}


def _has_separate_matrices(settings: PlanConfig) -> bool:
    return settings.model not in models.PRESETS or not models.PRESETS[settings.model](vocab_size=8).fused_qkv


def with_changes(settings: PlanConfig, change: dict[str, str]) -> PlanConfig:
    """The settings with some flags changed, given as text.

    Example:
      >>> from entangle.plan.config import PlanConfig
      >>> from entangle.plan.search import with_changes
      >>> with_changes(PlanConfig(), {"batch_size": "8"}).batch_size
      8
    """
    fields: Any = {name: int(value) if name == "batch_size" else value for name, value in change.items()}
    return dataclasses.replace(settings, **fields)


def try_until_fits(settings: PlanConfig, say: Callable[[Try], None]) -> list[Try]:
    """Try settings until one fits.

    Args:
      settings: that do not fit.
      say: called with every try as soon as it is known.
    """
    tries = []
    for change in candidates(settings):
        found = Try(change, _measure(with_changes(settings, change)))
        say(found)
        tries.append(found)
        if found.fits:
            break
    return tries


def smallest_slice(settings: PlanConfig, say: Callable[[Try], None]) -> tuple[PlanConfig, list[Try]]:
    """The smallest slice of a generation that a step fits on, every chip keeping a part of every parameter.

    Args:
      settings: whose topology is a generation alone.
      say: called with every try.

    Raises:
      UserError: it fits on none that the pairs can be divided over.
    """
    kind, _ = parse_topology(settings.topology)
    tries = []
    for shape in CHIPS[kind].sizes:
        if settings.batch_size % chips_of(shape):
            continue
        change = {"topology": f"{kind}:{shape}"}
        found = Try(change, _measure(with_changes(settings, change)))
        say(found)
        tries.append(found)
        if found.fits:
            return with_changes(settings, change), tries
    raise UserError(
        f"--topology {kind}: fits on no slice that {settings.batch_size} pairs can be divided over; "
        "give a larger --batch-size, or adapters with --lora"
    )


def _measure(settings: PlanConfig) -> Measured | None:
    """None where the arguments alone are too large, which need not be compiled to be known."""
    if inputs_bytes(settings) > CHIPS[parse_topology(settings.topology)[0]].hbm:
        return None
    return measure(settings)
