"""A step compiled for a slice, and what the compiler says of it."""

from __future__ import annotations

import collections
import dataclasses
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

from entangle import sharding
from entangle.models import DecoderConfig
from entangle.plan.chips import CHIPS, GIB, chips_of, devices, parse_topology
from entangle.plan.config import PlanConfig
from entangle.plan.hlo import Program
from entangle.plan.step import Step, decoder, training_step


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the compiler says of one step on one chip.

    Attributes:
      fits: whether it compiled within the chip's memory.
      bytes_by_kind: of what goes in, of temporary memory and of the program; of temporary memory nothing where it does
        not fit.
      needed: bytes in all, by the compiler's word where it does not fit; 0 where it gives none.
      collectives: kind to how many run in a step, and their bytes.
      flops: operations of a step, by XLA's count.
      bytes: read and written in a step, by XLA's count, at most.
      cycles: estimated by the compiler, of all instructions that have an estimate.
      seconds: that compiling took.
    """

    fits: bool
    bytes_by_kind: dict[str, int]
    needed: int
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    cycles: int = 0
    seconds: float = 0.0


def mesh_text(settings: PlanConfig, chips: int) -> str:
    """The mesh that is meant: by default every chip keeps a part of every parameter.

    Example:
      >>> from entangle.plan.compiled import mesh_text
      >>> from entangle.plan.config import PlanConfig
      >>> mesh_text(PlanConfig(), 64)
      'fsdp=64'
    """
    return settings.mesh or f"fsdp={chips}"


def _step(settings: PlanConfig, config: DecoderConfig) -> tuple[Mesh, Step]:
    kind, shape = parse_topology(settings.topology)
    assert shape is not None
    mesh = sharding.make_mesh(mesh_text(settings, chips_of(shape)), devices(kind, shape))
    return mesh, training_step(settings, config, mesh)


def inputs_bytes(settings: PlanConfig) -> int:
    """Bytes on one chip of what goes into a step; nothing is compiled.

    Raises:
      UserError: bad settings.
      MissingExtraError: the compiler is not installed.
    """
    return sum(_step(settings, decoder(settings))[1].bytes_by_kind().values())


def _compile(settings: PlanConfig, config: DecoderConfig) -> tuple[Any, dict[str, int]]:
    """The compiled step, or what the compiler said when it did not fit; and the bytes of what goes in."""
    mesh, step = _step(settings, config)
    with jax.set_mesh(mesh):
        lowered = jax.jit(step.function, donate_argnums=1, out_shardings=step.results).lower(*step.arguments)
    try:
        return lowered.compile(), step.bytes_by_kind()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return str(error), step.bytes_by_kind()


def measure(settings: PlanConfig) -> Measured:
    """Compile a step and read off what it needs.

    Raises:
      UserError: bad settings.
      MissingExtraError: the compiler is not installed.
    """
    before = time.perf_counter()
    compiled, kinds = _compile(settings, decoder(settings))
    seconds = time.perf_counter() - before
    if isinstance(compiled, str):
        return Measured(False, kinds, _said_to_need(compiled), seconds=seconds)
    memory = compiled.memory_analysis()
    kinds |= {
        "activations and workspace": memory.temp_size_in_bytes,
        "results that replace nothing": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    needed = sum(kinds.values())
    hbm = CHIPS[parse_topology(settings.topology)[0]].hbm
    program = Program(compiled.as_text())
    collectives: dict[str, dict[str, int]] = {}
    for found in program.collectives():
        entry = collectives.setdefault(found.kind, collections.Counter())
        entry["times"] += found.times
        entry["bytes"] += found.times * found.bytes
    every = {kind: dict(entry) for kind, entry in sorted(collectives.items())}
    return Measured(needed <= hbm, kinds, needed, every, *program.costs(), program.cycles(), seconds)


def _said_to_need(message: str) -> int:
    """Bytes that the compiler says it would have used."""
    found = re.search(r"Used ([\d.]+)([KMG]) of ", message)
    if found is None:
        return 0
    return int(float(found[1]) * {"K": 2**10, "M": 2**20, "G": GIB}[found[2]])
