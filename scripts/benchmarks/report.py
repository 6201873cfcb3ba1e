"""A measurement as a table for readers and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entangle.errors import UserError
from scripts.benchmarks.measuring import Benchmark, Result, spread


def list_lines(benchmarks: Mapping[str, Benchmark]) -> list[str]:
    """Return one line a benchmark: name, summary, extra.

    Args:
      benchmarks: name to benchmark.

    Returns:
      Lines without line ends.
    """
    width = max(map(len, benchmarks), default=0)
    return [f"{name:<{width}}  {entry.summary} (extra: {entry.extra})" for name, entry in benchmarks.items()]


def report_lines(name: str, benchmark: Benchmark, result: Result, machine: Mapping[str, Any]) -> list[str]:
    """Return the table: a line a contender, then ratio, agreement and machine.

    Args:
      name: of the benchmark.
      benchmark: its row of the table.
      result: times and losses.
      machine: from ``describe_machine``.

    Returns:
      Lines without line ends.
    """
    known = any(timing.memory is not None for timing in result.timings)
    wide = max(12, 1 + max(len(timing.name) for timing in result.timings))
    lines = [f"{name}: {benchmark.summary}", f"{'contender':<{wide}}{'median s':>10}{'quartiles s':>24}{'runs':>6}"]
    lines[1] += f"{'pairs/s':>10}" if benchmark.pairs else ""
    lines[1] += f"{'peak GiB':>10}" if known else ""
    for timing in result.timings:
        low, middle, high = spread(timing.seconds)
        lines.append(f"{timing.name:<{wide}}{middle:>10.4f}{f'{low:.4f} .. {high:.4f}':>24}{len(timing.seconds):>6}")
        if benchmark.pairs:
            lines[-1] += f"{benchmark.pairs / middle:>10.3f}"
        if known:
            lines[-1] += f"{'' if timing.memory is None else f'{timing.memory / 2**30:.2f}':>10}"
    mine = result.timings[0].name
    for other, timing in enumerate(result.timings[1:], 1):
        low, _, high = result.ratio_spread(other)
        memory = result.memory_ratio(other)
        lines.append(
            f"ratio {mine} / {timing.name}: {result.ratio(other):.3f} "
            f"(round by round, quartiles {low:.3f} .. {high:.3f})"
            f"{'' if memory is None else f', peak memory {memory:.3f}'}; below 1, {mine} takes less"
            f"{f'; {1 / result.ratio(other):.3f} times as many pairs a second' if benchmark.pairs else ''}"
        )
    checked = benchmark.warm_up or benchmark.runs
    rounds = zip(*(timing.losses[:checked] for timing in result.timings), strict=True)
    agreed = ", ".join(" and ".join(f"{loss:.6f}" for loss in losses) for losses in rounds)
    when = "before timing" if benchmark.warm_up else "of the timed rounds"
    lines.append(f"losses {when}: {agreed}; equal to {benchmark.tolerance:g}")
    versions = ", ".join(f"{package} {version}" for package, version in machine["packages"].items())
    lines.append(
        f"machine: {machine['cpu']}, {machine['cores']} cores, device {machine['device']}, "
        f"load {machine['load_average_at_start']} at start, Python {machine['python']}, {versions}"
    )
    return lines


def write_json(path: Path, name: str, benchmark: Benchmark, result: Result, machine: Mapping[str, Any]) -> None:
    """Write the result as one JSON object.

    Its keys are ``name``, ``summary``, ``ratios`` (of the first contender over every other one: ``ratio`` of medians,
    ``spread`` round by round, ``memory`` or null), ``runs`` (seconds of every timed round), ``spread`` (of these: lower
    quartile, median, upper quartile), ``pairs_per_second`` (at the median, or null), ``losses`` (of every round, warm-up
    included), ``memory`` (bytes at the peak, or null), ``warm_up``, ``tolerance`` and ``machine``.

    Args:
      path: the file; replaced when it exists.
      name: of the benchmark.
      benchmark: its row of the table.
      result: times and losses.
      machine: from ``describe_machine``.

    Raises:
      UserError: the file cannot be written.
    """
    content = {
        "name": name,
        "summary": benchmark.summary,
        "ratios": {
            timing.name: {
                "ratio": result.ratio(other),
                "spread": result.ratio_spread(other)._asdict(),
                "memory": result.memory_ratio(other),
            }
            for other, timing in enumerate(result.timings[1:], 1)
        },
        "runs": {timing.name: timing.seconds for timing in result.timings},
        "spread": {timing.name: spread(timing.seconds)._asdict() for timing in result.timings},
        "pairs_per_second": {
            timing.name: benchmark.pairs / spread(timing.seconds).median if benchmark.pairs else None
            for timing in result.timings
        },
        "losses": {timing.name: timing.losses for timing in result.timings},
        "memory": {timing.name: timing.memory for timing in result.timings},
        "warm_up": benchmark.warm_up,
        "tolerance": benchmark.tolerance,
        "machine": dict(machine),
    }
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
