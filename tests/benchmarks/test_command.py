import itertools
import json
import os
import platform

import jax
import pytest

from scripts.benchmarks import __main__ as command
from scripts.benchmarks.measuring import Benchmark, Contender
from scripts.benchmarks.table import BENCHMARKS


def fake(second_loss: float = 0.5, modules: tuple[str, ...] = ("json",)) -> dict[str, Benchmark]:
    def prepare(folder):
        assert folder.is_dir()
        return Contender("ours", lambda: 0.5, 3 * 2**29), Contender("theirs", lambda: second_loss, 2**30)

    return {"fake": Benchmark("a fake one", "peers", modules, ("jax", "no-such-package"), prepare, 1, 3, 1e-4)}


@pytest.fixture
def ticking(monkeypatch):
    """A clock that reads 1, 4, 9, 16, ...: the turns, ours and theirs, take 3, 7, 11, 15, ... seconds."""
    ticks = (float(n * n) for n in itertools.count(1))
    real = command.measure
    monkeypatch.setattr(command, "measure", lambda benchmark, sides: real(benchmark, sides, lambda: next(ticks)))


def test_json_holds_the_measurement(tmp_path, ticking):
    file = tmp_path / "result.json"
    assert command.main(["fake", "--json", str(file)], fake()) == 0
    content = json.loads(file.read_text())
    # (2k)^2 - (2k-1)^2 = 4k - 1: k = 1, 2 are the warm-up round; ours has k = 3, 5, 7, theirs k = 4, 6, 8.
    assert content["runs"] == {"ours": [11.0, 19.0, 27.0], "theirs": [15.0, 23.0, 31.0]}
    assert content["spread"]["ours"] == {"lower": 15.0, "median": 19.0, "upper": 23.0}
    assert content["pairs_per_second"] == {"ours": None, "theirs": None}
    assert list(content["ratios"]) == ["theirs"]
    assert content["ratios"]["theirs"]["ratio"] == 19.0 / 23.0
    assert content["ratios"]["theirs"]["memory"] == 1.5
    assert content["memory"] == {"ours": 3 * 2**29, "theirs": 2**30}
    assert content["losses"] == {"ours": [0.5] * 4, "theirs": [0.5] * 4}
    assert (content["name"], content["summary"], content["warm_up"], content["tolerance"]) == (
        "fake",
        "a fake one",
        1,
        1e-4,
    )


def test_pairs_a_second_are_told_where_a_round_has_pairs(tmp_path, capsys, ticking):
    file = tmp_path / "result.json"
    assert command.main(["fake", "--json", str(file)], {"fake": fake()["fake"]._replace(pairs=38)}) == 0
    # medians of 19 and 23 seconds, see above; 23 / 19 = 1.2105
    assert json.loads(file.read_text())["pairs_per_second"] == {"ours": 2.0, "theirs": 38 / 23}
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-3:] == ["pairs/s", "peak", "GiB"]
    assert lines[2].split()[-2:] == ["2.000", "1.50"] and lines[3].split()[-2:] == ["1.652", "1.00"]
    assert lines[4].endswith("; below 1, ours takes less; 1.211 times as many pairs a second")


def test_json_describes_the_machine(tmp_path, ticking):
    file = tmp_path / "result.json"
    command.main(["fake", "--json", str(file)], fake())
    machine = json.loads(file.read_text())["machine"]
    assert machine["packages"] == {"jax": jax.__version__, "no-such-package": None}
    assert machine["python"] == platform.python_version()
    assert 1 <= machine["cores"] <= os.cpu_count()
    assert machine["cpu"]


def test_table_has_median_quartiles_ratio_losses_and_machine(capsys, ticking):
    assert command.main(["fake"], fake()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "fake: a fake one"
    assert lines[2].split() == ["ours", "19.0000", "15.0000", "..", "23.0000", "3", "1.50"]
    assert lines[3].split() == ["theirs", "23.0000", "19.0000", "..", "27.0000", "3", "1.00"]
    assert lines[4].startswith("ratio ours / theirs: 0.826 ") and ", peak memory 1.500; " in lines[4]
    assert lines[5] == "losses before timing: 0.500000 and 0.500000; equal to 0.0001"
    assert lines[6].startswith("machine: ") and f"jax {jax.__version__}" in lines[6]


def test_without_a_warm_up_the_losses_are_those_of_the_timed_rounds_and_long_times_stay_apart(capsys, monkeypatch):
    ticks = (2000.0 * n for n in itertools.count())
    real = command.measure
    monkeypatch.setattr(command, "measure", lambda benchmark, sides: real(benchmark, sides, lambda: next(ticks)))
    assert command.main(["fake"], {"fake": fake()["fake"]._replace(warm_up=0, runs=1)}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["ours", "2000.0000", "2000.0000", "..", "2000.0000", "1", "1.50"]
    assert lines[5] == "losses of the timed rounds: 0.500000 and 0.500000; equal to 0.0001"


def test_list_names_every_benchmark(capsys):
    assert command.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(BENCHMARKS)
    assert all(benchmark.summary in line for benchmark, line in zip(BENCHMARKS.values(), lines, strict=True))


@pytest.mark.parametrize(
    ("arguments", "benchmarks", "status", "message"),
    [
        (["stepp"], BENCHMARKS, 2, "unknown benchmark 'stepp': choose from step"),
        (
            ["fake"],
            fake(modules=("json", "no_such_module")),
            2,
            "fake needs the extra peers: no_such_module not installed: it comes with the extra",
        ),
        (
            ["fake", "--json", "no/such/folder/x.json"],
            fake(),
            2,
            "--json no/such/folder/x.json: not a file in an existing folder",
        ),
        (["fake"], fake(second_loss=0.6), 1, "the contenders disagree in warm-up round 1: ours 0.5, theirs 0.6"),
    ],
)
def test_refusals_are_one_line_and_a_status(arguments, benchmarks, status, message, capsys):
    assert command.main(arguments, benchmarks) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"scripts/benchmark: {message}") and captured.err.count("\n") == 1


def test_disagreement_writes_no_json(tmp_path):
    file = tmp_path / "result.json"
    assert command.main(["fake", "--json", str(file)], fake(second_loss=0.6)) == 1
    assert not file.exists()
