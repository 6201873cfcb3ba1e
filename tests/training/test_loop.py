import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from entangle import training
from entangle.errors import NonFiniteError, PreemptedError, UserError
from entangle.training.checkpoints import Checkpoints
from entangle.training.step import StepResult
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


@pytest.mark.parametrize("stop_at", [1, 4, 6, 13, 24])  # before and after the first checkpoint, which is at 5
def test_stopped_and_started_again_it_is_bitwise_equal(stop_at, whole, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        resumable.main(folder, stop_at=stop_at)
    assert Checkpoints(folder / "checkpoints").latest == ((stop_at - 1) // 5 * 5 or None)
    state = resumable.main(folder)
    assert records(folder) == records(whole[0])
    assert same(state, whole[1])


@pytest.mark.parametrize("at", [7, 24])  # after the last step nothing but the done-marker is missing
def test_sigterm_saves_and_started_again_it_is_bitwise_equal(at, whole, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(
        PreemptedError, match=rf"SIGTERM: saved at step {at} of 24; the same command goes on from there"
    ):
        resumable.main(folder, signal_at=at)
    assert Checkpoints(folder / "checkpoints").latest == at
    assert not (folder / "done.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    state = resumable.main(folder)
    assert records(folder) == records(whole[0])
    assert same(state, whole[1])
    assert (folder / "done.json").exists()


def test_fewer_steps_than_the_run_has_gone_are_refused(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        resumable.main(tmp_path / "run", stop_at=13)
    before = records(tmp_path / "run")
    monkeypatch.setattr(resumable, "STEPS", 9)
    with pytest.raises(UserError, match="the run has gone 10 steps, more than the 9 wanted"):
        resumable.main(tmp_path / "run")
    assert records(tmp_path / "run") == before and not (tmp_path / "run" / "done.json").exists()


def lines(folder):
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def test_killed_at_random_moments_it_continues_bitwise_equal(whole, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, str(Path(resumable.__file__)), str(folder), "0.05"]
    seed = time.time_ns()
    print(f"seed {seed}")  # shown when the test fails
    rng = random.Random(seed)
    for kill in ("while it starts", "while it steps", None):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if kill == "while it starts":
            time.sleep(rng.uniform(0.0, 3.0))
        elif kill == "while it steps":
            written = rng.randrange(7, 17)  # the first checkpoint, at step 5, is behind it; the last step is not
            while process.poll() is None and lines(folder) < written:
                time.sleep(0.002)
            time.sleep(rng.uniform(0.0, 0.1))
            assert process.poll() is None
        if kill:
            process.send_signal(signal.SIGKILL)
        error = process.communicate()[1].decode()
        assert process.returncode == (-signal.SIGKILL if kill else 0), error
        if kill == "while it steps":
            assert 5 <= Checkpoints(folder / "checkpoints").latest < 24
    assert (folder / "done.json").exists()
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


def test_a_done_run_without_its_checkpoint_keeps_its_metrics(tmp_path):
    folder = tmp_path / "run"
    resumable.main(folder)
    shutil.rmtree(folder / "checkpoints")
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="holds no checkpoint"):
        resumable.main(folder)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_folder_in_use_gets_no_second_mirror(tmp_path):
    opened = []
    run = training.RunFolder(tmp_path / "run", {"seed": 3})
    with run.locked(), pytest.raises(UserError, match="another process is training in this folder"):
        resumable.main(tmp_path / "run", tracker=lambda: opened.append(1) or training.NoTracker())
    assert not opened


def test_an_evaluation_that_is_not_finite_stops_the_run(tmp_path):
    stage = training.StageConfig(4, 1, training.OptimizerConfig("sgd"), eval_every=2, checkpoint_every=1)
    tx = stage.optimizer.build(4)
    run = training.RunFolder(tmp_path / "run", {})

    class Ones:
        def __next__(self):
            return 1.0, np.array([0])

        def get_state(self):
            return {}

    def step(state, batch):
        return state._replace(step=state.step + 1), StepResult({"loss": np.ones(())}, np.ones(1))

    def evaluate(state):
        return {"eval/fine": 1.0, "eval/margin": np.nan if (run.path / "metrics.jsonl").stat().st_size > 100 else 0.0}

    with pytest.raises(
        NonFiniteError, match=r"step 2: eval/margin not finite in the evaluation; last good checkpoint: "
    ):
        training.train(run, training.init_state(np.zeros(1), tx), step, Ones(), stage, evaluate=evaluate)
    assert "NaN" not in (run.path / "metrics.jsonl").read_text()


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
    resumable.main(tmp_path / "run", tracker=lambda: memory)
    assert memory.rows == training.read_metrics(tmp_path / "run")
    assert memory.closed
