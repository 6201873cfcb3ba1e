import json

import numpy as np

from experiments.reports import claims
from experiments.reports.run_tables import Runs


def test_identical_tokens_are_found_from_the_right_where_labels_differ_in_length(tmp_path):
    block = np.full((4, 3), -0.9)
    block[2, 1] = block[3, 2] = 0.9  # " sentiment" against " sentiment", "." against "."
    record = {
        "chosen": [" very", " good", " sentiment", "."],
        "rejected": [" bad", " sentiment", "."],
        "cosines": {"after SFT": block.tolist(), "after preference optimisation": (-block).tolist()},
    }
    folder = tmp_path / "short_suffix" / "seed0"
    folder.mkdir(parents=True)
    (folder / "token_cosines.json").write_text(json.dumps(record))
    contrast, same = claims._tokens(Runs({}, {"short_suffix": []}), tmp_path)
    assert (contrast.verdict, same.verdict) == ("shown (one pair)", "shown (one pair)")
    assert contrast.numbers == "-0.900 after SFT, +0.900 after preference optimisation"
    assert same.numbers == "mean +0.900 after SFT, mean -0.900 after preference optimisation"


def _seed(rows):
    """Records of as many steps as there are changes, the same on both sides."""
    return [
        {
            "step": step,
            **{f"probe/{kind}/{side}": value for side in ("chosen", "rejected") for kind, value in row.items()},
        }
        for step, row in enumerate(rows)
    ]


def test_checks_count_the_steps_whose_sign_is_right():
    right, wrong = {"first_order": 1.0, "realised": 0.5}, {"first_order": -1.0, "realised": 0.5}
    signs, margin = claims.checks(Runs({}, {"a": [_seed([right, wrong]), _seed([right, right])]}))
    assert signs.verdict == "in 1 of 2 seeds" and signs.numbers == "share of steps 0.750 (0.500 to 1.000)"
    assert margin.verdict == "not shown"  # both sides move alike


def test_checks_leave_out_what_was_not_recorded():
    assert claims.checks(Runs({}, {"a": [[{"step": 0, "loss": 1.0}]]})) == []
