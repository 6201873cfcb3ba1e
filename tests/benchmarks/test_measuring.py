import itertools

import pytest

from scripts.benchmarks.measuring import (
    Benchmark,
    Contender,
    DisagreementError,
    Result,
    Spread,
    Timing,
    measure,
    peak_memory,
    spread,
)


def benchmark(warm_up: int = 1, runs: int = 3, tolerance: float = 1e-4) -> Benchmark:
    def prepare(folder):
        raise AssertionError("the contenders are given")

    return Benchmark("a fake", "test", (), (), prepare, warm_up, runs, tolerance)


class Clock:
    """A clock that stands still unless a contender works."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def contender(name: str, clock: Clock, durations, losses=None, log=None) -> Contender:
    durations, losses = iter(durations), itertools.repeat(1.0) if losses is None else iter(losses)

    def run() -> float:
        if log is not None:
            log.append(name)
        clock.now += next(durations)
        return next(losses)

    return Contender(name, run)


def test_contenders_run_in_turn():
    clock, log = Clock(), []
    sides = [contender(name, clock, itertools.repeat(1.0), log=log) for name in "ab"]
    measure(benchmark(warm_up=1, runs=3), (sides[0], sides[1]), clock)
    assert "".join(log) == "abababab"


def test_warm_up_is_not_timed_but_its_losses_are_kept():
    clock = Clock()
    first = contender("a", clock, [9.0, 1.0, 2.0, 4.0], [0.7, 0.6, 0.5, 0.4])
    second = contender("b", clock, [50.0, 2.0, 8.0, 4.0], [0.7, 0.6, 0.5, 0.4])
    result = measure(benchmark(), (first, second), clock)
    assert result.timings[0] == Timing("a", (0.7, 0.6, 0.5, 0.4), (1.0, 2.0, 4.0))
    assert result.timings[1] == Timing("b", (0.7, 0.6, 0.5, 0.4), (2.0, 8.0, 4.0))
    # Medians 2 and 4. Round by round 1/2, 1/4, 1: sorted 1/4, 1/2, 1, whose quartiles lie halfway between neighbours.
    assert result.ratio() == 0.5
    assert result.ratio_spread() == Spread(0.375, 0.5, 0.75)


def test_ratio_is_of_medians_and_not_of_means():
    # Medians 2 and 1; one slow round would make the means 35 and 1.
    result = Result((Timing("a", (), (2.0, 101.0, 2.0)), Timing("b", (), (1.0, 1.0, 1.0))))
    assert result.ratio() == 2.0


def test_the_first_is_compared_with_every_other_in_time_and_memory():
    sides = [("a", 6.0, 30), ("b", 3.0, 20), ("c", 8.0, None)]
    result = Result(tuple(Timing(name, (), (seconds,), memory) for name, seconds, memory in sides))
    assert [result.ratio(other) for other in (1, 2)] == [2.0, 0.75]
    assert [result.memory_ratio(other) for other in (1, 2)] == [1.5, None]


@pytest.mark.parametrize("third", [1.0, 1.001])
def test_a_third_contender_must_agree_too(third):
    clock = Clock()
    losses = {"a": 1.0, "b": 1.0, "c": third}
    sides = [contender(n, clock, itertools.repeat(1.0), itertools.repeat(x)) for n, x in losses.items()]
    if third == 1.0:
        assert [timing.name for timing in measure(benchmark(), sides, clock).timings] == ["a", "b", "c"]
    else:
        with pytest.raises(DisagreementError, match=r"a 1, c 1\.001"):
            measure(benchmark(), sides, clock)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ([3.0], Spread(3.0, 3.0, 3.0)),
        ([1.0, 2.0], Spread(1.25, 1.5, 1.75)),  # quarter, half and three quarters of the way from 1 to 2
        ([5.0, 1.0, 4.0, 2.0, 3.0], Spread(2.0, 3.0, 4.0)),  # second, third and fourth of five
    ],
)
def test_spread_by_hand(sample, expected):
    assert spread(sample) == expected


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
@pytest.mark.parametrize("warm_up_round", [1, 2])
def test_disagreement_in_a_warm_up_round_stops_before_timing(wrong, warm_up_round):
    clock, log = Clock(), []
    losses = [1.0] * (warm_up_round - 1) + [wrong]
    first = contender("a", clock, itertools.repeat(1.0), log=log)
    second = contender("b", clock, itertools.repeat(1.0), losses, log)
    with pytest.raises(
        DisagreementError, match=f"disagree in warm-up round {warm_up_round}: a 1, b {wrong}, tolerance"
    ):
        measure(benchmark(warm_up=2, runs=3), (first, second), clock)
    assert len(log) == 2 * warm_up_round


def test_agreement_is_within_the_tolerance_inclusive():
    # 0.5 and 0.25 differ by exactly 0.25 in binary.
    for tolerance, agrees in [(0.25, True), (0.2499, False)]:
        clock = Clock()
        sides = [contender(n, clock, itertools.repeat(1.0), itertools.repeat(x)) for n, x in [("a", 0.5), ("b", 0.25)]]
        if agrees:
            measure(benchmark(tolerance=tolerance), (sides[0], sides[1]), clock)
        else:
            with pytest.raises(DisagreementError):
                measure(benchmark(tolerance=tolerance), (sides[0], sides[1]), clock)


def test_peak_memory_is_that_of_the_work():
    nothing, array = peak_memory(len, b""), peak_memory(bytearray, 2**27)
    assert 2**27 <= array - nothing < 2**30
