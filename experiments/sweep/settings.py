"""What every sweep is configured by: where it writes, the trial that its overrides change, how trials share programs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import tyro

from entangle.errors import UserError
from experiments.sweep.trial_config import TrialConfig

RAY_OWN = ("CPU", "GPU", "memory", "object_store_memory")
"""Resources that Ray has other words for."""


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
        """Refuse what is no number of trials or of bytes."""
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) < math.inf:
                raise UserError(f"--packing.{field.name.replace('_', '-')} {getattr(self, field.name)}: 0 or more")


@dataclasses.dataclass(frozen=True)
class OnRay:
    """How the trials are spread over machines; experiments/sweep/on_ray.py says what the machines need.

    Attributes:
      address: of a Ray cluster that this machine belongs to: auto, or HOST:PORT of its head; local makes one of this machine
        alone. Without any, the trials run in this process.
      cpus: of a node that a task takes, which runs a share of the trials in a process of its own.
      gpus: of a node that a task takes; without any, trials run on CPUs.
      resources: of a node that a task takes besides, by name, e.g. TPU 4.
      retries: how often a task is started again after the death of its process or node.
      patience: seconds that a task waits for a trial's folder while another process holds it, for example one that is
        dying; the trial is left to that process then.
    """

    address: str = ""
    cpus: float = 1.0
    gpus: float = 0.0
    resources: dict[str, float] = dataclasses.field(default_factory=dict)
    retries: int = 3
    patience: float = 60.0

    def __post_init__(self) -> None:
        """Refuse what Ray would refuse later, and what changes nothing."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not 0 <= value < math.inf:
                raise UserError(f"--ray.{field.name} {value}: 0 or more")
            usual = {} if field.name == "resources" else field.default
            if not self.address and value != usual:
                raise UserError(f"--ray.{field.name} has no effect without --ray.address")
        for name, amount in self.resources.items():
            if name in RAY_OWN or not 0 < amount < math.inf:
                raise UserError(f"--ray.resources {name} {amount:g}: a name other than {', '.join(RAY_OWN)}; above 0")
        for name, amount in self.needs.items():
            if amount > 1 and amount != int(amount):
                raise UserError(f"--ray: {amount:g} of {name}: above 1 Ray takes whole numbers")
        if not any(self.needs.values()):
            raise UserError("a task has to take something of a node: --ray.cpus, --ray.gpus or --ray.resources")

    @property
    def needs(self) -> dict[str, float]:
        """What a task takes of a node, by Ray's names.

        Example:
          >>> from experiments.sweep.settings import OnRay
          >>> OnRay("auto", gpus=0.5, resources={"TPU": 4}).needs
          {'CPU': 1.0, 'GPU': 0.5, 'TPU': 4}
        """
        return {"CPU": self.cpus, "GPU": self.gpus, **self.resources}


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """A sweep.

    Attributes:
      out: folder of the sweep; made, or continued when it holds this experiment with the same --trial.
      preset: the defaults that the other flags override.
      seeds: number of seeds: order of the SFT and preference batches.
      trial: what all trials share, and what the sweep changes.
      packing: how many trials share a program.
      ray: whether and how the trials are spread over machines.
      part: I/N runs the I-th of N shares of the trials alone (1/30, 2/30, ...), for array jobs on one file system; the figures
        are drawn by the last one to end.
      export_wandb: file to write for W&B's agents (wandb sweep FILE.yaml), each of which runs one trial after another; nothing
        else is done then.
      retry_failed: whether trials that failed are begun again.
      track: whether the runs are mirrored in W&B, grouped by sweep: offline, or online when a key is configured.
    """

    out: Path = Path("runs/sweep")
    preset: str = "laptop"
    seeds: int = 3
    trial: TrialConfig = TrialConfig()
    packing: Packing = Packing()
    ray: OnRay = OnRay()
    part: str = ""
    export_wandb: Path | None = None
    retry_failed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    track: Annotated[bool, tyro.conf.FlagCreatePairsOff] = True

    def shares(self) -> tuple[int, int]:
        """Which share of how many is asked for, from ``part``.

        Raises:
          UserError: it is not I/N with I from 1 to N.

        Example:
          >>> from experiments.sweep.settings import SweepConfig
          >>> SweepConfig(part="2/3").shares(), SweepConfig().shares()
          ((2, 3), (1, 1))
        """
        if not self.part:
            return 1, 1
        one, _, many = self.part.partition("/")
        if not (one.isdigit() and many.isdigit() and 1 <= int(one) <= int(many)):
            raise UserError(f"--part {self.part}: I/N is needed, with I from 1 to N")
        return int(one), int(many)
