"""The experiment as its user runs it, shrunk; and every kind of bad input that a user can give it."""

import csv
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from entangle import data, models, training
from entangle.errors import UserError
from experiments import sentiment, single_token
from experiments.pairs import exports
from experiments.reports.run_tables import curve, read_runs
from experiments.sentiment import presets


def shrunk(out, **changes):
    """Two seeds of the smoke preset, a few steps each."""
    smoke = presets()["smoke"]
    few = {"steps": 3, "batch_size": 4, "checkpoint_every": 2, "log_every": 2}
    stages = {name: dataclasses.replace(getattr(smoke, name), **few) for name in ("base", "sft", "preference")}
    # small steps: the test of the first-order prediction supposes that second-order terms are small
    gentle = dataclasses.replace(smoke.preference.optimizer, learning_rate=1e-5)
    stages["preference"] = dataclasses.replace(stages["preference"], eval_every=2, optimizer=gentle)
    small = {
        "out": out,
        "seeds": 2,
        "train_pairs": 64,
        "held_out_pairs": 6,
        "probe_pairs": 4,
        "max_length": 48,
        "track": False,
    }
    return dataclasses.replace(smoke, **stages, **(small | changes))


pytestmark = pytest.mark.usefixtures("small_model")


@pytest.fixture(scope="module")
def finished(small_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("sentiment") / "out"
    return out, sentiment.run(shrunk(out))


def test_files_are_there_and_named(finished):
    out, files = finished
    names = [str(f.relative_to(out)) for f in files]
    sets = ("single_token", "short_suffix", "long_suffix")
    heatmaps = [f"figures/figure_4b_{name}.png" for name in sets]
    curves = [f"figures/{name}.png" for name in ("figure_3", "figure_4a", "agreement")]
    assert names == [*curves, *heatmaps, "report.md", "report.html"]
    for file in files:
        assert file.stat().st_size > 0
        assert file.suffix != ".png" or file.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_plotted_numbers_are_the_runs_numbers(finished):
    out, _ = finished
    with (out / "figures" / "figure_3.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 2 * 3  # sets, sides, seeds, evaluations at 0, 2 and 3
    for row in rows:
        records = training.read_metrics(out / row["set"] / f"seed{row['seed']}" / "preference")
        found = [
            r[f"eval/log_prob/{row['side']}"]
            for r in records
            if f"eval/log_prob/{row['side']}" in r and r["step"] == int(row["step"])
        ]
        assert found == [float(row["log_prob_nats"])]


def test_heatmap_blocks_fit_their_labels(finished):
    out, _ = finished
    record = json.loads((out / "long_suffix" / "seed0" / "token_cosines.json").read_text())
    assert {record["chosen"][0], record["rejected"][0]} == {"␣positive", "␣negative"}
    assert record["chosen"][1:] == record["rejected"][1:]
    for block in record["cosines"].values():
        assert len(block) == len(record["chosen"])
        assert all(len(row) == len(record["rejected"]) for row in block)
        assert all(-1.00001 <= value <= 1.00001 for row in block for value in row)


def test_report_judges_by_the_curves(finished):
    out, _ = finished
    runs = read_runs(out)
    report = (out / "report.md").read_text()
    rise = curve(runs.records["single_token"], "eval/log_prob/chosen").change() > 0
    verdict = {0: "not shown", 1: "in 1 of 2 seeds", 2: "shown"}[int(rise.sum())]
    assert f"| single_token: the chosen log-probability rises | Figure 3 | {verdict} |" in report


def test_the_report_sums_what_moved_the_rows(finished):
    out, _ = finished
    section = (out / "report.md").read_text().split("## What moved the rows")[1].split("##")[0]
    sums = [
        sum(record["realised/rejected"] for record in records if "realised/rejected" in record)
        for records in read_runs(out).records["long_suffix"]
    ]
    assert f"{np.mean(sums):+.3f} ({min(sums):+.3f} to {max(sums):+.3f}) |" in section
    assert section.count("\n| long_suffix") == 3


def test_first_order_prediction_meets_the_realised_change(finished):
    out, _ = finished
    for seeds in read_runs(out).records.values():
        for side in ("chosen", "rejected"):
            for rows in ("", "probe/"):
                first_order, realised = (
                    curve(seeds, f"{rows}{kind}/{side}").values for kind in ("first_order", "realised")
                )
                # float32 log-probabilities of some tens of nats: a difference is good to about 1e-5
                assert abs(first_order - realised).max() < 1e-4 + 0.2 * abs(realised).max()


def test_again_runs_nothing_and_changes_nothing(finished):
    out, files = finished
    before = {
        p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.suffix in (".jsonl", ".json", ".csv", ".md")
    }
    assert sentiment.run(shrunk(out)) == files
    assert before == {p: p.read_bytes() for p in before}


def test_the_base_model_is_a_checkpoint_to_start_from(finished, tmp_path):
    out, _ = finished
    folder = str(out / "base" / exports.CHECKPOINT)
    materials = sentiment.gather(shrunk(tmp_path / "next", model=folder))
    assert materials.checkpoint is not None
    config, params = models.load_pretrained(folder)
    assert materials.model.config == config
    state = jax.eval_shape(lambda: training.init_state(params, shrunk(out).base.optimizer.build(3)))
    trained = training.final_params(out / "base", state)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, trained))


def test_another_base_model_is_not_served_old_runs(finished, tmp_path):
    """The same folder name, other weights: every run of the old one is refused by name."""
    out, _ = finished
    config, params = models.load_pretrained(out / "base" / exports.CHECKPOINT)
    folder = tmp_path / "base"

    def settings():
        fast = {"changes": False, "probe_pairs": 0}
        return shrunk(tmp_path / "out", model=str(folder), sets=("single_token",), seeds=1, **fast)

    for scale in (1.0, 1.5):
        if folder.exists():
            shutil.rmtree(folder)
        models.save_pretrained(folder, config, jax.tree.map(lambda leaf, s=scale: s * leaf, params))
        shutil.copy(out / "base" / exports.CHECKPOINT / "tokenizer.json", folder)
        if scale == 1.0:
            sentiment.run(settings())
        else:
            with pytest.raises(UserError, match="holds a run of another configuration: start is"):
                sentiment.run(settings())


def test_single_token_needs_a_base_model_and_its_own_folder(finished):
    out, _ = finished
    message = "name the checkpoint folder of a base model"
    with pytest.raises(UserError, match=message):
        single_token.run(shrunk(out, sets=("single_token",)))
    model = str(out / "base" / exports.CHECKPOINT)
    with pytest.raises(UserError, match="holds a run of another configuration: kind is"):
        single_token.run(shrunk(out, sets=("single_token",), model=model))


@pytest.mark.slow
def test_single_token_tabulates_its_own_runs(finished, tmp_path, monkeypatch):
    out, _ = finished
    variants = [single_token.Variant(2, "sgd", 0.01), single_token.Variant(2, "adamw", 2e-5)]
    monkeypatch.setattr(single_token, "sweep", lambda: iter(variants))
    settings = shrunk(tmp_path / "out", sets=("single_token",), model=str(out / "base" / exports.CHECKPOINT))
    single_token.run(settings)
    with (tmp_path / "out" / "single_token.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["optimizer"] for row in rows] == ["sgd", "adamw"]
    for row, variant in zip(rows, variants, strict=True):
        runs = [training.read_metrics(tmp_path / "out" / variant.name / f"seed{seed}") for seed in (0, 1)]
        seen = [[r["eval/log_prob/chosen"] for r in records if "eval/log_prob/chosen" in r] for records in runs]
        changes = [values[-1] - values[0] for values in seen]
        expected = f"{sum(changes) / 2:+.3f} ({min(changes):+.3f} to {max(changes):+.3f})"
        assert row["held-out chosen"] == expected
    before = (tmp_path / "out" / "single_token.csv").read_bytes()
    single_token.run(settings)  # all is done: nothing runs, the table is the same
    assert (tmp_path / "out" / "single_token.csv").read_bytes() == before


def tweeteval(folder, labels="0\n2\n" * 8, mapping="0\tnegative\n1\tneutral\n2\tpositive\n"):
    folder.mkdir()
    (folder / "mapping.txt").write_text(mapping)
    for split in ("train", "val"):
        (folder / f"{split}_text.txt").write_text("".join(f"{split} tweet {i}\n" for i in range(16)))
        (folder / f"{split}_labels.txt").write_text(labels)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective", "dppo"], "unknown objective 'dppo'"),
        (["--objective-args", "gamma", "1.0"], "objective 'dpo' has no hyperparameter gamma: it has beta"),
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--pair-chain", "pcgrad2"], "unknown pair chain 'pcgrad2' (did you mean pcgrad?)"),
        (["--sets", "medium_suffix"], "unknown pair set 'medium_suffix'"),
        (["--model", "gpt5"], "--model gpt5: neither a preset"),
        (["--data", "nowhere"], "nowhere"),
        (["--labels", "angry", "glad"], "the embedded data has negative and positive only"),
        (["--max-length", "4096"], "--max-length 4096: model tiny has 128 positions"),
        (["--seeds", "0"], "--seeds 0: at least one is needed"),
        (["--preference.steps", "0"], "steps is 0"),
        (["--preference.eval-every", "0"], "the figures are drawn from the evaluations"),
        (["--preference.batch-size", "9999"], "--preference.batch-size 9999: there are only 512 training pairs"),
        (["--base.batch-size", "99999"], "--base.batch-size 99999: there are only"),
        (["--held-out-pairs", "4"], "--probe-pairs 16: from 0 to the 4 held-out pairs"),
        (["--label-words", "good", "not good"], "label ' not good' is 2 tokens"),
        (["--preset", "paper"], "--preset paper: name real data"),
        (["--base.optimizer.learning-rate", "nan"], "learning rate nan"),
        (["--sft.optimizer.final-fraction", "-1"], "final fraction -1.0: it must be 0 or more"),
        (["--preference.optimizer.clip-norm", "nan"], "clip norm nan"),
        (["--max-length", "0"], "--max-length 0: at least one is needed"),
        (["--train-pairs", "-5"], "--train-pairs -5: at least one is needed"),
        (["--preference.optimizer.name", "adagrad"], "unknown optimizer 'adagrad'"),
        (
            ["--reference-cache", __file__],
            f"single_token_seed0_eval_batch8.safetensors: cannot be written: {__file__} is",
        ),
    ],
)
def test_bad_flags_end_in_one_line(words, message, fail, tmp_path):
    assert message in fail(["--preset", "smoke", "--out", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (sentiment.main, ["--base.steps", "7"], "--base.steps 7 has no effect: the base model is --model"),
        (sentiment.main, ["--sft.eval-every", "5"], "--sft.eval-every 5 has no effect: only preference optimisation"),
        (sentiment.main, ["--vocab-size", "999"], "--vocab-size 999 has no effect"),
        (single_token.main, ["--sets", "long_suffix"], "--sets long_suffix has no effect: this study sets it itself"),
        (single_token.main, ["--sft.steps", "9"], "--sft.steps 9 has no effect"),
        (single_token.main, ["--reference-cache", "x"], "--reference-cache x has no effect: this study computes its"),
        (single_token.main, ["--preference.optimizer.name", "sgd"], "--preference.optimizer.name sgd has no effect"),
    ],
)
def test_flags_without_effect_are_refused(main, words, message, fail, tmp_path):
    start = ["--preset", "smoke", "--out", str(tmp_path / "out"), "--model", str(tmp_path)]
    assert message in fail([*start, *words], main=main)
    assert not (tmp_path / "out").exists()


def test_bad_folders_end_in_one_line(fail, tmp_path):
    out = ["--preset", "smoke", "--out", str(tmp_path / "out")]
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in fail([*out, "--data", str(tmp_path / "empty")])
    short = tweeteval(tmp_path / "short", labels="0\n2\n")
    assert "train_labels.txt" in fail([*out, "--data", str(short)])
    good = tweeteval(tmp_path / "good")
    assert "sarcastic" in fail([*out, "--data", str(good), "--labels", "negative", "sarcastic"])
    assert not (tmp_path / "out").exists()


def test_bad_checkpoints_end_in_one_line(fail, tmp_path):
    out = ["--preset", "smoke", "--out", str(tmp_path / "out"), "--model"]
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text('{"model_type": "llama"}')
    (llama / "model.safetensors").write_bytes(b"")
    assert "llama" in fail([*out, str(llama)])
    tokenizer = data.train_bpe(["Tweet: positive negative"] * 9, 290)
    config = models.DecoderConfig(vocab_size=270, max_positions=64, width=4, layers=1, heads=1)
    small = tmp_path / "small"
    models.save_pretrained(small, config, models.language_model(config).init(jax.random.key(0)))
    tokenizer.save(small)
    message = f"the tokenizer has {tokenizer.vocab_size} tokens, the model only 270"
    assert message in fail([*out, str(small)])
    assert not (tmp_path / "out").exists()


def test_another_configurations_folder_is_refused_whole(finished, fail):
    out, _ = finished
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    error = fail(["--preset", "smoke", "--no-track", "--out", str(out)])
    assert f"{out} holds a run of another configuration: " in error
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_wrong_flag_is_status_2(fail):
    assert fail(["--no-such-flag"]) == "error: Unrecognized options: --no-such-flag"
