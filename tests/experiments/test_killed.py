"""The whole experiment killed at random moments, and started again by the same command, against one left alone."""

import contextlib
import random
import signal
import subprocess
import sys
import time

import pytest

from entangle.training import read_metrics

STAGE = {"batch-size": 4, "log-every": 2, "checkpoint-every": 2}
STEPS = {"base": 8, "sft": 6, "preference": 8}
SMALL = {"seeds": 2, "train-pairs": 64, "held-out-pairs": 8, "probe-pairs": 4, "sets": "single_token"}


def command(out, data_dir):
    flags = {**SMALL, "preset": "smoke", "out": out, "data-dir": data_dir}
    for stage, steps in STEPS.items():
        flags |= {f"{stage}.{name}": value for name, value in {**STAGE, "steps": steps}.items()}
    flags["preference.eval-every"] = 4
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "experiments.sentiment", *words, "--no-track"]


def records(out):
    files = sorted(out.rglob("metrics.jsonl"))
    return {
        str(file.relative_to(out)): [
            {name: value for name, value in record.items() if name != "seconds"} for record in read_metrics(file.parent)
        ]
        for file in files
    }


def texts(out):
    kept = [*sorted(out.rglob("*.csv")), *sorted(out.rglob("token_cosines.json"))]
    return {str(file.relative_to(out)): file.read_text() for file in kept}


@pytest.mark.slow
def test_killed_and_started_again_is_as_if_never_stopped(tmp_path):
    whole, killed, data_dir = tmp_path / "whole", tmp_path / "killed", tmp_path / "tfds"
    start = time.monotonic()
    subprocess.run(command(whole, data_dir), check=True, capture_output=True)
    seconds = time.monotonic() - start
    seed = time.time_ns()
    print(f"seed {seed}")  # shown when the test fails
    rng = random.Random(seed)
    kills = 0
    while not (killed / "done.json").exists():
        process = subprocess.Popen(command(killed, data_dir), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if kills < 5:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=rng.uniform(0.1, 0.9) * seconds)
            process.kill()
            kills += 1
        error = process.communicate()[1].decode()
        assert process.returncode in (0, -signal.SIGKILL), error
    assert kills > 0
    assert len(records(whole)) == 5  # the base model, and SFT and preferences for each of two seeds
    assert records(killed) == records(whole)
    assert texts(killed) == texts(whole)
