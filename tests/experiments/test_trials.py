"""Many trials in one program give what each gives alone; they stop, fail and go on by themselves."""

import dataclasses
import json
import re
import shutil
import types

import jax
import numpy as np
import pytest

from entangle import data, losses, models, training
from entangle.errors import NonFiniteError, UserError
from entangle.training import OptimizerConfig, StageConfig, read_metrics
from experiments import figures, margin_objectives
from experiments.pairs import programs, stages
from experiments.pairs.pair_config import identity
from experiments.sweep import (
    Status,
    folder_of,
    launch,
    mark_failed,
    open_sweep,
    plan,
    product,
    status,
    trial_data,
    trial_programs,
    trial_runs,
    waiting,
)
from experiments.sweep.settings import Packing
from experiments.sweep.trial_config import TrialConfig, base_fingerprint, start_fingerprint

FEW = {"batch_size": 4, "checkpoint_every": 2, "log_every": 2}
CONFIG = TrialConfig(
    vocab_size=400,
    max_length=48,
    train_pairs=128,
    held_out_pairs=16,
    probe_pairs=4,
    changes=False,
    base=StageConfig(4, optimizer=OptimizerConfig(learning_rate=3e-3), **FEW),
    sft=StageConfig(3, optimizer=OptimizerConfig(learning_rate=3e-3), **FEW),
    preference=StageConfig(4, optimizer=OptimizerConfig(learning_rate=1e-4), eval_every=2, **FEW),
)
NATS = re.compile(r"margin|log_ratio/|reward/|realised/|loss")
SWEEP = [
    {"objective": "dpo", "seed": 0},
    {"objective": "dpo", "objective_args.beta": 0.4, "seed": 1},
    {"objective": "simpo", "preference.optimizer.learning_rate": 5e-4, "seed": 1},
    {"objective": "slic_hf", "seed": 0},
    {"objective": "kto", "seed": 0},
]


pytestmark = pytest.mark.usefixtures("gathered_once")


def no_tracker(folder, config):
    return training.NoTracker()


def planned(out, points=tuple(SWEEP), config=CONFIG):
    return plan(config, points, identity, out)


def records(out, trial):
    found = read_metrics(folder_of(out, trial))
    return [{name: value for name, value in record.items() if name != "seconds"} for record in found]


def close(found, expected, tolerance=1e-5):
    """Every number to 1e-5 of its size; differences of log-probabilities to 1e-5 of theirs."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        nats = max(abs(value) for name, value in other.items() if "log_prob/" in name)
        for name, value in one.items():
            scale = max(nats if NATS.search(name) else 1.0, abs(other[name]))
            assert abs(value - other[name]) <= tolerance * scale, (one["step"], name, value, other[name])


@pytest.fixture(scope="module")
def together(gathered_once, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    trials = planned(out)
    trial_runs.run(out, trials, no_tracker)
    return out, trials


def test_all_are_one_program_and_end(together):
    out, trials = together
    fresh = planned(out / "elsewhere")
    assert len(trial_runs.groups(out / "elsewhere", fresh)) == 1
    assert [status(folder_of(out, trial)) for trial in trials] == [Status.DONE] * 5
    for trial in trials:
        assert [r["step"] for r in records(out, trial)] == [0, 1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("place", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_trial_is_the_run_that_it_is_alone(together, place, tmp_path):
    out, trials = together
    config = trials[place].config
    materials = trial_data.gather(config)
    pairs = materials.pairs[config.pair_set]
    like = programs.likelihood_program(materials.model, config.sft)
    (folder,) = (out / "starts").glob(f"sft-*-{start_fingerprint(config)}")
    state = training.init_state(materials.model.init(jax.random.key(0)), like.tx)
    start = training.final_params(folder, state)
    objective = losses.get_objective(config.objective, **config.objective_args)
    chain = training.pair_chain("margin")
    program = programs.preference_program(materials.model, config.preference, objective, chain, changes=False)
    end = stages.prefer(
        tmp_path / "run",
        program,
        start,
        pairs,
        {"pair_set": config.pair_set, "seed": config.seed},
        no_tracker,
        probe_pairs=config.probe_pairs,
    )
    alone = [{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(tmp_path / "run")]
    close(records(out, trials[place]), alone)
    like_state = training.init_state(start, program.program.tx, program.program.memory(start))
    packed = training.final_params(folder_of(out, trials[place]), like_state)
    for one, other in zip(jax.tree.leaves(packed), jax.tree.leaves(end), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_what_is_over_is_not_run_again(together, monkeypatch):
    out, trials = together
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(trial_data, "gather", None)  # not even the data is read
    trial_runs.run(out, trials, no_tracker)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_killed_trials_go_on_from_their_own_checkpoints(together, tmp_path):
    whole, trials = together
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for trial, left in zip(trials, ("all", "all", "all", "half", "half"), strict=True):
        folder = folder_of(out, trial)
        if left == "half":
            (folder / "done.json").unlink()
            shutil.rmtree(folder / "checkpoints" / "4")
    before = {path: path.stat().st_mtime_ns for trial in trials[:3] for path in folder_of(out, trial).rglob("*.json*")}
    trial_runs.run(out, trials, no_tracker)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    for trial in trials:
        close(records(out, trial), records(whole, trial))


def test_trials_at_different_steps_are_different_programs(together, tmp_path):
    _, trials = together
    for trial, step in zip(trials, (None, 0, 4, 2, 2), strict=True):
        if step is not None:
            (folder_of(tmp_path, trial) / "checkpoints" / str(step)).mkdir(parents=True)
            (folder_of(tmp_path, trial) / "checkpoints" / f"{step + 2}.orbax-checkpoint-tmp").mkdir()
    assert [len(group) for group in trial_runs.groups(tmp_path, trials)] == [2, 1, 2]


@pytest.fixture
def not_trained(monkeypatch):
    """What would be trained, in packs: nothing is, and every trial is not finite."""
    packs = []

    def prefer_trials(runs, program, pairs, *, probe_pairs):
        packs.append([run.folder.path.name for run in runs])
        return [NonFiniteError("step 1: not trained here")] * len(runs)

    monkeypatch.setattr(trial_programs, "prefer_trials", prefer_trials)
    monkeypatch.setattr(
        trial_programs, "memory_of_step", lambda program, start, pairs, count, probe_pairs: count * 2**29
    )
    return packs


def test_a_trial_that_is_not_finite_is_marked_with_its_reason(together, tmp_path, not_trained, capsys):
    whole, _ = together
    shutil.copytree(whole / "starts", tmp_path / "starts")
    trials = planned(tmp_path, SWEEP[:1])
    trial_runs.run(tmp_path, trials, no_tracker)
    assert status(folder_of(tmp_path, trials[0])) is Status.FAILED
    assert "step 1: not trained here" in (folder_of(tmp_path, trials[0]) / "failed.json").read_text()
    trial_runs.run(tmp_path, trials, no_tracker)
    assert len(not_trained) == 1
    assert f"failed: {trials[0].name}: step 1" in capsys.readouterr().out


def test_side_by_side_changes_nothing(together, tmp_path):
    whole, _ = together
    shutil.copytree(whole / "starts", tmp_path / "starts")
    trials = planned(tmp_path, SWEEP[:2])
    trial_runs.run(tmp_path, trials, no_tracker, Packing(side_by_side=2))
    for trial in trials:
        close(records(tmp_path, trial), records(whole, trial))


def test_packs_are_as_large_as_memory_or_a_flag_allow(together, tmp_path, not_trained, monkeypatch):
    whole, _ = together
    monkeypatch.setattr(trial_runs, "memory", lambda: 0)  # what this machine has does not matter
    for name, packing, sizes in (("m", Packing(memory_gib=1.0), [2, 2, 1]), ("f", Packing(most=3), [3, 2])):
        shutil.copytree(whole / "starts", tmp_path / name / "starts")
        trial_runs.run(tmp_path / name, planned(tmp_path / name), no_tracker, packing)
        assert [len(pack) for pack in not_trained] == sizes
        not_trained.clear()


def test_the_compiler_says_what_a_step_takes():
    model = models.language_model(models.DecoderConfig(vocab_size=11, max_positions=6, width=8, layers=1, heads=1))
    params = model.init(jax.random.key(0))
    tokens = np.zeros((8, 2, 6), np.int32)
    encoded = data.EncodedPairs(tokens, np.broadcast_to(np.arange(6) > 2, tokens.shape), ["x"] * 8)

    def needed(count, side_by_side):
        chain = training.pair_chain("margin")
        program = trial_programs.trials_program(
            model,
            CONFIG.preference,
            [("dpo", {})] * count,
            [1e-4] * count,
            chain,
            changes=False,
            side_by_side=side_by_side,
        )
        return trial_programs.memory_of_step(program, params, stages.PreferenceData(encoded, encoded), count, 2)

    state = 4 * sum(leaf.size for leaf in jax.tree.leaves(params)) * 3  # parameters and two moments
    one, in_turn, at_once = needed(1, 1), needed(4, 1), needed(4, 4)
    assert one > 2 * state
    assert in_turn - one > 3 * state
    assert at_once > in_turn


def test_a_locked_trial_is_left_to_its_process(together, tmp_path, capsys, not_trained):
    whole, _ = together
    shutil.copytree(whole / "starts", tmp_path / "starts")
    mine, theirs = planned(tmp_path, SWEEP[:2])
    config = json.loads((folder_of(whole, theirs) / "config.json").read_text())
    with training.RunFolder(folder_of(tmp_path, theirs), config).locked():
        trial_runs.run(tmp_path, [mine, theirs], no_tracker)
    assert not_trained == [[mine.name]]
    assert status(folder_of(tmp_path, theirs)) is Status.BEGUN
    assert f"left to another process: {theirs.name}" in capsys.readouterr().out


def test_objectives_that_remember_have_programs_of_their_own(tmp_path):
    points = product({"objective": ["dpo", "ipo", "beta_dpo", "bco_pair_shifted"], "seed": range(2)})
    sizes = [len(group) for group in trial_runs.groups(tmp_path, planned(tmp_path, points))]
    assert sizes == [4, 2, 2]
    unlike = [{"objective": "beta_dpo"}, {"objective": "beta_dpo", "objective_args.beta": 0.2}]
    assert [len(group) for group in trial_runs.groups(tmp_path, planned(tmp_path, unlike))] == [1, 1]


def test_other_pairs_and_lengths_have_programs_of_their_own(tmp_path):
    points = [
        {"preference.steps": 5},
        {"preference.steps": 6},
        {"pair_chain": "pcgrad"},
        {"preference.steps": 5, "seed": 3},
    ]
    assert [len(group) for group in trial_runs.groups(tmp_path, planned(tmp_path, points))] == [2, 1, 1]


def test_pair_sets_that_are_none_and_held_out_files_without_use_are_refused():
    with pytest.raises(UserError, match=r"unknown pair set 'tweet'"):
        trial_data.check(TrialConfig(pair_set="tweet"))
    with pytest.raises(UserError, match=r"--held-out x.jsonl has no effect"):
        trial_data.check(TrialConfig(held_out="x.jsonl"))
    with pytest.raises(UserError, match=r"unknown masks 'all': choose from none, oracle, learned"):
        trial_data.check(TrialConfig(masks="all"))
    with pytest.raises(UserError, match=r"sparsity 0.5 has no effect: masks are oracle, not learned"):
        trial_data.check(TrialConfig(masks="oracle", sparsity=0.5))
    with pytest.raises(UserError, match=r"objective 'ipo': learned masks are trained by dpo"):
        trial_data.check(TrialConfig(masks="learned", objective="ipo"))


@pytest.mark.parametrize("masks", [pytest.param("oracle", marks=pytest.mark.slow), "learned"])
def test_masks_are_trained_with_and_told(together, tmp_path, masks):
    whole, _ = together
    shutil.copytree(whole / "starts", tmp_path / "starts")
    points = [{"objective_args.beta": beta, "masks": masks, "seed": 0} for beta in (0.1, 0.4)]
    points += [{"masks": "learned", "sparsity": 0.5, "seed": 0}] if masks == "learned" else []
    trials = planned(tmp_path, points)
    assert len(trial_runs.groups(tmp_path, trials)) == 1
    trial_runs.run(tmp_path, trials, no_tracker)
    first, last = (records(tmp_path, trial)[-1] for trial in (trials[0], trials[-1]))
    assert (first["step"], last["step"]) == (4, 4)
    begun = records(tmp_path, trials[0])[0]
    assert begun["eval/log_ratio/chosen"] == begun["eval_train/log_ratio/chosen"] == 0.0  # evaluated on all tokens
    assert ("eval/mask/shared" in first) == (masks == "learned")
    if masks == "learned":
        assert max(last["eval/mask/shared"], first["eval/mask/shared"]) < begun["eval/mask/shared"]  # the L1 term
        weak, strong = (records(tmp_path, trial)[-2]["loss"] for trial in (trials[0], trials[-1]))
        assert strong > 2 * weak  # its weight is the trial's own
        (_, found), *_ = trial_runs.finished(tmp_path, trials[:1])
        assert jax.tree.structure(found.end) == jax.tree.structure(found.start)


def small(out, **changes):
    smoke = margin_objectives.presets()["smoke"]
    return dataclasses.replace(smoke, out=out, track=False, trial=CONFIG, **changes)


def test_the_experiment_from_its_sweep_to_its_page(together, tmp_path):
    settings = small(tmp_path / "out", objectives=("dpo", "cpo"), seeds=1)
    open_sweep(settings.out, margin_objectives.KIND, identity(settings.trial))
    shutil.copytree(together[0] / "starts", settings.out / "starts")
    files = margin_objectives.run(settings)
    assert {file.name for file in files} >= {"summary.csv", "log_probs.png", "cases.png", "report.md", "report.html"}
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.count("| done |") == 2
    assert "synchronised" in report
    assert "- tweets, train: 59 of 64 pairs encoded; prompt cut on the left: 5" in report
    assert "objective dpo, combination margin" in report
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert margin_objectives.run(settings) == files
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert margin_objectives.run(dataclasses.replace(settings, seeds=2)) == files
    assert (tmp_path / "out" / "report.md").read_text().count("| done |") == 4


def test_shares_together_are_the_sweep(tmp_path, monkeypatch):
    run = []

    def pretend(out, trials, tracker, packing, gathered):
        for trial in trials:
            run.append(trial.name)
            training.RunFolder(folder_of(out, trial), {"trial": identity(trial.config)}).mark_done({"step": 0})

    monkeypatch.setattr(trial_data, "gather", lambda config: types.SimpleNamespace(report={}))
    monkeypatch.setattr(trial_runs, "run", pretend)
    monkeypatch.setattr(figures, "redraw", lambda out: [])
    for place in (1, 2, 3):
        files = margin_objectives.run(small(tmp_path / "out", part=f"{place}/3", objectives=("dpo", "ipo", "cpo")))
        assert bool(files) == (place == 3)
        assert len(run) == 2 * place
    assert len(set(run)) == 6


def test_a_sweep_that_grew_is_drawn_again_whatever_stops_it(tmp_path, monkeypatch):
    def pretend(out, trials, tracker, packing, gathered):
        for trial in trials:
            training.RunFolder(folder_of(out, trial), {"trial": identity(trial.config)}).mark_done({"step": 0})

    def killed(out):
        raise KeyboardInterrupt

    monkeypatch.setattr(trial_data, "gather", lambda config: types.SimpleNamespace(report={}))
    monkeypatch.setattr(trial_runs, "run", pretend)
    settings = small(tmp_path / "out", objectives=("dpo",), seeds=1)
    monkeypatch.setattr(figures, "redraw", lambda out: [])
    (summary,) = margin_objectives.run(settings)
    assert summary.read_text().count("\n") == 1 + 1
    monkeypatch.setattr(figures, "redraw", killed)
    grown = dataclasses.replace(settings, seeds=2)
    with pytest.raises(KeyboardInterrupt):
        margin_objectives.run(grown)
    drawn = []
    monkeypatch.setattr(figures, "redraw", lambda out: drawn.append(out) or [])
    for _ in range(2):  # nothing is left to train; it is drawn once
        (summary,) = margin_objectives.run(grown)
    assert drawn == [settings.out]
    assert summary.read_text().count("\n") == 1 + 2


def test_what_failed_is_begun_again_when_that_is_asked_for(tmp_path, monkeypatch):
    run = []
    monkeypatch.setattr(trial_data, "gather", lambda config: types.SimpleNamespace(report={}))
    monkeypatch.setattr(
        trial_runs, "run", lambda out, trials, tracker, packing, gathered: run.append(waiting(out, trials))
    )
    settings = small(tmp_path / "out", objectives=("dpo", "ipo"), seeds=1)
    failed, other = plan(settings.trial, margin_objectives.sweep(settings), identity)
    margin_objectives.run(settings)
    folder_of(settings.out, failed).mkdir(parents=True)
    mark_failed(folder_of(settings.out, failed), "step 3")
    for retry in (False, True):
        margin_objectives.run(dataclasses.replace(settings, retry_failed=retry))
    assert run == [[failed, other], [other], [failed, other]]


def test_what_became_of_the_pairs_is_said_once_in_the_sweeps_own_words(tmp_path, capsys):
    lines = ["the first 2 of 9 train pairs are taken (--train-pairs)", "  too long: 1"]
    gathered = {"abc": types.SimpleNamespace(report={"preferences": {"files": lines}})}
    for _ in range(2):
        launch._tell_pairs(tmp_path, gathered)
    said = "preferences, files: the first 2 of 9 train pairs are taken (--trial.train-pairs)\n  too long: 1\n"
    assert capsys.readouterr().out == said
    assert "(--trial.train-pairs)" in (tmp_path / "pairs.json").read_text()


def test_a_kind_that_nothing_draws_is_refused_before_it_is_trained(tmp_path):
    settings = small(tmp_path / "out", objectives=("dpo",), seeds=1)
    with pytest.raises(UserError, match="no figures are known for kind 'mine'"):
        launch.run(settings, "mine", margin_objectives.sweep(settings))
    assert not settings.out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objectives", "dppo"], "unknown objective 'dppo' (did you mean dpo?)"),
        (["--objectives", "dpo", "dpo"], "two trials with one fingerprint"),
        (["--betas", "-1"], "objective 'dpo': beta -1.0 is not in (0, inf)"),
        (["--trial.pair-set", "tweet"], "unknown pair set 'tweet'"),
        (["--preset", "hh-rlhf"], "name the data with --trial.data"),
        (["--preset", "paper", "--trial.data", "x.jsonl"], "name the model with --trial.model"),
        (["--trial.data", "nowhere"], "nowhere"),
        (["--trial.sft.batch-size", "999"], "--trial.sft.batch-size 999: there are only 128 training pairs"),
        (["--seeds", "0"], "--seeds: at least one is needed"),
        (["--part", "4/3"], "I/N is needed"),
        (["--trial.objective", "ipo"], "--trial.objective ipo has no effect: the sweep sets it itself"),
        (["--trial.data", "x.jsonl", "--trial.pair-set", "long_suffix"], "--trial.pair-set long_suffix has no effect"),
        (["--packing.most", "-1"], "--packing.most -1: 0 or more"),
        (["--packing.memory-gib", "nan"], "--packing.memory-gib nan: 0 or more"),
        (["--bogus", "3"], "error: Unrecognized options: --bogus, 3"),
        (["--trial.layerz"], "Unrecognized options: --trial.layerz; Perhaps you meant: --trial.layers"),
        (
            ["--seeds", "two"],
            "error: Error parsing --seeds: invalid literal for int() with base 10: 'two' (--seeds INT)",
        ),
        (["--seeds", "-1"], "--seeds: at least one is needed"),
        (["--objectives", "rrhf", "--betas", "0.1"], "--betas 0.1 has no effect: none of --objectives takes a beta"),
        (
            ["--trial.max-length", "512"],
            "--trial.max-length 512: model tiny has 128 positions; give --trial.max-length 128",
        ),
        (
            ["--learning-rates", "0.1", "--trial.preference.optimizer.learning-rate", "0.2"],
            "--trial.preference.optimizer.learning-rate 0.2 has no effect: the sweep sets it itself",
        ),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(fail, tmp_path, words, message):
    out = tmp_path / "out"
    assert message in fail(["--preset", "smoke", "--no-track", "--out", str(out), *words], margin_objectives.main)
    assert not out.exists()


def test_a_base_model_reads_what_a_preference_file_prefers_and_nothing_held_out(tmp_path):
    file = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"ask {n}:", "chosen": f" good{n}", "rejected": f" bad{n}"} for n in range(64)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    few = {"train_pairs": 40, "held_out_pairs": 4, "probe_pairs": 2, "vocab_size": 300, "max_length": 16}
    config = dataclasses.replace(CONFIG, data=str(file), **few)
    materials = trial_data.gather(config)
    pairs = materials.pairs[trial_data.name_of_pairs(config)]
    assert (len(pairs.train.tokens), len(pairs.held_out.tokens)) == (40, 4)
    end, held_out = materials.tokenizer.eos_id, {source.rsplit(":", 1)[1] for source in pairs.held_out.sources}
    cuts = np.flatnonzero(materials.text == end)
    read = {materials.tokenizer.decode(part[part != end].tolist()) for part in np.split(materials.text, cuts)}
    assert len(read - {""}) == 40
    assert read - {""} <= {f"ask {n}: good{n}" for n in range(64) if str(n + 1) not in held_out}
    assert materials.checkpoint is None
    assert base_fingerprint(config) != base_fingerprint(dataclasses.replace(config, train_pairs=30))
