"""The sweep over sizes: numbers of parameters from the base models' folders, verdicts on known numbers, bad input."""

import dataclasses

import pytest

from entangle import models
from entangle.errors import UserError
from entangle.training import RunFolder
from experiments import scale
from experiments.reports import scale_report
from experiments.reports.sweep_tables import read_sweep
from experiments.sweep.trial_config import STARTS, base_fingerprint
from tests.experiments import fabricated

NAMES = ("small", "tiny", "mini")
SMALL = dataclasses.replace(scale.presets()["laptop"], models=NAMES, seeds=2)


def records(config):
    """Cosine and ratio of norms grow with size; the larger two lower both sides."""
    place = ("tiny", "mini", "small").index(config.model)
    fall, cosine = 0.5 - place, 0.1 * place + 0.02 * config.seed
    norms = {"geometry/chosen_norm": 2.0, "geometry/rejected_norm": 1.5 + place}
    return [
        fabricated.evaluation(0, **norms),
        {"step": 1, "loss": 1.0},
        fabricated.evaluation(1, fall, fall - 1, cosine=cosine, **norms),
    ]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("scale")
    for trial in fabricated.sweep(out, scale.KIND, SMALL, scale.sweep(SMALL), records):
        shape = models.preset(trial.config.model, 300)
        RunFolder(out / STARTS / f"base-{base_fingerprint(trial.config)}", {"model": dataclasses.asdict(shape)})
    return out


@pytest.fixture(scope="module")
def verdicts(out):
    return {v.claim: v for v in scale_report.verdicts(*scale_report.read(out))}


def test_sizes_are_those_of_the_base_models(out):
    groups = read_sweep(out).groups
    # tiny: (300 + 128) * 64 + 2 * (12 * 64^2 + 13 * 64) + 2 * 64
    assert scale_report.parameters(out, groups["tiny"]) == 127_488
    assert scale_report.parameters(out, groups["small"]) == models.preset("small", 300).parameters


def test_a_checkpoint_says_its_own_size(out, tmp_path):
    import jax

    shape = models.DecoderConfig(vocab_size=10, max_positions=8, width=4, layers=1, heads=2)
    models.save_gpt2(tmp_path / "own", shape, models.language_model(shape).init(jax.random.key(0)))
    group = next(iter(read_sweep(out).groups.values()))
    own = group._replace(config=group.config | {"model": str(tmp_path / "own")})
    assert scale_report.parameters(out, own) == shape.parameters


def test_what_goes_with_size_is_judged_seed_by_seed(verdicts):
    cosine = verdicts["the larger the model, the larger at the end: cosine"]
    assert (cosine.verdict, cosine.where) == ("shown", "not in the paper")
    assert cosine.numbers == "rank correlation +1.000 (+1.000 to +1.000); means 0.01, 0.11, 0.21"
    chosen = verdicts["the larger the model, the larger at the end: chosen log-probability, change (nats)"]
    assert chosen.verdict == "not shown"
    ideal = verdicts["the larger the model, the larger at the end: share of ideal pairs"]
    assert ideal.numbers.startswith("rank correlation +0.000")  # all alike


def test_the_norms_are_held_against_the_fall(verdicts):
    # ratios 0.75, 1.25, 1.75; only the larger two fall
    for name in NAMES:
        assert verdicts[f"{name}: both log-probabilities fall exactly where |g_l| > |g_w|"].verdict == "shown"


def test_figures_and_report_from_the_folders_alone(out):
    files = scale_report.redraw(out)
    assert files[0].name == "size.png" and files[-1].name == "report.md"
    rows = (out / "figures" / "size.csv").read_text().splitlines()
    assert len(rows) == 1 + len(NAMES) * 2 * 2 * len(scale_report.MEASURES)
    assert rows[1].startswith("tiny,127488,cosine,after SFT,0,")


def test_a_base_model_that_is_gone_is_named(tmp_path):
    fabricated.sweep(tmp_path, scale.KIND, SMALL, scale.sweep(dataclasses.replace(SMALL, models=("tiny",))), records)
    with pytest.raises(UserError, match="the base model's folder is gone, and with it the size of model tiny"):
        scale_report.redraw(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models"], "--models: at least one is needed"),
        (["--models", "huge"], "--model huge: neither a preset (tiny, mini, small, gpt2) nor a folder"),
        (["--trial.model", "gpt2"], "--trial.model gpt2 has no effect: the sweep sets it itself"),
        (["--preset", "hh-rlhf"], "--preset hh-rlhf: name the data with --trial.data"),
    ],
)
def test_bad_input_ends_in_one_line(fail, tmp_path, words, message):
    assert message in fail(["--no-track", "--out", str(tmp_path / "out"), *words], scale.main)
