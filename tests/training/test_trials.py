"""Trials side by side or in turn, on one device or several: what each would be alone."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import data, training
from entangle.errors import NonFiniteError
from entangle.training.checkpoints import Checkpoints
from entangle.training.trials import stacked, trial

STAGE = training.StageConfig(6, 2, training.OptimizerConfig(learning_rate=0.1), 3, 2, 1)
RATES = (0.1, 0.5, 0.02)


def unigram(params, tokens):
    return jax.nn.log_softmax(params)[tokens]


def one_step(rate, state, batch):
    tx = STAGE.optimizer.build(STAGE.steps, learning_rate=rate)
    schedule = STAGE.optimizer.schedule(STAGE.steps, learning_rate=rate)
    return training.make_step(training.likelihood_gradients(unigram), tx, schedule)(state, batch)


def stream(seed, poison=None):
    text = data.text_batches(np.arange(40, dtype=np.int32) % 5, STAGE.batch_size, length=4, seed=seed)

    def batch(tokens, index):
        mask = tokens >= 0
        return training.TokenBatch(tokens, mask)

    return training.MappedBatches(text, batch)


def train(folders, rates=RATES, stop_at=None, **options):
    mapped = training.map_trials(lambda _, *own: one_step(*own), side_by_side=options.pop("side_by_side", None))
    jitted = jax.jit(functools.partial(mapped, (), jnp.asarray(rates)))

    def step(state, batch):
        if stop_at is not None and int(state.step[0]) + 1 == stop_at:
            raise KeyboardInterrupt
        return jitted(state, batch)

    def evaluate(state):
        return {"eval/first": state.params[:, 0]}

    runs = [training.RunFolder(folder, {"rate": rate}) for folder, rate in zip(folders, rates, strict=True)]
    start = training.init_state(jnp.zeros(5), STAGE.optimizer.build(STAGE.steps))
    streams = [stream(seed) for seed in range(len(rates))]
    return training.train_trials(runs, [start] * len(runs), step, streams, STAGE, evaluate=evaluate, **options)


def alone(folder, place):
    tx = STAGE.optimizer.build(STAGE.steps)
    return training.train(
        training.RunFolder(folder, {"rate": RATES[place]}),
        training.init_state(jnp.zeros(5), tx),
        jax.jit(functools.partial(one_step, RATES[place])),
        stream(place),
        STAGE,
        evaluate=lambda state: {"eval/first": state.params[0]},
    )


def records(folder):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in training.read_metrics(folder)]


def folders(path, count=3):
    return [path / f"trial{place}" for place in range(count)]


@pytest.mark.parametrize("side_by_side", [None, 2, 3])
def test_each_is_what_it_is_alone(tmp_path, side_by_side):
    ends = train(folders(tmp_path), side_by_side=side_by_side)
    for place, end in enumerate(ends):
        assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(end))  # nothing is left on the devices
        expected = alone(tmp_path / f"alone{place}", place)
        np.testing.assert_allclose(end.params, expected.params, rtol=1e-6)
        found, wanted = records(tmp_path / f"trial{place}"), records(tmp_path / f"alone{place}")
        assert [r.keys() for r in found] == [r.keys() for r in wanted]
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5, atol=1e-6)


def test_stacking_repeats_the_last_one_until_the_devices_are_full():
    assert stacked([{"x": np.zeros(1)}] * 3, 2)["x"].shape == (4, 1)
    assert trial(stacked([{"x": np.arange(2)}]), 0)["x"].tolist() == [0, 1]


@pytest.mark.parametrize("stop_at", [1, 3, 6])
def test_stopped_and_started_again_each_is_bitwise_equal(tmp_path, stop_at):
    whole = train(folders(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(folders(tmp_path / "stopped"), stop_at=stop_at)
    again = train(folders(tmp_path / "stopped"))
    for place, (one, other) in enumerate(zip(again, whole, strict=True)):
        assert np.array_equal(one.params, other.params)
        assert records(tmp_path / "stopped" / f"trial{place}") == records(tmp_path / "whole" / f"trial{place}")


def test_a_trial_goes_on_alone_from_where_it_stood_among_others(tmp_path):
    expected = alone(tmp_path / "alone", 1)
    with pytest.raises(KeyboardInterrupt):
        train(folders(tmp_path), stop_at=4)
    end = alone(tmp_path / "trial1", 1)
    np.testing.assert_allclose(end.params, expected.params, rtol=1e-6)


def test_what_is_not_finite_stops_alone(tmp_path):
    first, broken, last = train(folders(tmp_path), rates=(0.1, float("inf"), 0.02))
    assert isinstance(broken, NonFiniteError)
    assert "step 1: update_norm not finite" in str(broken)
    assert int(first.step) == int(last.step) == 6
    done = [(folder / "done.json").exists() for folder in folders(tmp_path)]
    assert done == [True, False, True]
    assert [r["step"] for r in records(tmp_path / "trial1")] == [0]
    np.testing.assert_allclose(first.params, alone(tmp_path / "alone", 0).params, rtol=1e-6)


def test_when_all_have_stopped_no_more_steps_are_made(tmp_path):
    ends = train(folders(tmp_path, 2), rates=(float("nan"), float("inf")))
    assert all(isinstance(end, NonFiniteError) for end in ends)
    assert Checkpoints(tmp_path / "trial0" / "checkpoints").latest is None


def test_those_that_are_done_are_given_back(tmp_path):
    once, again = train(folders(tmp_path)), train(folders(tmp_path))
    assert all(np.array_equal(one.params, other.params) for one, other in zip(once, again, strict=True))


def test_different_steps_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(folders(tmp_path), stop_at=4)
    moved = folders(tmp_path)[1] / "checkpoints" / "2"
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="begin at one step"):
        train(folders(tmp_path))


def test_done_says_the_first_and_the_last_evaluation(tmp_path):
    (end,) = train(folders(tmp_path, 1), rates=(0.1,))
    done = training.run_folder.json.loads((tmp_path / "trial0" / "done.json").read_text())
    assert done["first"] == {"step": 0, "eval/first": 0.0}
    assert done["last"]["step"] == 6
    np.testing.assert_allclose(done["last"]["eval/first"], end.params[0], rtol=1e-6)


def test_fewer_than_one_at_a_time_is_refused():
    with pytest.raises(ValueError, match="side_by_side 0"):
        training.map_trials(lambda shared, own: own, side_by_side=0)


def test_devices_share_the_trials():
    program = Path(__file__).with_name("trials_mesh_program.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("agreed")


def test_single_states_are_on_the_host_before_they_are_stacked(tmp_path, monkeypatch):
    seen = []

    def watched(trees, multiple=1):
        seen.extend(jax.tree.leaves(list(trees)))
        return stacked(trees, multiple)

    monkeypatch.setattr(training.trials, "stacked", watched)
    train(folders(tmp_path, 2), rates=(0.1, 0.2))
    assert seen and not any(isinstance(leaf, jax.Array) for leaf in seen)
