"""Two processes on loopback as one program, and what ends them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from entangle import training, transforms
from entangle.training.checkpoints import Checkpoints
from tests.training import resumable
from tests.training.processes import ended, finish, start

PROGRAM = Path(__file__).with_name("hosts_program.py")
STEPS = 10


def begin(folder, *words, processes=2):
    return start([sys.executable, str(PROGRAM), str(folder), *map(str, words)], processes)


def run(folder, *words, processes=2):
    finish(begin(folder, *words, processes=processes))


def wait_for(folder, lines, processes):
    file = folder / "metrics.jsonl"
    while not file.exists() or file.read_text().count("\n") < lines:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)


def restored(folder):
    stage = training.StageConfig(STEPS, 4, training.OptimizerConfig(learning_rate=0.02))
    tx = stage.optimizer.build(stage.steps, transforms.combine_pair(transforms.margin()))
    checkpoints = Checkpoints(folder / "checkpoints")
    state, position = checkpoints.restore(jax.eval_shape(lambda: training.init_state(resumable.start(), tx)))
    checkpoints.close()
    return state, position


def records(folder):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in training.read_metrics(folder)]


def assert_same(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB, where this user may mount one."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "none", tmp_path], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system takes more rights")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of two processes of one device each, never stopped."""
    folder = tmp_path_factory.mktemp("hosts") / "run"
    run(folder, 1)
    return folder


def test_two_processes_are_one_of_two_devices_and_their_checkpoint_opens_in_one(whole, tmp_path):
    run(tmp_path / "run", 2, processes=1)
    (state, position), (alone, same_position) = restored(whole), restored(tmp_path / "run")
    assert int(state.step) == STEPS
    assert position == same_position
    assert_same(state, alone)
    assert records(whole) == records(tmp_path / "run")
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in (tmp_path / "run").iterdir())


@pytest.mark.slow
def test_one_killed_ends_both_and_started_again_they_go_on_bitwise(whole, tmp_path):
    folder = tmp_path / "run"
    processes = begin(folder, 1, 0.2)
    wait_for(folder, 6, processes)
    time.sleep(0.3)  # past the first checkpoint, at step 4
    processes[1].send_signal(signal.SIGKILL)
    codes, _ = ended(processes)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    assert 4 <= Checkpoints(folder / "checkpoints").latest < STEPS
    run(folder, 1)
    assert_same(restored(folder), restored(whole))
    assert records(folder) == records(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("who", "after"), [(1, (2, 1)), (0, (1, 2)), (1, (1, 1))])
def test_sigterm_to_one_stops_both_with_a_checkpoint_and_other_processes_go_on(who, after, whole, tmp_path):
    folder = tmp_path / "run"
    processes = begin(folder, 1, 0.2)
    wait_for(folder, 1, processes)
    processes[who].send_signal(signal.SIGTERM)
    codes, errors = ended(processes)
    assert codes == [143, 143], errors
    step = Checkpoints(folder / "checkpoints").latest
    said = f"stopped: SIGTERM: saved at step {step} of {STEPS}; the same command goes on from there"
    assert all(said in error.splitlines() for error in errors)
    assert not (folder / "done.json").exists()
    count, devices = after
    run(folder, devices, processes=count)
    if count * devices == 2:
        assert_same(restored(folder), restored(whole))
        assert records(folder) == records(whole)
    else:  # sums over pairs are rounded in another order
        close = lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)  # noqa: E731
        jax.tree.map(close, restored(folder)[0], restored(whole)[0])


@pytest.mark.slow
def test_what_process_0_refuses_ends_both_in_one_line(tmp_path):
    (tmp_path / "mine.txt").write_text("a letter")
    codes, errors = ended(begin(tmp_path, 1))
    assert codes == [2, 2], errors
    message = f"error: {tmp_path} is not empty and holds no run (found mine.txt); name another folder"
    assert all(message in error.splitlines() for error in errors)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_a_checkpoint_of_another_model_ends_both_in_one_line(whole, tmp_path):
    folder = tmp_path / "run"
    processes = begin(folder, 1, 0.2)
    wait_for(folder, 6, processes)
    processes[0].send_signal(signal.SIGTERM)
    assert ended(processes)[0] == [143, 143]
    before = sorted(folder.rglob("*"))
    codes, errors = ended(begin(folder, 1, 0, 8))
    assert codes == [2, 2], errors
    head, embedding = "head is float32[6, 11] there and float32[8, 11]", "float32[11, 6] there and float32[11, 8] here"
    for error in errors:
        (said,) = [line for line in error.splitlines() if line.startswith("error: ")]
        assert f"does not fit this run: params/{head} here; params/token_embedding is {embedding}" in said
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
def test_a_full_disk_ends_both_in_one_line_with_nothing_half_written(small_disk):
    codes, errors = ended(begin(small_disk / "run", 1))
    assert codes == [2, 2], errors
    for error in errors:
        (said,) = [line for line in error.splitlines() if line.startswith("error: ")]
        assert "the checkpoint of step 4 cannot be written: it needs 1,0" in said
        assert "Traceback" not in error
    assert list((small_disk / "run" / "checkpoints").iterdir()) == []
