"""The file for W&B's agents: every trial once, by the command that makes the sweep; and what an agent's run mirrors."""

import dataclasses
import itertools
import json

import pytest
import wandb
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from entangle import command_line, training
from experiments import margin_objectives
from experiments.pairs.pair_config import identity
from experiments.sweep import launch, plan
from experiments.sweep.settings import SweepConfig

WORDS = [
    "--preset",
    "smoke",
    "--no-track",
    "--trial.no-sft-first",
    "--trial.label-words",
    "good",
    "bad",
    "--betas",
    "0.1",
    "1e-05",
]


def exported(tmp_path, words):
    file = tmp_path / "sweep.yaml"
    margin_objectives.main([*words, "--export-wandb", str(file)])
    return yaml.safe_load(file.read_text())


def agents_commands(config):
    """Commands as ``wandb_agent.Agent`` puts them together, for every point of the grid."""
    names, values = zip(*((name, given["values"]) for name, given in config["parameters"].items()), strict=True)
    for point in itertools.product(*values):
        args = {name: {"value": value} for name, value in zip(names, point, strict=True)}
        made = {"${" + name + "}": words for name, words in create_sweep_command_args({"args": args}).items()}
        made |= {"${env}": ["/usr/bin/env"], "${interpreter}": ["python"]}
        yield [word for chunk in config["command"] for word in made.get(chunk, [chunk])]


def test_agents_run_every_trial_once_by_the_sweeps_own_command(tmp_path):
    out = tmp_path / "out"
    words = [*WORDS, "--out", str(out), "--trial.pair-chain", "cagrad", "--trial.pair-chain-args", "c", "0.25"]
    commands = list(agents_commands(exported(tmp_path, words)))
    presets = margin_objectives.presets()
    settings = command_line.parse(presets, words, description="")
    trials = plan(settings.trial, margin_objectives.sweep(settings), identity)
    run = []
    for command in commands:
        assert command[:4] == ["/usr/bin/env", "python", "-m", "experiments.margin_objectives"]
        theirs = command_line.parse(presets, command[4:], description="")
        assert dataclasses.replace(theirs, part="") == settings
        place, shares = theirs.shares()
        run += trials[place - 1 :: shares]
        assert len(trials[place - 1 :: shares]) == 1
    assert run == trials
    assert not out.exists()


def test_what_agents_decide_is_refused_and_files_that_cannot_be_written(fail, tmp_path):
    file = str(tmp_path / "sweep.yaml")
    assert "agents choose --part themselves" in fail(
        [*WORDS, "--part", "1/2", "--export-wandb", file], margin_objectives.main
    )
    gone = str(tmp_path / "gone" / "sweep.yaml")
    assert "cannot be written (No such file" in fail([*WORDS, "--export-wandb", gone], margin_objectives.main)
    there = tmp_path / "mine.yaml"
    there.write_text("mine")
    assert "cannot be written (File exists)" in fail([*WORDS, "--export-wandb", str(there)], margin_objectives.main)
    assert there.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [there]


@pytest.fixture
def fresh_wandb():
    """W&B keeps what the environment said when it was first used in a process."""
    wandb.teardown()
    yield
    wandb.teardown()


def test_an_agents_run_is_the_trial_and_its_start_is_not_mirrored(fresh_wandb, tmp_path, monkeypatch):
    for name, value in {"MODE": "offline", "SWEEP_ID": "s1", "RUN_ID": "agents0", "SWEEP_PARAM_PATH": ""}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    tracker = launch._trackers(SweepConfig(out=tmp_path), "margin_objectives")
    assert isinstance(tracker(tmp_path / "base", {"kind": "base"}), training.NoTracker)
    trial = training.RunFolder(tmp_path / "trial", {"kind": "preference"})
    run = tracker(trial.path, json.loads((trial.path / "config.json").read_text()))
    run.close()
    assert [path.name.rsplit("-", 1)[1] for path in trial.path.glob("wandb/offline-run-*")] == ["agents0"]
