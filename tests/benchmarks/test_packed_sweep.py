"""The packed sweep's benchmark at a small size: the same trials on both sides, and what it refuses."""

import dataclasses
import json

import jax
import pytest

from experiments import margin_objectives
from scripts.benchmarks import packed_sweep, sweep_folders
from scripts.benchmarks.measuring import DisagreementError

FLAGS = ["--preset", "smoke", "--objectives", "dpo", "slic_hf", "--seeds", "1", "--trial.base.steps", "2"]


def small():
    smoke = margin_objectives.presets()["smoke"]
    trial = dataclasses.replace(smoke.trial, base=dataclasses.replace(smoke.trial.base, steps=2))
    return dataclasses.replace(smoke, objectives=("dpo", "slic_hf"), seeds=1, trial=trial)


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
def test_both_sides_train_the_same_trials(tmp_path):
    sides = packed_sweep.contenders(small(), FLAGS, tmp_path, cache=True)
    losses = [side.run() for side in sides]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    names = [sorted(path.name for path in (tmp_path / side.name / "trials").iterdir()) for side in sides]
    assert names[0] == names[1]
    assert len(names[0]) == 2


def test_other_losses_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        packed_sweep.trial_runs, "prepare", lambda out, trials, tracker: (out / "starts").mkdir(parents=True)
    )
    found = iter([{"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.001}])

    def pretend(command, environment):
        if "--part" in command and not command[command.index("--part") + 1].startswith("1/"):
            return
        out = tmp_path / ("one program" if "--part" not in command else "a process each")
        for name, loss in next(found).items():
            (out / "trials" / name).mkdir(parents=True)
            (out / "trials" / name / "done.json").write_text(json.dumps({"metrics": {"loss": loss}}))

    monkeypatch.setattr(packed_sweep, "_run", pretend)
    packed, processes = packed_sweep.contenders(small(), FLAGS, tmp_path)
    assert packed.run() == 1.5
    with pytest.raises(DisagreementError, match=r"b: last loss 2.001 under a process each, 2 before"):
        processes.run()


def test_a_fabricated_sweep_is_summarised(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_folders, "SUMMARISED", 20)
    (contender,) = sweep_folders.prepare_summary(tmp_path)
    assert contender.run() == 20.0
