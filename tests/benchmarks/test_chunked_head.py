"""The contenders of the head's benchmark do the same work, at a small size."""

import numpy as np
import pytest

from scripts.benchmarks import chunked_head

SIZE = {"vocabulary": 1000, "length": 32, "pairs": 1, "width": 4, "chunk": 64}


def test_the_sides_agree_and_slices_need_less_memory():
    sides = chunked_head.contenders(**SIZE)
    assert [side.name for side in sides] == ["completions", "slices", "whole"]
    losses = [side.run() for side in sides]
    np.testing.assert_allclose(losses, losses[2], rtol=1e-5)
    completions, slices, whole = (side.memory for side in sides)
    assert completions < slices < whole / 2


def test_other_log_probs_are_noticed(monkeypatch):
    right = chunked_head.completion_log_probs
    off = lambda *a, chunk=None, **lengths: right(*a, chunk=chunk, **lengths) * (1 if chunk is None else 1.01)  # noqa: E731
    monkeypatch.setattr(chunked_head, "completion_log_probs", off)
    with pytest.raises(AssertionError):
        chunked_head.contenders(**SIZE)
