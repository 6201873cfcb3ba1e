"""Forgetting one side while the other is kept, as its user runs it, shrunk; its law; and bad input."""

import csv
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import data, losses, models, training
from entangle.types import PairLogProbs
from experiments import unlearning
from experiments.pairs.sentiment_data import tweet_pairs
from experiments.reports import unlearning_report
from experiments.reports.run_tables import curve
from experiments.reports.unlearning_figures import read, share
from experiments.unlearning_config import VARIANTS, presets
from experiments.unlearning_data import both_sides, gather
from experiments.unlearning_objectives import ascent, npo

NAMES = ("sgd-plain", "sgd-project", "adam-project", "adam-invariant")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "gpt2"
    tokenizer = data.train_bpe(data.embedded_corpus(8, 8, 500).text, 400)
    config = models.DecoderConfig(vocab_size=tokenizer.vocab_size, max_positions=64, width=8, layers=1, heads=2)
    models.save_pretrained(folder, config, models.language_model(config).init(jax.random.key(0)))
    tokenizer.save(folder)
    return folder


def shrunk(out, checkpoint, **changes):
    """The smoke preset from a checkpoint, so that nothing is pretrained: a few steps of few pairs."""
    smoke = presets()["smoke"]
    few = {"steps": 3, "batch_size": 4, "checkpoint_every": 2, "log_every": 2}
    stages = {name: dataclasses.replace(getattr(smoke, name), **few) for name in ("sft", "preference")}
    stages["preference"] = dataclasses.replace(stages["preference"], eval_every=2)
    small = {
        "out": out,
        "model": str(checkpoint),
        "train_pairs": 64,
        "held_out_pairs": 8,
        "max_length": 64,
        "memory": 0,  # the projection compiles fastest with none
    }
    return dataclasses.replace(smoke, track=False, variants=NAMES, **stages, **(small | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint):
    out = tmp_path_factory.mktemp("unlearning") / "out"
    return out, unlearning.run(shrunk(out, checkpoint))


def test_files_are_there_and_named(finished):
    out, files = finished
    figures = [f"figures/{name}.png" for name in ("log_probs", "trade_off", "first_order")]
    assert [str(file.relative_to(out)) for file in files] == [*figures, "report.md", "report.html"]
    for file in files[:-2]:
        assert file.stat().st_size > 0
        assert file.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_plotted_numbers_are_the_runs_numbers(finished):
    out, _ = finished
    with (out / "figures" / "trade_off.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(NAMES) * 3  # evaluations at 0, 2 and 3
    for row in rows:
        records = {
            r["step"]: r for r in training.read_metrics(out / row["variant"] / "seed0") if "eval/per_token/chosen" in r
        }
        for side, column, sign in (("rejected", "forgotten", -1), ("chosen", "retain_change", 1)):
            now, first = (records[step][f"eval/per_token/{side}"] for step in (int(row["step"]), 0))
            assert float(row[f"{column}_nats_per_token"]) == sign * (now - first)


def test_projected_steps_leave_the_batchs_retain_sum_and_the_plain_ones_do_not(finished):
    records = read(finished[0]).records
    retain = {name: abs(curve(records[name], "first_order/chosen").values) for name in NAMES}
    forget = {name: curve(records[name], "first_order/rejected").values for name in NAMES}
    assert all(values.max() < 0 for values in forget.values())
    assert retain["sgd-project"].max() < 1e-4 * retain["sgd-plain"].max()
    assert share(records["sgd-plain"]).values.min() > 1e-2
    # under Adam only what has the last word holds: the projection comes before the optimizer, which rescales and remembers
    assert share(records["adam-invariant"]).values.max() < 1e-4
    assert share(records["adam-project"]).values.max() > 1e-2


def test_the_report_judges_by_the_runs(finished):
    out, _ = finished
    records, report = read(out).records, (out / "report.md").read_text()
    verdicts = {"sgd-plain": "fails", "sgd-project": "holds", "adam-project": "fails", "adam-invariant": "holds"}
    for name, expected in verdicts.items():
        assert unlearning_report.verdict(records[name], VARIANTS[name].method) == expected
    assert "| SGD | forget alone | fails |" in report
    assert "| Adam | invariant update, memory | holds |" in report


def test_equal_forgetting_is_read_off_the_path():
    records = [
        {"step": step, "eval/per_token/rejected": -f, "eval/per_token/chosen": -r}
        for step, f, r in ((0, 1.0, 2.0), (1, 2.0, 2.5), (2, 4.0, 3.5))
    ]
    # two nats are forgotten half-way between the evaluations at which one and three are: retain -0.5 and -1.5 there
    assert unlearning_report.at_equal_forgetting([records], 2.0).tolist() == [-1.0]
    assert np.isnan(unlearning_report.at_equal_forgetting([records], 3.5)).all()


@pytest.mark.slow
def test_again_runs_nothing_and_a_stopped_run_goes_on_to_the_same_numbers(finished, checkpoint, tmp_path):
    out, _ = finished
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    stopped = copy / "adam-invariant" / "seed0"
    (stopped / "done.json").unlink()
    shutil.rmtree(stopped / "checkpoints" / "3")
    unlearning.run(shrunk(copy, checkpoint))
    names = [
        p.relative_to(out) for p in out.rglob("*") if p.suffix == ".csv" or p.name in ("metrics.jsonl", "config.json")
    ]
    assert len(names) > 3 * len(NAMES)
    for name in names:
        lines = ((folder / name).read_text().splitlines() for folder in (out, copy))
        if name.suffix == ".jsonl":
            lines = ([{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in each] for each in lines)
        before, after = lines
        assert before == after


def test_another_configurations_folder_is_refused_whole(finished, fail):
    out, _ = finished
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    error = fail(["--preset", "smoke", "--no-track", "--out", str(out)], main=unlearning.main)
    assert f"{out} holds a run of another configuration: " in error
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_npo_is_its_formula_and_ascent_its_limit():
    log_probs = (-3.0, -2.0), (-5.0, -9.0), (-4.0, -1.0), (-6.0, -7.0), (2.0, 3.0), (2.0, 3.0)
    lp = PairLogProbs(*map(jnp.array, log_probs))
    ratio = np.exp(np.array([1.0, -2.0]))  # of the rejected responses, policy over reference
    expected = 2 / 0.5 * np.log(1 + ratio**0.5) + np.array([3.0, 2.0])
    assert np.allclose(npo(lp, beta=0.5), expected, rtol=1e-6)
    d_w, d_l = losses.coefficients(npo, lp, beta=0.5)
    assert np.allclose(d_w, 1)
    assert np.allclose(d_l, 2 * ratio**0.5 / (1 + ratio**0.5), rtol=1e-6)
    limit, plain = losses.coefficients(npo, lp, beta=1e-4), losses.coefficients(ascent, lp)
    assert np.allclose(limit, plain, atol=1e-3)


def test_both_sides_are_supervised_and_tweets_are_paired(checkpoint):
    pairs = gather(shrunk("unused", checkpoint)).pairs.train
    both = both_sides(pairs)
    count = len(pairs.tokens)
    assert (both.tokens[:count, 0] == pairs.tokens[:, 0]).all()
    assert (both.tokens[count:, 0] == pairs.tokens[:, 1]).all()
    assert (both.completion_mask[count:, 0] == pairs.completion_mask[:, 1]).all()
    texts = [data.LabelledText(f"tweet {i}", label, f"here:{i}") for i, label in enumerate("abab")]
    made = [(pair.chosen, pair.rejected) for pair in tweet_pairs(texts, ("a", "b"))]
    assert made == [(" tweet 1", " tweet 0"), (" tweet 3", " tweet 2")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "sgd-mystery"], "--variants sgd-mystery: no such variant; choose from sgd-plain, "),
        (["--variants", "sgd-plain", "sgd-plain"], "--variants: one is named twice"),
        (["--rates", "adam-plian", "0.1"], "--rates adam-plian: no such variant"),
        (["--rates", "sgd-plain", "-0.1"], "sgd-plain -0.1: it must be positive"),
        (["--variants", "sgd-plain", "--rates", "adam-plain", "0.1"], "--rates adam-plain has no effect"),
        (["--rate-scale", "nan"], "--rate-scale nan: it must be positive"),
        (["--memory", "-1"], "--memory -1: 0 or more are needed"),
        (["--sets", "tweets", "long_suffix"], "--sets: one pair set is needed"),
        (["--sets", "medium_suffix"], "unknown pair set 'medium_suffix': choose from"),
        (["--variants", "sgd-plain", "--memory", "3"], "--memory 3 has no effect: none of --variants has a memory"),
        (["--variants", "sgd-plain", "--rates", "sgd-plain", "-1"], "--rates sgd-plain -1.0: it must be positive"),
        (["--pair-chain", "pcgrad"], "--pair-chain pcgrad has no effect: this study sets it itself"),
        (["--preference.optimizer.name", "sgd"], "--preference.optimizer.name sgd has no effect"),
        (["--held-out", "x.jsonl"], "--held-out x.jsonl has no effect: --data is no preference file"),
        (["--label-words", "a", "b"], "--label-words a b has no effect: the responses are whole tweets"),
        (["--objective", "nppo"], "unknown objective 'nppo'"),
        (["--objective-args", "beta", "-1"], "beta"),
        (["--data", "x.jsonl"], "--data x.jsonl: name a Hugging Face checkpoint folder with --model"),
        (
            ["--data", "x.jsonl", "--sets", "long_suffix"],
            "--sets long_suffix has no effect: the pairs are those of x.jsonl",
        ),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags_end_in_one_line(words, message, fail, tmp_path):
    assert message in fail(["--preset", "smoke", "--out", str(tmp_path / "out"), *words], main=unlearning.main)
    assert not (tmp_path / "out").exists()


def test_a_preference_file_is_read_and_a_bad_one_ends_in_one_line(checkpoint, fail, tmp_path):
    file = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"guest {i}", "chosen": f" tea {i}", "rejected": f" no {i}"} for i in range(32)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    materials = gather(shrunk(tmp_path / "out", checkpoint, data=str(file)))
    assert (len(materials.pairs.train.tokens), len(materials.pairs.held_out.tokens)) == (28, 4)
    file.write_text("no JSON\n")
    words = ["--preset", "smoke", "--out", str(tmp_path / "out"), "--data", str(file), "--model", str(checkpoint)]
    assert "no preference pair in 1 lines" in fail(words, main=unlearning.main)
    assert not (tmp_path / "out").exists()
