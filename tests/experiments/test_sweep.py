"""A sweep as data: overrides, fingerprints, folders, and the summary that is made from these alone."""

import csv
import json

import numpy as np
import pytest

from entangle.errors import UserError
from entangle.training import RunFolder
from experiments.pairs.pair_config import identity
from experiments.reports.preference_report import provenance
from experiments.reports.sweep_tables import read_sweep
from experiments.sweep import (
    Status,
    folder_of,
    mark_failed,
    open_sweep,
    override,
    plan,
    product,
    read_trials,
    status,
    subset,
    summary,
    waiting,
    zipped,
)
from experiments.sweep.settings import SweepConfig
from experiments.sweep.trial_config import TrialConfig, base_fingerprint, data_fingerprint, start_fingerprint


def planned(points, out=None):
    return plan(TrialConfig(), points, identity, out)


def test_products_and_zips_nest():
    paired = zipped({"preference.optimizer.name": ["sgd", "adamw"], "preference.optimizer.learning_rate": [0.01, 1e-5]})
    points = list(product({"objective": ["dpo", "ipo"]}, paired, {"seed": range(3)}))
    assert len(points) == 12
    assert points[0] == {
        "objective": "dpo",
        "preference.optimizer.name": "sgd",
        "preference.optimizer.learning_rate": 0.01,
        "seed": 0,
    }
    assert len({tuple(point.values()) for point in points}) == 12


def test_a_random_part_is_a_function_of_its_seed_and_keeps_the_order():
    points = list(product({"seed": range(50)}))
    part = subset(points, 10, seed=3)
    assert part == subset(iter(points), 10, seed=3) != subset(points, 10, seed=4)
    assert [p["seed"] for p in part] == sorted(p["seed"] for p in part)


def test_values_reach_their_fields_and_the_rest_stays():
    changed = override(
        TrialConfig(),
        {"objective_args.beta": 1, "preference.optimizer.learning_rate": np.float32(0.5), "labels": ["a", "b"]},
    )
    assert changed.objective_args == {"beta": 1.0}
    assert isinstance(changed.objective_args["beta"], float)
    assert changed.preference.optimizer.learning_rate == 0.5
    assert changed.labels == ("a", "b")
    assert changed.preference.steps == TrialConfig().preference.steps


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"objectiv": "dpo"}, r"override objectiv: there is no such field \(did you mean objective\?\)"),
        ({"preference.learning_rate": 1.0}, r"did you mean preference.optimizer.learning_rate\?"),
        ({"seed.first": 1}, r"override seed.first: there is no such field"),
        ({"preference.steps": "ten"}, r"override preference.steps: int is needed, not str 'ten'"),
        ({"preference.steps": True}, r"override preference.steps: int is needed, not bool True"),
        ({"preference.steps": 2.5}, r"override preference.steps: int is needed, not float 2.5"),
        ({"objective_args": {"beta": "small"}}, r"override objective_args.beta: float is needed, not str 'small'"),
        ({"preference.steps": 0}, r"override preference.steps: steps is 0: it must be at least 1"),
    ],
)
def test_a_wrong_override_is_refused_by_name(overrides, message):
    with pytest.raises(UserError, match=message):
        override(TrialConfig(), overrides)


def test_zips_of_unequal_length_and_parts_too_large_are_refused():
    with pytest.raises(UserError, match="a has 1, b has 2"):
        list(zipped({"a": [1], "b": [1, 2]}))
    with pytest.raises(UserError, match="a random part of 3 trials: the sweep has 2"):
        subset([{}, {}], 3)


def test_two_trials_with_one_fingerprint_are_refused():
    with pytest.raises(UserError, match=r"two trials with one fingerprint .*: {seed: 1} and {seed: 1, objective: dpo}"):
        planned([{"seed": 1}, {"seed": 1, "objective": "dpo"}])


def test_a_fingerprint_does_not_depend_on_how_a_number_is_written():
    one, other = (planned([{"objective_args.beta": beta}])[0] for beta in (1, 1.0))
    assert one.fingerprint == other.fingerprint


def test_a_trial_that_is_there_keeps_its_folder(tmp_path):
    (first,) = planned([{"objective": "ipo", "seed": 1}])
    folder_of(tmp_path, first).mkdir(parents=True)
    (again,) = planned([{"seed": 1, "objective": "ipo"}], tmp_path)
    assert again.name == first.name != planned([{"seed": 1, "objective": "ipo"}])[0].name


def test_what_trials_share_by_what_they_differ_in():
    base, seed, data = (TrialConfig(**changes) for changes in ({}, {"seed": 1}, {"pair_set": "long_suffix"}))
    assert base_fingerprint(base) == base_fingerprint(seed) == base_fingerprint(data)
    assert data_fingerprint(base) == data_fingerprint(seed) != data_fingerprint(data)
    assert len({start_fingerprint(config) for config in (base, seed, data)}) == 3
    assert start_fingerprint(base) == start_fingerprint(TrialConfig(objective="ipo"))


def fabricate(out, points, kind="margin_objectives"):
    """Folders of a sweep as finished trials leave them."""
    open_sweep(out, kind, identity(TrialConfig()))
    trials = planned(points, out)
    for trial in trials:
        run = RunFolder(folder_of(out, trial), {"kind": "preference", "trial": identity(trial.config)})
        looks = [{"step": step, "eval/log_prob/chosen": -1.0 - step} for step in (0, 2)]
        run.append(looks)
        run.mark_done({"step": 2, "metrics": {}, "first": looks[0], "last": looks[1]})
    return trials


def test_the_summary_has_a_row_a_trial_whatever_became_of_it(tmp_path):
    points = list(product({"objective": ["dpo", "ipo"], "seed": range(2)}))
    fabricate(tmp_path, points[:2])
    failed, begun = planned(points[2:])
    for trial in (failed, begun):
        RunFolder(folder_of(tmp_path, trial), {"kind": "preference", "trial": identity(trial.config)})
    mark_failed(folder_of(tmp_path, failed), "step 3: loss not finite")
    with summary.write(tmp_path).open() as file:
        rows = {row["trial"]: row for row in csv.DictReader(file)}
    assert [row["status"] for row in rows.values()] == ["done", "done", "failed", "begun"]
    assert rows[failed.name]["reason"] == "step 3: loss not finite"
    done = rows[planned(points[:1])[0].name]
    assert (done["objective"], done["seed"], done["last:eval/log_prob/chosen"]) == ("dpo", "0", "-3.0")
    assert "max_length" not in done


def test_what_was_planned_and_never_begun_is_in_the_summary(tmp_path):
    points = list(product({"objective": ["dpo", "ipo"], "seed": range(2)}))
    fabricate(tmp_path, points[:1])
    open_sweep(tmp_path, "margin_objectives", identity(TrialConfig()), planned(points[:3]))
    open_sweep(tmp_path, "margin_objectives", identity(TrialConfig()), planned(points[2:]))
    done, *new = [trial.name for trial in planned(points)]
    found = {trial["name"]: trial["status"].value for trial in read_trials(tmp_path)}
    assert found == {done: "done"} | dict.fromkeys(new, "new")
    assert sorted(read_sweep(tmp_path).open) == sorted(new)
    columns = list(summary.rows(tmp_path)[0])
    assert "max_length" not in columns
    # spelt otherwise it is the trial that was planned
    (again,) = plan(TrialConfig(), [{"seed": 1, "objective": "ipo"}], identity, tmp_path)
    assert again.name == planned(points)[3].name != planned([{"seed": 1, "objective": "ipo"}])[0].name


def test_the_plans_order_is_the_summarys(tmp_path):
    points = [{"objective": name, "seed": 0} for name in ("rrhf", "ipo", "dpo")]
    fabricate(tmp_path, points)
    assert [trial["config"]["trial"]["objective"] for trial in read_trials(tmp_path)] == ["dpo", "ipo", "rrhf"]
    open_sweep(tmp_path, "margin_objectives", identity(TrialConfig()), planned(points))
    assert [trial["config"]["trial"]["objective"] for trial in read_trials(tmp_path)] == ["rrhf", "ipo", "dpo"]


def test_status_and_what_is_waiting(tmp_path):
    trials = planned(product({"seed": range(3)}))
    fabricate(tmp_path, [{"seed": 0}])
    folder_of(tmp_path, trials[1]).mkdir(parents=True)
    mark_failed(folder_of(tmp_path, trials[1]), "no reason")
    trials = planned(product({"seed": range(3)}), tmp_path)
    assert [status(folder_of(tmp_path, t)) for t in trials] == [Status.DONE, Status.FAILED, Status.NEW]
    assert waiting(tmp_path, trials) == trials[2:]
    assert waiting(tmp_path, trials, retry_failed=True) == trials[1:]


def test_a_sweep_is_read_into_groups_that_differ_in_more_than_their_seed(tmp_path):
    fabricate(tmp_path, product({"objective": ["dpo", "ipo"], "objective_args.beta": [0.1, 0.5], "seed": [4, 2]}))
    sweep = read_sweep(tmp_path)
    assert set(sweep.groups) == {f"{name}, beta {beta}" for name in ("dpo", "ipo") for beta in (0.1, 0.5)}
    assert sweep.groups["dpo, beta 0.1"].seeds == [2, 4]
    assert sweep.groups["dpo, beta 0.1"].change("eval/log_prob/chosen").tolist() == [-2.0, -2.0]


def test_a_folder_of_another_experiment_is_refused(tmp_path):
    fabricate(tmp_path, [{"seed": 0}])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r'kind is "margin_objectives" there and "remedies" here'):
        open_sweep(tmp_path, "remedies", identity(TrialConfig()))
    with pytest.raises(UserError, match=r"base.max_length is 64 there and 32 here"):
        open_sweep(tmp_path, "margin_objectives", identity(TrialConfig(max_length=32)))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "1/3/5"])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(UserError, match="I/N is needed, with I from 1 to N"):
        SweepConfig(part=part).shares()


def test_a_run_folder_that_is_no_json_is_named(tmp_path):
    (trial,) = fabricate(tmp_path, [{"seed": 0}])
    (folder_of(tmp_path, trial) / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read as JSON"):
        summary.rows(tmp_path)
    assert json.loads((folder_of(tmp_path, trial) / "done.json").read_text())["step"] == 2


def test_a_report_names_the_devices_that_trials_were_trained_on(tmp_path):
    known = {"git_commit": "abc", "git_changed": False, "packages": {}, "python": "3"}
    folders = [tmp_path, *(tmp_path / str(trial) for trial in range(3))]
    devices = [["cpu:cpu"], ["cuda:x", "cuda:x"], ["cuda:x", "cuda:x"], ["cuda:y"]]
    for folder, found in zip(folders, devices, strict=True):
        folder.mkdir(exist_ok=True)
        (folder / "environment.json").write_text(json.dumps([{**known, "devices": found}]))
    assert "devices cpu:cpu. The" in provenance(tmp_path)
    assert "devices cuda:x, cuda:x or cuda:y. The" in provenance(tmp_path, trained_in=folders[1:])
