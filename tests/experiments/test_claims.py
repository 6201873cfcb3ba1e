import json

import numpy as np

from experiments import claims
from experiments.run_tables import Runs


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
