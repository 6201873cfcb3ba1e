"""Verdicts on the margin objectives, from numbers that are known; what is not judged is said."""

import dataclasses

import pytest

from experiments import margin_objectives
from experiments.reports import margin_report
from experiments.reports.sweep_tables import read_sweep
from tests.experiments import fabricated

FALLS = {"dpo": -1.0, "cpo": 0.5, "dpop": -0.25}
SETTINGS = dataclasses.replace(margin_objectives.presets()["laptop"], objectives=tuple(FALLS), seeds=2)


def records(config):
    """The larger d_w, the higher the chosen side ends; under dpo both sides move alike, step by step."""
    fall, weight = FALLS[config.objective], {"dpo": 1.0, "dpop": 2.0, "cpo": 20.0}[config.objective]
    found = []
    for step in (0, 1, 2):
        coefficients = {"coefficient/chosen": 0.05 * weight, "coefficient/rejected": 0.05}
        found.append(fabricated.evaluation(step, fall * step, (fall - 0.5) * step, **coefficients))
        moved = {f"probe/realised/{side}": fall * step for side in ("chosen", "rejected")}
        found.append({"step": step + 1, "loss": 1.0, **moved})
    return found


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    out = tmp_path_factory.mktemp("margin")
    fabricated.sweep(out, margin_objectives.KIND, SETTINGS, margin_objectives.sweep(SETTINGS), records)
    return read_sweep(out)


def said(sweep):
    return {verdict.claim: verdict for verdict in margin_report.verdicts(sweep)}


def test_objectives_are_held_against_dpo_and_ranked_by_their_coefficients(sweep):
    found = said(sweep)
    assert found["dpo: chosen and rejected log-probability end on the same side of their start"].verdict == "shown"
    softer = found["cpo: the chosen log-probability ends higher than under dpo"]
    assert (softer.verdict, softer.numbers) == ("shown", "difference +3.000 nats (+3.000 to +3.000)")
    ranked = found["over 3 settings: the larger d_w / d_l, the higher the chosen log-probability ends"]
    assert (ranked.verdict, ranked.numbers) == ("shown", "rank correlation +1.000 (+1.000 to +1.000); seeds 0, 1")


def test_what_lost_a_seed_is_not_judged_and_ranks_are_of_the_seeds_that_all_have(sweep):
    fewer = sweep._replace(groups=sweep.groups | {"cpo": sweep.groups["cpo"].only([1])})
    found = said(fewer)
    assert (found["cpo against dpo"].verdict, found["cpo against dpo"].numbers) == ("not judged", "their seeds differ")
    ranked = found["over 3 settings: the larger d_w / d_l, the higher the chosen log-probability ends"]
    assert ranked.numbers == "rank correlation +1.000; seeds 1"
    none = sweep._replace(groups=fewer.groups | {"dpo": sweep.groups["dpo"].only([0])})
    assert said(none)["d_w / d_l over settings"].numbers == "no seed of all settings is done"
