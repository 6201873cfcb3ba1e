"""What the text of a compiled TPU program tells: how often a computation runs, its collectives, its estimated cycles."""

from __future__ import annotations

import collections
import importlib
import math
import re
from typing import Any, NamedTuple

import jax

# private, and the only way to XLA's count of one computation's operations
_HLO: Any = importlib.import_module("jaxlib._hlo")
_JAX: Any = importlib.import_module("jaxlib._jax")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
_NO_ESTIMATE = 2**53
"""The compiler writes the largest whole number where it does not know."""
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_HEADER = re.compile(r"^(ENTRY )?(%?[\w.\-]+) .*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|condition|body|called_computations|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(_KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_WHILE = re.compile(r" while\(.*condition=(%[\w.\-]+), body=(%[\w.\-]+)")
_CONSTANT = re.compile(r"(%[\w.\-]+) = s32\[\]\S* constant\((\d+)\)")


class Collective(NamedTuple):
    """One place of the program where chips exchange numbers.

    Attributes:
      kind: ``all-gather``, ``all-reduce``, ...
      bytes: of its result on one chip.
      times: how often it runs in a step.
    """

    kind: str
    bytes: int
    times: int


class Program:
    """A compiled program's text, taken apart.

    Args:
      text: of a scheduled module, ``compiled.as_text()``.

    Example:
      >>> from entangle.plan.hlo import Program
      >>> text = '''
      ... %body (p: s32[]) -> s32[] {
      ...   %g = bf16[4,8]{1,0} all-gather(%x), channel_id=1, backend_config={"estimated_cycles":"100"}
      ... }
      ... %cond (p: s32[]) -> pred[] {
      ...   %c = s32[]{:T(128)} constant(3)
      ...   ROOT %lt = pred[] compare(%p, %c), direction=LT
      ... }
      ... ENTRY %main (p: s32[]) -> s32[] {
      ...   %w = s32[] while(%p), condition=%cond, body=%body
      ... }
      ... '''
      >>> Program(text).collectives(), Program(text).cycles()
      ([Collective(kind='all-gather', bytes=64, times=3)], 300)
    """

    def __init__(self, text: str) -> None:
        """Take the text apart."""
        self.lines: dict[str, list[str]] = {}
        self.entry = name = ""
        self._text: list[str] = []
        for line in text.splitlines():
            if name or _HEADER.match(line):  # without what comes before, which says where the code stands
                self._text.append(re.sub(r" stack_frame_id=\d+", "", line))
            if (header := _HEADER.match(line)) and not line.startswith(" "):
                name = header[2]
                self.lines[name] = []
                self.entry = name if header[1] else self.entry
            elif name:
                self.lines[name].append(line)
        self.times = self._times()

    def _times(self) -> dict[str, int]:
        """Computation to how often it runs: those that no loop holds once, by whatever they are called."""
        times: dict[str, int] = collections.defaultdict(int)
        pending = [(self.entry, 1)]
        while pending:
            name, factor = pending.pop()
            if name not in self.lines or times[name] >= factor:
                continue
            times[name] = factor
            for line in self.lines[name]:
                loop = _WHILE.search(line)
                inner = factor * self._trips(loop[1]) if loop else factor
                for called in _CALLED.findall(line):
                    pending += [(other, inner) for other in called.split(", ")]
        return dict(times)

    def _trips(self, condition: str) -> int:
        """Iterations of a loop that counts up to a constant; 1 where it is another kind of loop."""
        lines = self.lines.get(condition, [])
        constants = {match[1]: int(match[2]) for line in lines if (match := _CONSTANT.search(line))}
        compared = [line for line in lines if " compare(" in line and "direction=LT" in line]
        found = [
            value for name, value in constants.items() if compared and re.search(rf"{re.escape(name)}\b", compared[0])
        ]
        return found[0] if len(found) == 1 else 1

    def collectives(self) -> list[Collective]:
        """All collectives; one that is cut into several asynchronous parts has one channel and counts once."""
        found: dict[str, Collective] = {}
        for name, lines in self.lines.items():
            for line in lines:
                if (match := _COLLECTIVE.search(line)) is None or name not in self.times:
                    continue
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else f"{name}{len(found)}"
                sizes = [_bytes(dtype, shape) for dtype, shape in _SHAPE.findall(match[1])]
                # what starts asynchronously returns operand and result, and a few words
                size = max(sizes, default=0) if "-start(" in line else sum(sizes)
                times = max(self.times[name], found[key].times if key in found else 0)
                found[key] = Collective(match[2], size, times)
        return list(found.values())

    def costs(self) -> tuple[float, float]:
        """Operations, and bytes read and written, of a whole run by XLA's count.

        XLA counts a loop's body once; here the body of every loop is counted by itself, and as often as it runs. What is
        updated in place counts as read and written whole, so there are fewer bytes in truth.
        """
        flops, size = self._counted(self.entry)
        for name, lines in self.lines.items():
            for line in lines:
                if (loop := _WHILE.search(line)) and name in self.times:
                    more = self.times[name] * (self._trips(loop[1]) - 1)
                    of_body = self._counted(loop[2])
                    flops, size = flops + more * of_body[0], size + more * of_body[1]
        return flops, size

    def _counted(self, root: str) -> tuple[float, float]:
        """XLA's count of one computation and those that it calls, loops' bodies once."""
        lines = ["HloModule one"]
        for line in self._text:
            line = line.removeprefix("ENTRY ")
            lines.append(f"ENTRY {line}" if line.startswith(f"{root} (") else line)
        module = _HLO.hlo_module_from_text("\n".join(lines))
        found = _JAX.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
        return float(found.get("flops", 0.0)), float(found.get("bytes accessed", 0.0))

    def cycles(self) -> int:
        """The compiler's estimate of all instructions that it gives one for; waiting for other chips is not in it."""
        return sum(
            self.times.get(name, 0) * int(cycles)
            for name, lines in self.lines.items()
            for line in lines
            for cycles in re.findall(r'"estimated_cycles":"(\d+)"', line)
            if int(cycles) < _NO_ESTIMATE
        )


def _bytes(dtype: str, shape: str) -> int:
    return _BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size)
