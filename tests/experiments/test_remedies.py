"""The sweep over remedies: its points, its verdicts from numbers that are known, and a shrunk run of its command line."""

import dataclasses

import numpy as np
import pytest

from entangle.errors import UserError
from experiments import remedies
from experiments.reports import remedies_figures, remedies_report
from experiments.reports.sweep_tables import Group, read_sweep
from tests.experiments import fabricated

SMALL = dataclasses.replace(
    remedies.presets()["laptop"], chains=("margin", "one_sided"), objectives=("dpo", "simpo"), seeds=2
)


def test_a_rule_with_a_length_of_its_own_has_its_own_rate_under_sgd():
    settings = dataclasses.replace(
        SMALL, chains=("margin", "pairwise_normalized"), sgd_factors={"pairwise_normalized": 3.0}
    )
    rates = {
        (p["pair_chain"], p["preference.optimizer.name"]): p["preference.optimizer.learning_rate"]
        for p in remedies.sweep(settings)
        if p["objective"] == "dpo" and "masks" not in p
    }
    sgd, adamw = settings.learning_rates
    assert rates == {
        ("margin", "sgd"): sgd,
        ("margin", "adamw"): adamw,
        ("pairwise_normalized", "sgd"): 3 * sgd,
        ("pairwise_normalized", "adamw"): adamw,
    }


def test_an_objective_beside_has_its_own_rate_under_sgd():
    settings = dataclasses.replace(
        SMALL, beside=("cpo",), sgd_factors={"cpo": 0.5, "margin": 2.0}, chains=("margin", "one_sided")
    )
    rates = {
        p["objective"]: p["preference.optimizer.learning_rate"]
        for p in remedies.sweep(settings)
        if p["pair_chain"] == "margin" and p["preference.optimizer.name"] == "sgd" and "masks" not in p
    }
    sgd = settings.learning_rates[0]
    assert rates == {"dpo": 2 * sgd, "simpo": 2 * sgd, "cpo": 0.5 * sgd}


def test_objectives_beside_are_by_margin_alone():
    points = list(remedies.sweep(SMALL))
    assert len(points) == (2 * 2 + 3 + 2) * 2 * 2
    assert {p["pair_chain"] for p in points if p["objective"] in SMALL.beside} == {"margin"}


def test_masks_are_by_margin_alone_and_learned_by_dpo_alone():
    points = [p for p in remedies.sweep(dataclasses.replace(SMALL, sgd_factors={"oracle": 2.0})) if "masks" in p]
    assert {(p["objective"], p["masks"]) for p in points} == {
        ("dpo", "oracle"),
        ("dpo", "learned"),
        ("simpo", "oracle"),
    }
    assert {p["pair_chain"] for p in points} == {"margin"}
    sgd = SMALL.learning_rates[0]
    rates = {
        p["masks"]: p["preference.optimizer.learning_rate"] for p in points if p["preference.optimizer.name"] == "sgd"
    }
    assert rates == {"oracle": 2 * sgd, "learned": sgd}


def records(config):
    """one_sided keeps the chosen side under SGD and lowers it by half as much as margin does under AdamW.

    Learned masks come to leave out shared tokens under AdamW, and all tokens alike under SGD.
    """
    sgd, mended = config.preference.optimizer.name == "sgd", config.pair_chain == "one_sided"
    slope = {(True, True): 0.5, (False, True): -0.5}.get((sgd, mended), -1.0) * (1 + 0.1 * config.seed)
    masks = {"mask/shared": 0.3 if sgd else 0.2, "mask/differing": 0.5} if config.masks == "learned" else {}
    found = [fabricated.evaluation(0, **masks)]
    for step in (1, 2):
        found.append({"step": step, "loss": 1.0, "probe/realised/chosen": slope, "probe/realised/rejected": -2.0})
        found.append(fabricated.evaluation(step, slope * step, (slope - 1) * step, **masks))
    return found


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("remedies")
    fabricated.sweep(out, remedies.KIND, SMALL, remedies.sweep(SMALL), records)
    return out


@pytest.fixture(scope="module")
def verdicts(out):
    return {v.claim: v for v in remedies_report.verdicts(remedies_figures.panels(read_sweep(out)))}


def test_panels_are_by_objective_and_optimizer_and_margin_comes_first(out):
    panels = remedies_figures.panels(read_sweep(out))
    assert {o: list(by) for o, by in panels.items()} == {"dpo": ["sgd", "adamw"], "simpo": ["sgd", "adamw"]}
    assert list(panels["dpo"]["sgd"])[:2] == ["margin", "one_sided"]
    assert set(panels["dpo"]["sgd"]) == {"margin", "one_sided", "learned masks", "oracle masks", "dpop", "cpo"}
    assert set(panels["simpo"]["sgd"]) == {"margin", "one_sided", "oracle masks"}


def test_a_remedy_is_held_against_margin_seed_by_seed(verdicts):
    # two steps of +0.5 against two of -1, a tenth more in the second seed: +3 and +3.3; margins grow by 1 a step for both
    found = verdicts["dpo, sgd: under one_sided the chosen log-probability ends higher than under margin"]
    assert (found.verdict, found.numbers) == ("shown", "difference +3.150 nats (+3.000 to +3.300)")
    alike = verdicts["dpo, sgd: under one_sided it is higher also where margins are alike"]
    assert alike.numbers == found.numbers
    assert (
        verdicts["dpo, sgd: under dpop the chosen log-probability ends higher than under margin"].verdict == "not shown"
    )


def test_learned_masks_are_judged_by_what_they_leave_out(verdicts):
    claim = "learned masks let go of what both share (here: to half of the rest)"
    assert verdicts[f"dpo, sgd: {claim}"].verdict == "not shown"
    adamw = verdicts[f"dpo, adamw: {claim}"]
    assert adamw.verdict == "shown"
    assert adamw.numbers == "mean mask 0.200 (0.200 to 0.200) on these tokens, 0.500 (0.500 to 0.500) on others"
    oracle = verdicts["dpo, sgd: under oracle masks the chosen log-probability ends higher than under margin"]
    assert oracle.verdict == "not shown"


def test_what_is_kept_is_counted_over_seeds_and_objectives(verdicts):
    sgd, adamw = (
        verdicts[f"one_sided, {optimizer}: no step lowers the probe's chosen log-probability"]
        for optimizer in ("sgd", "adamw")
    )
    assert sgd.verdict == "shown"
    assert sgd.numbers.startswith("share of steps that do not 1.000 (1.000 to 1.000); under margin 0.000")
    assert adamw.verdict == "not shown"
    added = verdicts["one_sided: fewer steps lower it than under margin, and SGD gains more of them than AdamW"]
    assert added.verdict == "shown"


def group(margins, chosens):
    steps = range(len(margins))
    found = [
        {"step": s, "eval/margin": m, "eval/log_prob/chosen": c}
        for s, m, c in zip(steps, margins, chosens, strict=True)
    ]
    return Group({}, [0], [found])


def test_margins_are_made_alike_along_a_straight_line():
    slow, fast = group([1.0, 1.5, 2.0], [0.0, -0.1, -0.3]), group([1.0, 3.0], [0.0, -2.0])
    # at a growth of 1: -0.3 against half of -2
    np.testing.assert_allclose(remedies_report.at_like_margins(slow, fast), [0.7])
    assert np.isnan(remedies_report.at_like_margins(group([1.0, 0.5], [0.0, 0.0]), fast)).all()


def test_margins_are_read_where_they_first_came_so_far_and_hardly_grown_ones_not_at_all():
    back, straight = group([0.0, 3.0, 1.0], [0.0, -5.0, -0.5]), group([0.0, 4.0], [0.0, -8.0])
    # the smaller end is 1: the one is first there a third of the way to 3, the other a quarter of the way to 4
    np.testing.assert_allclose(remedies_report.at_like_margins(back, straight), [-5 / 3 + 8 / 4])
    np.testing.assert_allclose(remedies_report.at_like_margins(straight, back), [-8 / 4 + 5 / 3])
    hardly = group([0.0, 0.9], [0.0, 0.0])
    assert np.isnan(remedies_report.at_like_margins(hardly, straight)).all()
    assert np.isfinite(remedies_report.at_like_margins(straight, hardly)).all()


def test_settings_of_one_remedy_stay_apart_and_are_not_compared(tmp_path):
    points = [point | {"preference.steps": steps} for point in remedies.sweep(SMALL) for steps in (2, 3)]
    points = [p for p in points if p["pair_chain"] == "margin" or p["preference.steps"] == 2]
    fabricated.sweep(tmp_path, remedies.KIND, SMALL, points, records)
    sweep = read_sweep(tmp_path)
    panels = remedies_figures.panels(sweep)
    drawn = [
        group for by_optimizer in panels.values() for methods in by_optimizer.values() for group in methods.values()
    ]
    assert len(drawn) == len(sweep.groups)
    assert "margin" not in panels["dpo"]["sgd"]
    found = {v.claim: v for v in remedies_report.verdicts(panels)}
    one = found["dpo, sgd: one_sided against margin"]
    assert (one.verdict, one.numbers) == ("not judged", "there is no single plain margin")


def test_a_remedy_that_lost_a_seed_is_not_judged(out):
    panels = remedies_figures.panels(read_sweep(out))
    methods = panels["dpo"]["sgd"]
    panels["dpo"]["sgd"] = methods | {"one_sided": methods["one_sided"].only([1])}
    found = {v.claim: v for v in remedies_report.verdicts(panels)}
    assert found["dpo, sgd: one_sided against margin"].verdict == "not judged"
    added = found["one_sided: fewer steps lower it than under margin, and SGD gains more of them than AdamW"]
    # of dpo seed 1 alone, of simpo both: all of the steps under SGD, none under AdamW
    assert added.numbers == "gained, in shares of steps: SGD +1.000 (+1.000 to +1.000), AdamW +0.000 (+0.000 to +0.000)"
    assert added.verdict == "shown"


def test_figures_and_report_from_the_folders_alone(out):
    files = remedies_report.redraw(out)
    assert [file.name for file in files] == ["changes.png", "trade_off.png", "shares.png", "report.md"]
    text = files[-1].read_text()
    assert "| one_sided, sgd: no step lowers" in text
    changes = (out / "figures" / "changes.csv").read_text().splitlines()
    assert changes[0] == "objective,optimizer,remedy,series,seed,value"
    methods = {(p["objective"], p["pair_chain"], p.get("masks")) for p in remedies.sweep(SMALL)}
    assert len(changes) == 1 + 2 * 2 * len(methods) * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chains"], "--chains: at least one is needed"),
        (["--chains", "magic"], "unknown pair chain 'magic'"),
        (["--masks", "magic"], "unknown masks 'magic'"),
        (["--objectives", "dpoo"], "unknown objective 'dpoo' (did you mean dpo?)"),
        (["--sgd-factors", "rrhf", "2"], "--sgd-factors rrhf: it is not among --chains, --masks or --beside"),
        (["--objectives", "simpo"], "--masks learned: dpo trains them, and is not among --objectives"),
        (
            ["--optimizers", "sgd", "--learning-rates", "0.1", "0.2"],
            "--learning-rates: one is needed for every one of --optimizers, not 2 for 1",
        ),
        (["--optimizers", "adam", "--learning-rates", "0.1"], "unknown optimizer 'adam'"),
        (["--trial.objective", "ipo"], "--trial.objective ipo has no effect: the sweep sets it itself"),
        (["--trial.preference.optimizer.learning-rate", "0.1"], "has no effect: the sweep sets it itself"),
        (["--preset", "tweets"], "--preset tweets: name the data with --trial.data"),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(fail, tmp_path, words, message):
    out = tmp_path / "out"
    assert message in fail(["--no-track", "--out", str(out), *words], remedies.main)
    assert not out.exists()


def test_a_folder_without_a_sweep_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        remedies_report.redraw(tmp_path)
