"""Sweeps through Ray: shares of trials, locks that outlive processes, clusters that cannot be reached, nodes that die."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entangle import training
from entangle.errors import UserError
from entangle.training import OptimizerConfig, StageConfig
from experiments import figures, margin_objectives
from experiments.pairs.pair_config import identity
from experiments.sweep import folder_of, on_ray, plan, ray_cluster, trial_runs
from experiments.sweep.settings import OnRay, Packing
from experiments.sweep.trial_config import TrialConfig
from scripts import killed_sweep

with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: scripts/setup ray")
STEPS = {"batch_size": 4, "optimizer": OptimizerConfig(learning_rate=1e-3), "checkpoint_every": 1}
TRIAL = TrialConfig(
    vocab_size=400,
    max_length=48,
    pair_set="single_token",
    train_pairs=64,
    held_out_pairs=4,
    probe_pairs=0,
    changes=False,
    sft_first=False,
    base=StageConfig(2, **STEPS),
    preference=StageConfig(2, eval_every=2, **STEPS),
)
HOLD = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(99)"


def no_tracker(folder, config):
    return training.NoTracker()


def small(out, **changes):
    smoke = margin_objectives.presets()["smoke"]
    changes = {"seeds": 1, "objectives": ("dpo",), **changes}
    return dataclasses.replace(smoke, out=out, track=False, trial=TRIAL, **changes)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 20))
def test_shares_hold_every_trial_once_and_leave_no_room_idle(sizes, room):
    groups = [[(place, trial) for trial in range(size)] for place, size in enumerate(sizes)]
    shares = on_ray.shares(groups, room)
    assert sorted(trial for share in shares for trial in share) == sorted(trial for group in groups for trial in group)
    assert all(len({place for place, _ in share}) == 1 for share in shares)
    # no more programs than needed, and as many as can be of use
    assert len(shares) == max(len(sizes), min(room, sum(sizes)))
    assert [len(share) for share in shares] == sorted(map(len, shares), reverse=True)


def test_one_group_is_cut_evenly():
    assert [len(share) for share in on_ray.shares([range(30)], 4)] == [8, 8, 7, 7]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ray.gpus", "1"], "--ray.gpus has no effect without --ray.address"),
        (["--ray.address", "auto", "--ray.cpus", "-1"], "--ray.cpus -1.0: 0 or more"),
        (["--ray.address", "auto", "--ray.cpus", "0"], "a task has to take something of a node"),
        (["--ray.address", "auto", "--ray.cpus", "1.5"], "1.5 of CPU: above 1 Ray takes whole numbers"),
        (["--ray.address", "auto", "--ray.resources", "GPU", "1"], "--ray.resources GPU 1: a name other than CPU, GPU"),
        (["--ray.address", "auto", "--ray.resources", "TPU", "0"], "--ray.resources TPU 0"),
        pytest.param(["--ray.address", "ray://head:10001"], "auto, local or HOST:PORT is needed", marks=with_ray),
        pytest.param(
            ["--ray.address", "127.0.0.1:1"], "--ray.address 127.0.0.1:1: no Ray cluster answers there", marks=with_ray
        ),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(fail, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr(ray_cluster, "REACHED_WITHIN", 3.0)
    words = ["--preset", "smoke", "--no-track", "--out", str(tmp_path / "out"), *words]
    assert message in fail(words, margin_objectives.main)
    assert not (tmp_path / "out").exists()


def test_without_ray_the_extra_is_named(fail, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    words = ["--preset", "smoke", "--no-track", "--out", str(tmp_path / "out"), "--ray.address", "auto"]
    assert 'ray not installed: it comes with the extra "ray"' in fail(words, margin_objectives.main)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def held(tmp_path, monkeypatch):
    """A planned trial whose folder a process holds, that process, and the names of the trials that were run."""
    monkeypatch.chdir(tmp_path)  # tasks go elsewhere, and this comes back
    training.RunFolder(tmp_path, {"kind": "sweep"})
    (trial,) = plan(TRIAL, [{"seed": 0}], identity)
    folder = training.RunFolder(folder_of(tmp_path, trial), {"trial": 0})
    run = []

    def pretend(out, trials, tracker, packing):
        run.extend(trial.name for trial in trials)
        folder.mark_done({})

    monkeypatch.setattr(trial_runs, "run", pretend)
    monkeypatch.setattr(on_ray, "POLL", 0.05)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder.path / ".lock")], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        yield trial, holder, run
        holder.kill()


def test_a_task_waits_for_a_process_that_dies(held, tmp_path, monkeypatch):
    trial, holder, run = held
    looks = []

    def dies(seconds):
        looks.append(list(run))
        if len(looks) == 3:
            holder.kill()
            holder.wait()

    monkeypatch.setattr(time, "sleep", dies)
    assert on_ray._train(tmp_path, tmp_path, [trial], no_tracker, Packing(), OnRay("auto", patience=60.0)) == []
    assert looks == [[], [], []]
    assert run == [trial.name]


def test_a_task_leaves_a_trial_to_a_process_that_lives(held, tmp_path):
    trial, holder, run = held
    assert on_ray._train(tmp_path, tmp_path, [trial], no_tracker, Packing(), OnRay("auto", patience=0.2)) == [
        trial.name
    ]
    assert run == []
    assert holder.poll() is None


def test_a_machine_without_the_sweeps_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"out on .*: not there; it has to be a folder of all machines"):
        on_ray._prepare(tmp_path, tmp_path / "out", [], no_tracker)
    with pytest.raises(
        UserError, match=r"gone on .*: No such file or directory; it has to be a folder of all machines"
    ):
        on_ray._prepare(tmp_path / "gone", tmp_path, [], no_tracker)


@with_ray
def test_a_task_whose_process_dies_is_started_again(tmp_path, monkeypatch, capsys):
    def dies_once(where, out, trials, tracker, packing, settings):
        if not (out / "died").exists():
            (out / "died").touch()
            os._exit(1)
        for trial in trials:
            folder = out / "trials" / trial.name
            folder.mkdir(parents=True)
            (folder / "done.json").write_text("{}")

    monkeypatch.setattr(on_ray, "_train", dies_once)
    monkeypatch.setattr(figures, "redraw", lambda out: [])
    settings = small(tmp_path / "out", ray=OnRay("local", cpus=float(os.cpu_count())))  # room for one
    before = signal.getsignal(signal.SIGTERM)
    assert margin_objectives.run(settings) == [tmp_path / "out" / "summary.csv"]
    (trial,) = plan(TRIAL, margin_objectives.sweep(settings), identity)
    assert f"done: {trial.name} (1 done, 0 failed, 0 to go)" in capsys.readouterr().out
    assert (tmp_path / "out" / "died").exists()
    assert signal.getsignal(signal.SIGTERM) == before  # not Ray's, which stays behind after its end


@pytest.mark.slow
@with_ray
def test_tasks_train_as_the_command_itself_does(tmp_path):
    for name, more in (("alone", []), ("ray", ["--ray.address", "local"])):
        subprocess.run(killed_sweep.command(tmp_path / name, *more), check=True, capture_output=True)
    assert killed_sweep.records(tmp_path / "ray") == killed_sweep.records(tmp_path / "alone")


@pytest.mark.slow
@with_ray
def test_what_a_task_finds_wrong_ends_the_sweep_in_the_same_line(fail, tmp_path):
    words = ["--preset", "smoke", "--no-track", "--seeds", "2", "--trial.data", str(tmp_path / "gone.jsonl")]
    alone = fail([*words, "--out", str(tmp_path / "alone")], margin_objectives.main)
    assert fail([*words, "--out", str(tmp_path / "ray"), "--ray.address", "local"], margin_objectives.main) == alone


CRASHING = """
import os, sys
from entangle import losses

def objective(lp):
    if "default_worker" in sys.argv[0]:  # Ray's
        os._exit(1)
    return losses.dpo(lp)
"""


@pytest.mark.slow
@with_ray
def test_a_share_that_always_crashes_is_listed_and_the_others_end(tmp_path):
    (tmp_path / "crashing.py").write_text(CRASHING)
    words = killed_sweep.command(tmp_path / "out", "--seeds", "1", "--objectives", "dpo", "crashing:objective")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*words, "--ray.address", "local", "--ray.retries", "1", "--ray.cpus", str(-(-os.cpu_count() // 2))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 1, done.stderr
    assert "done: dpo_seed0" in done.stdout
    assert "not over: crashing-objective_seed0" in done.stdout
    assert "The worker died unexpectedly while executing this task" in done.stdout
    assert "stopped: 1 trials are not over" in done.stderr


@pytest.fixture
def nodes():
    place = killed_sweep.Nodes()
    yield place
    place.close()


@pytest.mark.slow
@with_ray
def test_a_node_that_dies_costs_no_trial_that_is_done(nodes, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    # one trial a program, in turn: some are done when the node dies
    more = ["--packing.most", "1"]
    subprocess.run(killed_sweep.command(whole, *more), check=True, capture_output=True)
    words = [*killed_sweep.command(out, *more), *nodes.flags]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (before := {path: path.stat() for path in out.glob("trials/*/done.json")}):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        nodes.cluster.remove_node(nodes.nodes.pop(), allow_graceful=False)
        printed, error = process.communicate()
    assert process.returncode == 0, error
    assert 0 < len(before) < killed_sweep.TRIALS
    assert f"({killed_sweep.TRIALS} done, 0 failed, 0 to go)" in printed
    assert all((path.stat().st_ino, path.stat().st_mtime_ns) == (s.st_ino, s.st_mtime_ns) for path, s in before.items())
    assert killed_sweep.records(out) == killed_sweep.records(whole)
    assert {json.loads(p.read_text())["step"] for p in out.glob("trials/*/done.json")} == {8}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", pytest.param("ray", marks=with_ray)])
def test_killed_at_random_moments_a_sweep_is_as_if_never_stopped(launcher, tmp_path):
    words = ["--launcher", launcher, "--kills", "5", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.killed_sweep", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_tasks_of_one_host_share_its_memory(monkeypatch):
    monkeypatch.setattr(trial_runs, "memory", lambda: 8 * 2**30)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert on_ray._own(Packing(), OnRay("auto", cpus=1.0)).memory_gib == 2.0
    assert on_ray._own(Packing(), OnRay("auto", cpus=8.0)).memory_gib == 8.0
    assert on_ray._own(Packing(memory_gib=3.0), OnRay("auto")).memory_gib == 3.0


@pytest.mark.parametrize(("available", "allowed", "found"), [(10, 0, 6), (10, 5, 3), (0, 5, 3), (0, 0, 0)])
def test_a_hosts_memory_is_what_is_available_within_its_control_group(monkeypatch, available, allowed, found):
    monkeypatch.setattr(trial_runs, "_available", lambda: available * 10**9)
    monkeypatch.setattr(trial_runs, "_allowed", lambda: allowed * 10**9)
    monkeypatch.setattr(trial_runs.jax, "local_device_count", lambda: 1)
    assert trial_runs.memory() == found * 10**9


def test_records_that_are_missing_or_apart_are_noticed():
    expected = {"a": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]}
    assert killed_sweep.difference(expected, expected) == 0.0
    apart = {"a": [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.0}]}
    assert killed_sweep.difference(apart, expected) == 0.25
    for other in ({}, {"a": expected["a"][:1]}, {"a": [{"step": 1}, expected["a"][1]]}):
        assert killed_sweep.difference(other, expected) == float("inf")
    assert killed_sweep.difference({"a": [{"step": 1, "loss": float("nan")}, expected["a"][1]]}, expected) == float(
        "inf"
    )
