"""What every sweep is configured by: where it writes, the trial that its overrides change, how trials share programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from entangle.errors import UserError
from experiments.trial_config import TrialConfig


@dataclasses.dataclass(frozen=True)
class Packing:
    """How many trials share a program.

    Attributes:
      most: trials of one program; 0 for as many as fit into memory.
      memory_gib: what a program may take on each device; 0 for most of what is there.
      side_by_side: trials at once on a device; 0 for one on CPUs and all on accelerators.
    """

    most: int = 0
    memory_gib: float = 0.0
    side_by_side: int = 0

    def __post_init__(self) -> None:
        """Refuse what is below zero."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise UserError(f"--packing.{field.name.replace('_', '-')} {getattr(self, field.name)}: 0 or more")


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """A sweep.

    Attributes:
      out: folder of the sweep; made, or continued when it holds this experiment with the same --trial.
      preset: the defaults that the other flags override.
      seeds: number of seeds: order of the SFT and preference batches.
      trial: what all trials share, and what the sweep changes.
      packing: how many trials share a program.
      part: I/N runs the I-th of N shares of the trials alone (1/30, 2/30, ...), for array jobs on one file system; the figures
        are drawn by the last one to end.
      retry_failed: whether trials that failed are begun again.
      track: whether the runs are mirrored in W&B, grouped by sweep: offline, or online when a key is configured.
    """

    out: Path = Path("runs/sweep")
    preset: str = "laptop"
    seeds: int = 3
    trial: TrialConfig = TrialConfig()
    packing: Packing = Packing()
    part: str = ""
    retry_failed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    track: Annotated[bool, tyro.conf.FlagCreatePairsOff] = True

    def shares(self) -> tuple[int, int]:
        """Which share of how many is asked for, from ``part``.

        Raises:
          UserError: it is not I/N with I from 1 to N.

        Example:
          >>> from experiments.sweep_config import SweepConfig
          >>> SweepConfig(part="2/3").shares(), SweepConfig().shares()
          ((2, 3), (1, 1))
        """
        if not self.part:
            return 1, 1
        one, _, many = self.part.partition("/")
        if not (one.isdigit() and many.isdigit() and 1 <= int(one) <= int(many)):
            raise UserError(f"--part {self.part}: I/N is needed, with I from 1 to N")
        return int(one), int(many)
