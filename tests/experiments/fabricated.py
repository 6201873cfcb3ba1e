"""Run folders of a sweep as finished trials leave them, without training."""

from entangle.training import RunFolder
from experiments.pairs.pair_config import identity
from experiments.sweep import folder_of, open_sweep, plan

CASES = ("ideal", "both_fall", "both_rise", "reversed", "inactive")


def evaluation(step, chosen=0.0, rejected=0.0, ideal=0.5, cosine=0.0, **more):
    """What an evaluation logs, of two changes since the start."""
    cases = dict.fromkeys(CASES, 0.0) | {"ideal": ideal, "both_fall": 1 - ideal}
    found = {
        **{f"log_prob/{side}": -5.0 + value for side, value in (("chosen", chosen), ("rejected", rejected))},
        **{f"log_ratio/{side}": value for side, value in (("chosen", chosen), ("rejected", rejected))},
        **{f"coefficient/{side}": 0.05 for side in ("chosen", "rejected")},
        "margin": chosen - rejected,
        "accuracy": float(chosen > rejected),
        "geometry/cosine": cosine,
        **{f"case/{case}": share for case, share in cases.items()},
        **more,
    }
    return {"step": step, **{f"eval/{name}": value for name, value in found.items()}}


def sweep(out, kind, settings, points, records, more=lambda config: {}):
    """Fabricate a sweep; returns its trials.

    records is a function of a trial's configuration to its records: evaluations, and steps (which have a loss); more, to
    what else its run tells of itself.
    """
    open_sweep(out, kind, identity(settings.trial))
    trials = plan(settings.trial, points, identity, out)
    for trial in trials:
        run = RunFolder(
            folder_of(out, trial), {"kind": "preference", "trial": identity(trial.config), **more(trial.config)}
        )
        found = records(trial.config)
        run.append(found)
        looks = [record for record in found if "loss" not in record]
        run.mark_done({"step": found[-1]["step"], "metrics": {}, "first": looks[0], "last": looks[-1]})
    return trials
