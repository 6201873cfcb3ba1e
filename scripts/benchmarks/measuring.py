"""Measure contenders in turn, so that a slow spell of the machine falls on all of them alike."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm


class DisagreementError(RuntimeError):
    """The contenders did not compute the same numbers, so their times cannot be compared."""


def peak_memory(work: Callable[..., None], *arguments: Any) -> int:
    """Bytes of resident memory, at their peak, of a fresh process that does some work once, imports included; Linux only.

    Args:
      work: a function that a fresh interpreter can import.
      arguments: of the function.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(work, arguments)
        return pool.apply(_peak_resident)


def _peak_resident() -> int:
    # Linux; not getrusage, which starts from the parent's peak
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


class Contender(NamedTuple):
    """One side of a comparison.

    Attributes:
      name: how tables call it.
      run: does the work once and returns a number, here called the loss, when all of the work is finished.
      memory: bytes that it needs at its peak, where they are known.
    """

    name: str
    run: Callable[[], float]
    memory: int | None = None


def compiled_contender(name: str, compiled: Any, arguments: tuple[Any, ...]) -> Contender:
    """A compiled program whose first result is the loss; memory is that of arguments, results and temporaries.

    Args:
      name: of the contender.
      compiled: the program, from ``jax.jit(...).lower(...).compile()``.
      arguments: of the program.
    """
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    run: Callable[[], float] = lambda: float(jax.block_until_ready(compiled(*arguments))[0])  # noqa: E731
    return Contender(name, run, peak - memory.alias_size_in_bytes)


class Benchmark(NamedTuple):
    """A comparison of the first contender, this package's, with the others.

    Attributes:
      summary: one line: what is measured, and at which size.
      extra: the extra of the package that it needs.
      modules: modules of that extra.
      packages: distributions whose versions the result records.
      prepare: makes the contenders, one where no other can run; may write to the temporary folder that it is given.
      warm_up: rounds that are checked for agreement and not timed.
      runs: rounds that are timed.
      tolerance: largest difference of the losses of a warm-up round.
      pairs: that every contender trains on in a round; with it, pairs a second are told.
    """

    summary: str
    extra: str
    modules: tuple[str, ...]
    packages: tuple[str, ...]
    prepare: Callable[[Path], tuple[Contender, ...]]
    warm_up: int
    runs: int
    tolerance: float
    pairs: int | None = None


class Timing(NamedTuple):
    """What one contender did.

    Attributes:
      name: of the contender.
      losses: of all rounds, warm-up included.
      seconds: of the timed rounds.
      memory: of the contender.
    """

    name: str
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    memory: int | None = None


class Spread(NamedTuple):
    """Median and quartiles of a sample."""

    lower: float
    median: float
    upper: float


def spread(sample: Sequence[float]) -> Spread:
    """Return median and quartiles, interpolated between the sample's points, its extremes being the 0th and 4th.

    Example:
      >>> spread([4.0, 1.0, 2.0, 3.0, 5.0])
      Spread(lower=2.0, median=3.0, upper=4.0)
    """
    if len(sample) == 1:
        return Spread(sample[0], sample[0], sample[0])
    return Spread(*statistics.quantiles(sample, n=4, method="inclusive"))


class Result(NamedTuple):
    """All timings; a ratio below 1 says that the first contender takes less than the other."""

    timings: tuple[Timing, ...]

    def ratio(self, other: int = 1) -> float:
        """Median of the first over median of another one."""
        return spread(self.timings[0].seconds).median / spread(self.timings[other].seconds).median

    def ratio_spread(self, other: int = 1) -> Spread:
        """Median and quartiles of the ratio round by round, in which slow spells of the machine cancel."""
        both = zip(self.timings[0].seconds, self.timings[other].seconds, strict=True)
        return spread([a / b for a, b in both])

    def memory_ratio(self, other: int = 1) -> float | None:
        """Peak memory of the first over that of another one, if both are known."""
        mine, theirs = self.timings[0].memory, self.timings[other].memory
        return None if mine is None or theirs is None else mine / theirs


def measure(
    benchmark: Benchmark, contenders: Sequence[Contender], clock: Callable[[], float] = time.perf_counter
) -> Result:
    """Run the contenders in turn, warm-up rounds first.

    Args:
      benchmark: how many rounds, and how closely the contenders must agree.
      contenders: all sides.
      clock: seconds.

    Returns:
      Times and losses.

    Raises:
      DisagreementError: the losses of a warm-up round differ by more than the tolerance, or are not numbers.

    Example:
      >>> both = Contender("a", lambda: 1.0), Contender("b", lambda: 1.0)
      >>> example = Benchmark("nothing", "test", (), (), lambda folder: both, warm_up=1, runs=3, tolerance=0.0)
      >>> len(measure(example, both).timings[0].seconds)
      3
    """
    losses: list[list[float]] = [[] for _ in contenders]
    seconds: list[list[float]] = [[] for _ in contenders]
    # disable=None: a bar on a terminal, nothing in a log.
    for round_index in tqdm(range(benchmark.warm_up + benchmark.runs), unit="round", leave=False, disable=None):
        for side, contender in enumerate(contenders):
            start = clock()
            losses[side].append(contender.run())
            elapsed = clock() - start
            if round_index >= benchmark.warm_up:
                seconds[side].append(elapsed)
        if round_index < benchmark.warm_up:
            _check_agreement(contenders, losses, benchmark.tolerance)
    return Result(
        tuple(
            Timing(contender.name, tuple(losses[side]), tuple(seconds[side]), contender.memory)
            for side, contender in enumerate(contenders)
        )
    )


def _check_agreement(contenders: Sequence[Contender], losses: list[list[float]], tolerance: float) -> None:
    first = losses[0][-1]
    for contender, others in zip(contenders[1:], losses[1:], strict=True):
        # Written so that NaN disagrees too.
        if not abs(first - others[-1]) <= tolerance:
            raise DisagreementError(
                f"the contenders disagree in warm-up round {len(losses[0])}: {contenders[0].name} {first:.9g}, "
                f"{contender.name} {others[-1]:.9g}, tolerance {tolerance:g}; nothing was timed"
            )
