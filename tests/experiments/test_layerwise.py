"""The sweep of layers: a shrunk run from its command to its report, figures from known numbers, bad input."""

import dataclasses
import json

import numpy as np
import pytest

from entangle.errors import UserError
from entangle.training import StageConfig, read_metrics
from experiments import layerwise
from experiments.reports import layerwise_report
from experiments.reports.sweep_tables import read_sweep
from experiments.sweep.trials import TRIALS
from tests.experiments import fabricated

NAMES = ["token_embedding", "position_embedding", "0.attention", "0.feed_forward", "10.attention", "final_norm"]
SETTINGS = dataclasses.replace(layerwise.presets()["laptop"], pair_sets=("long_suffix", "tweets"), seeds=2)


def records(config):
    def layers(scale):
        return {
            f"layer/{name}/{measure}": scale * place / len(NAMES) + 0.01 * config.seed
            for place, name in enumerate(sorted(NAMES))
            for measure in layerwise_report.MEASURES
        }

    return [fabricated.evaluation(0, **layers(0.5)), {"step": 1, "loss": 1.0}, fabricated.evaluation(1, **layers(-0.5))]


def test_layers_stand_in_the_order_of_the_model_and_numbers_are_those_of_the_folders(tmp_path):
    fabricated.sweep(tmp_path, layerwise.KIND, SETTINGS, layerwise.sweep(SETTINGS), records)
    assert layerwise_report.layers(read_sweep(tmp_path).groups["tweets"]) == NAMES
    files = layerwise_report.redraw(tmp_path)
    assert [f.name for f in files[:3]] == ["layer_cosine.png", "layer_cosine_part.png", "layer_shares.png"]
    report = files[-1].read_text()
    # token_embedding is last by name: 5/6 of 0.5, and 0.01 more in the second seed
    assert "| tweets | token_embedding | +0.422 (+0.417 to +0.427) | -0.412 (-0.417 to -0.407) |" in report
    assert "None is judged" in report
    rows = (tmp_path / "figures" / "layer_cosine.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(NAMES) * 2 * 2


def test_trials_without_layers_are_refused(tmp_path):
    points = layerwise.sweep(SETTINGS)
    fabricated.sweep(tmp_path, layerwise.KIND, SETTINGS, points, lambda config: [fabricated.evaluation(0)])
    with pytest.raises(UserError, match=r"no geometry of layers: run them with --trial.layers"):
        layerwise_report.redraw(tmp_path)


def test_a_preference_file_has_its_own_pairs():
    from_file = dataclasses.replace(SETTINGS, trial=dataclasses.replace(SETTINGS.trial, data="x.jsonl"))
    assert list(layerwise.sweep(from_file)) == [{"seed": 0}, {"seed": 1}]


def test_a_run_from_its_sweep_to_its_report(tmp_path):
    few = {"batch_size": 4, "checkpoint_every": 2}
    trial = dataclasses.replace(
        SETTINGS.trial,
        vocab_size=400,
        train_pairs=32,
        held_out_pairs=4,
        probe_pairs=0,
        base=StageConfig(2, **few),
        sft=StageConfig(2, **few),
        preference=StageConfig(2, eval_every=2, **few),
    )
    small = dataclasses.replace(
        SETTINGS, out=tmp_path / "out", track=False, pair_sets=("long_suffix",), seeds=1, trial=trial
    )
    files = layerwise.run(small)
    assert files[-1].name == "report.html"
    (folder,) = (tmp_path / "out" / TRIALS).iterdir()
    assert json.loads((folder / "config.json").read_text())["trial"]["layers"] is True
    looks = [record for record in read_metrics(folder) if "loss" not in record]
    assert len(looks) == 2
    for look in looks:
        parts = [value for name, value in look.items() if name.endswith("/cosine_part")]
        shares = [value for name, value in look.items() if name.endswith("/chosen_share")]
        assert len(parts) == 7  # two embeddings, two layers of two sublayers, the final norm
        np.testing.assert_allclose([sum(parts), sum(shares)], [look["eval/geometry/cosine"], 1.0], atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pair-sets"], "--pair-sets: at least one is needed"),
        (["--pair-sets", "tweet"], "unknown pair set 'tweet'"),
        (["--trial.pair-set", "long_suffix"], "--trial.pair-set long_suffix has no effect: the sweep sets it itself"),
    ],
)
def test_bad_input_ends_in_one_line(fail, tmp_path, words, message):
    assert message in fail(["--no-track", "--out", str(tmp_path / "out"), *words], layerwise.main)
