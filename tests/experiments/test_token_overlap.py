"""Likeness of two responses against naive definitions, correlations on known numbers, a shrunk run, bad input."""

import csv
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import models
from entangle.data import LabelledText
from entangle.errors import UserError
from entangle.training import StageConfig, read_metrics
from entangle.types import PairBatch
from experiments import token_overlap, token_overlap_measure
from experiments.pairs.sentiment_data import spliced_pairs, tweet_pairs
from experiments.reports import token_overlap_report
from experiments.sweep import folder_of
from experiments.sweep.trials import TRIALS
from tests.experiments import fabricated
from tests.toy import draw_pairs

SETTINGS = dataclasses.replace(token_overlap.presets()["laptop"], pair_sets=("spliced", "single_token"), seeds=2)


@functools.cache
def naive(one, other):
    if not one or not other:
        return len(one) + len(other)
    changed = naive(one[1:], other[1:]) + (one[0] != other[0])
    return min(changed, naive(one[1:], other) + 1, naive(one, other[1:]) + 1)


def test_edit_distance_is_the_recursion_that_defines_it():
    words = [word for length in range(4) for word in itertools.product((0, 1), repeat=length)]
    for one, other in itertools.product(words, words):
        assert token_overlap_measure.edit_distance(one, other) == naive(one, other)


def test_ches_is_summed_over_the_states_that_predict_the_response():
    pairs = draw_pairs(0, pairs=4)
    hidden = np.random.default_rng(1).standard_normal((4, 2, 8, 3)).astype(np.float32)
    scores, per_token = token_overlap_measure.ches_scores(jnp.asarray(hidden), pairs.completion_mask)
    for pair, (score, mean) in enumerate(zip(scores, per_token, strict=True)):
        taken = [hidden[pair, side, np.flatnonzero(pairs.completion_mask[pair, side]) - 1] for side in (0, 1)]
        (w, l), (mean_w, mean_l) = ([rows.sum(0) for rows in taken], [rows.mean(0) for rows in taken])
        np.testing.assert_allclose(
            [score, mean], [w @ l - w @ w, mean_w @ mean_l - mean_w @ mean_w], rtol=1e-4, atol=1e-5
        )


def test_equal_responses_are_alike_in_everything_and_move_alike():
    model = models.language_model(models.DecoderConfig(vocab_size=7, max_positions=8, width=8, layers=1, heads=2))
    start, end = (model.init(jax.random.key(seed)) for seed in (0, 1))
    tokens, mask = (np.repeat(np.asarray(leaf)[:, :1], 2, axis=1) for leaf in draw_pairs(0, pairs=3)[:2])
    found = token_overlap_measure.pair_columns(model, start, end, PairBatch(jnp.asarray(tokens), jnp.asarray(mask)), 2)
    assert found["edit_distance"].tolist() == [0, 0, 0]
    np.testing.assert_allclose(found["ches"], 0.0, atol=1e-5)
    np.testing.assert_allclose(found["cosine"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(found["chosen_change"], found["rejected_change"], rtol=1e-5)
    assert (found["chosen_length"] == mask[:, 0].sum(-1)).all()


def test_spliced_tweets_share_more_words_from_pair_to_pair_and_never_all():
    said = {"negative": ["a b c d"] * 6, "positive": ["p q r s t"] * 6}
    texts = [LabelledText(text, label, "x:1") for label, both in said.items() for text in both]
    pairs = spliced_pairs(texts, ("negative", "positive"))
    assert [pair.rejected for pair in pairs[:5]] == [" a b c d", " a b c t", " a b s t", " a r s t", " a b c d"]
    assert [pair.chosen for pair in pairs] == [pair.chosen for pair in tweet_pairs(texts, ("negative", "positive"))]


def test_what_is_held_fixed_explains_what_it_explains():
    length = np.arange(12.0)
    noise = np.tile([1.0, -1.0], 6)
    one, other = length + noise, length - 2 * noise
    assert token_overlap_report.correlation(one, other) > 0
    assert token_overlap_report.correlation(one, other, length) < -0.5
    assert np.isnan(token_overlap_report.correlation(np.ones(12), other))


def records(config):
    return [fabricated.evaluation(0), {"step": 1, "loss": 1.0}, fabricated.evaluation(1, -1.0, -2.0)]


def fabricate(out):
    """spliced: cosine falls and the chosen side ends higher as more is edited; single_token: all pairs alike."""
    for trial in fabricated.sweep(out, token_overlap.KIND, SETTINGS, token_overlap.sweep(SETTINGS), records):
        share = np.linspace(0.1, 1.0, 6) if trial.config.pair_set == "spliced" else np.ones(6)
        wobble = np.array([0.0, 0.3, -0.3, 0.3, -0.3, 0.0])
        columns = {
            "edit_distance": 10 * share,
            "edit_share": share,
            "ches": -share + wobble,
            "ches_per_token": -share,
            "cosine": 1 - share,
            "chosen_length": np.arange(6.0) % 3,
            "rejected_length": np.arange(6.0) % 2,
            "chosen_change": share - 2 if trial.config.seed == 0 else -share,
            "rejected_change": share - 3,
        }
        token_overlap_measure._write(folder_of(out, trial) / token_overlap_report.FILE, columns)


def test_verdicts_are_seed_by_seed_and_of_what_varies_alone(tmp_path):
    fabricate(tmp_path)
    files = token_overlap_report.redraw(tmp_path)
    assert [file.name for file in files[:3]] == ["correlations.png", "pairs_single_token.png", "pairs_spliced.png"]
    report = files[-1].read_text()
    assert "| spliced: the fewer tokens differ, the larger the cosine | section 4.2 | shown |" in report
    claim = "spliced: the higher length-normalised CHES, the lower the chosen log-probability ends"
    assert f"| {claim} | 2410.08847 | in 1 of 2 seeds | rank correlation +0.000 (-1.000 to +1.000); 6 pairs |" in report
    assert "| single_token: " not in report
    assert "all pairs alike" in report


def test_a_score_that_points_the_wrong_way_tells_nothing_better():
    change = np.arange(6.0)
    wrong, worse = np.array([0.0, 1.0, 2.0, 3.0, 5.0, 4.0]), -change  # correlations of +0.94 and, for the distance, -1
    columns = {"edit_share": worse, "ches": wrong, "ches_per_token": -change, "cosine": change, "chosen_change": change}
    found = {v.claim: v.verdict for v in token_overlap_report.verdicts({"x": {0: columns, 1: columns}})}
    assert found["x: CHES tells the displacement better than the edit distance"] == "not shown"
    assert found["x: CHES, length-normalised tells the displacement better than the edit distance"] == "shown"


def test_trials_whose_pairs_were_not_looked_at_are_named(tmp_path):
    fabricated.sweep(tmp_path, token_overlap.KIND, SETTINGS, token_overlap.sweep(SETTINGS), records)
    with pytest.raises(UserError, match=r"its pairs were not looked at \(pairs.csv is missing\)"):
        token_overlap_report.redraw(tmp_path)


def test_a_run_looks_at_every_held_out_pair_once(gathered_once, tmp_path):
    few = {"batch_size": 4, "checkpoint_every": 2}
    trial = dataclasses.replace(
        SETTINGS.trial,
        vocab_size=400,
        train_pairs=32,
        held_out_pairs=16,
        base=StageConfig(2, **few),
        sft=StageConfig(2, **few),
        preference=StageConfig(2, eval_every=2, **few),
    )
    small = dataclasses.replace(
        SETTINGS, out=tmp_path / "out", track=False, pair_sets=("spliced",), seeds=1, trial=trial
    )
    files = token_overlap.run(small)
    (folder,) = (tmp_path / "out" / TRIALS).iterdir()
    with (folder / "pairs.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) > 3
    # the change of the mean is what the run's own evaluations say
    looks = [record for record in read_metrics(folder) if "loss" not in record]
    change = looks[-1]["eval/log_prob/chosen"] - looks[0]["eval/log_prob/chosen"]
    np.testing.assert_allclose(np.mean([float(row["chosen_change"]) for row in rows]), change, atol=1e-4)
    np.testing.assert_allclose(np.mean([float(r["cosine"]) for r in rows]), looks[0]["eval/geometry/cosine"], atol=1e-5)
    before = (folder / "pairs.csv").stat().st_mtime_ns
    assert token_overlap.run(small) == files
    assert (folder / "pairs.csv").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pair-sets", "splices"], "unknown pair set 'splices'"),
        (
            ["--trial.data", "x.jsonl", "--pair-sets", "tweets"],
            "--pair-sets tweets has no effect: the pairs are those of",
        ),
        (["--preset", "tweets"], "--preset tweets: name the data with --trial.data"),
        (["--trial.seed", "3"], "--trial.seed 3 has no effect: the sweep sets it itself"),
    ],
)
def test_bad_input_ends_in_one_line(fail, tmp_path, words, message):
    assert message in fail(["--no-track", "--out", str(tmp_path / "out"), *words], token_overlap.main)
