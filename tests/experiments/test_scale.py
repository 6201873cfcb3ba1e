"""The sweep over sizes: numbers of parameters as the trials tell them, verdicts on known numbers, bad input."""

import dataclasses

import numpy as np
import pytest

from entangle import models
from experiments import scale
from experiments.reports import scale_report
from experiments.reports.sweep_tables import read_sweep
from tests.experiments import fabricated

NAMES = ("small", "tiny", "mini")
SMALL = dataclasses.replace(scale.presets()["laptop"], models=NAMES, seeds=2)


def records(config):
    """Cosine and ratio of norms grow with size; the larger two lower both sides, and have most pairs in that case."""
    place = ("tiny", "mini", "small").index(config.model)
    fall, cosine = 0.5 - place, 0.1 * place + 0.02 * config.seed
    norms = {"geometry/chosen_norm": 2.0, "geometry/rejected_norm": 1.5 + place}
    ideal = 0.25 if place else 0.75
    return [
        fabricated.evaluation(0, ideal=ideal, **norms),
        {"step": 1, "loss": 1.0},
        fabricated.evaluation(1, fall, fall - 1, ideal=ideal, cosine=cosine, **norms),
    ]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("scale")
    fabricated.sweep(
        out,
        scale.KIND,
        SMALL,
        scale.sweep(SMALL),
        records,
        lambda config: {"parameters": models.preset(config.model, 300).parameters},
    )
    return out


@pytest.fixture(scope="module")
def verdicts(out):
    return {v.claim: v for v in scale_report.verdicts(*scale_report.read(out))}


def test_sizes_are_those_that_the_trials_tell(out):
    groups = read_sweep(out).groups
    # tiny: (300 + 128) * 64 + 2 * (12 * 64^2 + 13 * 64) + 2 * 64
    assert scale_report.parameters(out, groups["tiny"]) == 127_488
    assert scale_report.parameters(out, groups["small"]) == models.preset("small", 300).parameters


def test_what_goes_with_size_is_judged_seed_by_seed(verdicts):
    cosine = verdicts["the larger the model, the larger at the end: cosine"]
    assert (cosine.verdict, cosine.where) == ("shown", "not in the paper")
    assert cosine.numbers == "rank correlation +1.000 (+1.000 to +1.000); means 0.01, 0.11, 0.21"
    chosen = verdicts["the larger the model, the larger at the end: chosen log-probability, change (nats)"]
    assert chosen.verdict == "not shown"
    ideal = verdicts["the larger the model, the larger at the end: share of ideal pairs"]
    assert ideal.numbers.startswith("rank correlation -0.866")  # 0.75, 0.25, 0.25
    alike = scale_report._with_size("none", [1, 2, 3], np.ones((3, 2)))
    assert (alike.verdict, alike.numbers[:23]) == ("not shown", "rank correlation +0.000")


def test_a_fall_is_judged_where_most_pairs_are_in_that_case(verdicts):
    found = {
        name: verdicts[f"{name}: where most pairs are in the case both_fall, both log-probabilities end lower"]
        for name in NAMES
    }
    # changes of the chosen side: 0.5, -0.5, -1.5
    assert {name: v.verdict for name, v in found.items()} == {"tiny": "not judged", "mini": "shown", "small": "shown"}
    assert found["mini"].numbers.startswith("share of pairs in that case, mean over evaluations 0.750")


def test_models_with_other_seeds_are_not_held_against_each_other(out):
    sweep, sizes = scale_report.read(out)
    fewer = sweep._replace(groups=sweep.groups | {"mini": sweep.groups["mini"].only([1])})
    (said,) = [v for v in scale_report.verdicts(fewer, sizes) if v.claim == "measures against size"]
    assert (said.verdict, said.numbers) == ("not judged", "models differ in their seeds")


def test_figures_and_report_from_the_folders_alone(out):
    files = scale_report.redraw(out)
    assert files[0].name == "size.png" and files[-1].name == "report.md"
    rows = (out / "figures" / "size.csv").read_text().splitlines()
    assert len(rows) == 1 + len(NAMES) * 2 * 2 * len(scale_report.MEASURES)
    assert rows[1].startswith("tiny,127488,cosine,after SFT,0,")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models"], "--models: at least one is needed"),
        (["--models", "huge"], "--trial.model huge: neither a preset (tiny, mini, small, gpt2, llama3_8b, "),
        (["--trial.model", "gpt2"], "--trial.model gpt2 has no effect: the sweep sets it itself"),
        (["--preset", "hh-rlhf"], "--preset hh-rlhf: name the data with --trial.data"),
    ],
)
def test_bad_input_ends_in_one_line(fail, tmp_path, words, message):
    assert message in fail(["--no-track", "--out", str(tmp_path / "out"), *words], scale.main)
    assert not (tmp_path / "out").exists()
