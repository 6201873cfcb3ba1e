import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from entangle import training
from entangle.errors import NonFiniteError
from entangle.training.checkpoints import Checkpoints
from tests.training import resumable


def records(folder):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in training.read_metrics(folder)]


def same(left, right):
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), left, right))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, resumable.main(folder)


def test_every_step_and_evaluation_is_recorded(whole):
    folder, state = whole
    steps = [r["step"] for r in records(folder) if "loss" in r]
    looks = [r["step"] for r in records(folder) if "eval/margin" in r]
    assert steps == list(range(1, 25))
    assert looks == [0, 6, 12, 18, 24]
    assert int(state.step) == 24
    assert Checkpoints(folder / "checkpoints").latest == 24


def test_training_lowers_the_loss(whole):
    losses = [r["loss"] for r in records(whole[0]) if "loss" in r]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_killed_at_random_moments_it_continues_bitwise_equal(whole, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, str(Path(resumable.__file__)), str(folder), "0.05"]
    seed = time.time_ns()
    print(f"seed {seed}")  # shown when the test fails
    rng = random.Random(seed)
    kills = 0
    while not (folder / "done.json").exists():
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if kills < 2:
            time.sleep(rng.uniform(0.0, 3.0) if kills == 0 else 3.0 + rng.uniform(0.0, 3.0))
            process.send_signal(signal.SIGKILL)
            kills += 1
        error = process.communicate()[1].decode()
        assert process.returncode in (0, -signal.SIGKILL), error
    expected, final = whole
    assert records(folder) == records(expected)
    restored = training.final_params(folder, jax.eval_shape(lambda: final))
    assert same(restored, final.params)


def test_a_done_run_is_not_run_again(whole):
    folder, state = whole
    before = (folder / "metrics.jsonl").read_bytes()
    again = resumable.main(folder)
    assert same(again, state)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_non_finite_loss_names_step_pairs_and_checkpoint(tmp_path):
    stream = resumable.data.pair_batches(resumable.encoded(), 4, seed=3)
    step = next(i for i in range(1, 100) if 17 in next(stream)[1])
    with pytest.raises(NonFiniteError) as error:
        resumable.main(tmp_path / "run", poison=17)
    last = (step - 1) // 5 * 5
    good = f"last good checkpoint: {tmp_path / 'run' / 'checkpoints' / str(last)}" if last else "no checkpoint yet"
    assert str(error.value).startswith(f"step {step}: loss and update_norm not finite; examples 17 (pair:17); ")
    assert str(error.value).endswith(good)
    kept = [r["step"] for r in records(tmp_path / "run") if "loss" in r]
    assert kept == list(range(1, step))
    assert not (tmp_path / "run" / "done.json").exists()


class Memory:
    def __init__(self):
        self.rows, self.closed = [], False

    def log(self, step, metrics):
        self.rows.append({"step": step, **metrics})

    def close(self):
        self.closed = True


def test_the_tracker_mirrors_the_file(tmp_path):
    memory = Memory()
    resumable.main(tmp_path / "run", tracker=memory)
    assert memory.rows == training.read_metrics(tmp_path / "run")
    assert memory.closed
