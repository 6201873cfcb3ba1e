"""TPU chips and slices as the compiler knows them, without having any."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from entangle import extras
from entangle.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What Google publishes of one TPU chip.

    Attributes:
      hbm: bytes of memory.
      flops: bfloat16 operations a second, at most.
      bandwidth: bytes a second between memory and chip, at most.
      links: bytes a second between chips, both directions, at most.
      clock: cycles a second, from ``flops`` and the products that one cycle makes.
      axes: of a slice: 2 or 3.
      sizes: slices to try, the smallest first.

    References:
      cloud.google.com/tpu/docs, "System architecture", the pages of v4, v5e, v5p and v6e.
    """

    hbm: int
    flops: float
    bandwidth: float
    links: float
    clock: float
    axes: int
    sizes: tuple[str, ...]


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
CHIPS: Mapping[str, Chip] = {
    "v4": Chip(32 * GIB, 275e12, 1228e9, 300e9, 1.05e9, 3, _DEEP),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, 1.5e9, 2, _FLAT),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9, 1.75e9, 3, _DEEP),
    "v6e": Chip(32 * GIB, 918e12, 1640e9, 448e9, 1.75e9, 2, _FLAT),
}
"""Name of a generation to its chip."""


def parse_topology(name: str) -> tuple[str, str | None]:
    """The generation and the shape of ``v5e:8x8``; ``v5p`` alone leaves the shape to be found.

    Raises:
      UserError: there is no such generation, the shape has another number of axes, or it is of GPUs.

    Example:
      >>> from entangle.plan.chips import parse_topology
      >>> parse_topology("v5e:8x8"), parse_topology("v5p")
      (('v5e', '8x8'), ('v5p', None))
    """
    kind, _, shape = name.partition(":")
    if re.match(r"(?i)gpu|cuda|rocm|nvidia|[abh]\d{2,3}", kind):
        raise UserError(
            f"--topology {name}: XLA's GPU compiler needs a GPU on this machine, so GPUs cannot be planned without one; "
            f"choose a TPU: {', '.join(CHIPS)}"
        )
    if kind not in CHIPS:
        raise UserError(f"--topology {name}: no TPU is called {kind!r}: choose from {', '.join(CHIPS)}, as in v5e:8x8")
    if not shape:
        return kind, None
    axes = CHIPS[kind].axes
    if not re.fullmatch("x".join([r"[1-9]\d*"] * axes), shape):
        raise UserError(f"--topology {name}: a slice of {kind} has {axes} axes, as in {kind}:{CHIPS[kind].sizes[2]}")
    return kind, shape


def chips_of(shape: str) -> int:
    """Number of chips of a shape.

    Example:
      >>> from entangle.plan.chips import chips_of
      >>> chips_of("2x2x4")
      16
    """
    return math.prod(map(int, shape.split("x")))


@functools.cache
def devices(kind: str, shape: str) -> tuple[Any, ...]:
    """The devices of a slice, for a mesh; to be compiled for, not to be run on.

    Raises:
      MissingExtraError: the compiler is not installed.
      UserError: the compiler does not know such a slice.
    """
    extras.require("plan", "libtpu")
    from jax.experimental import topologies

    # nothing is run, so another process may use the compiler at the same time
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        found = topologies.get_topology_desc(f"{kind}:{shape}", platform="tpu").devices
    except Exception as error:  # of the runtime: no class of its own
        said = " ".join(str(error).split())
        raise UserError(f"--topology {kind}:{shape}: the TPU compiler does not know it: {said[:200]}") from None
    return tuple(found)
