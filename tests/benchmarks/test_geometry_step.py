"""The contenders of the geometry benchmark do the same work, at a small size."""

import dataclasses

import jax
import numpy as np
import pytest

from entangle import geometry
from entangle.models import DecoderConfig, preset
from scripts.benchmarks import geometry_step

GPT2 = geometry_step.decoder(DecoderConfig(vocab_size=101, max_positions=16, width=16, layers=1, heads=2))
QWEN = geometry_step.decoder(dataclasses.replace(preset("qwen2_5_0_5b", 101), width=16, layers=1, heads=4, hidden=24))


@pytest.mark.parametrize(
    ("model", "dtype"), [(GPT2, "float32"), pytest.param(QWEN, "bfloat16", marks=pytest.mark.slow)]
)
def test_the_sides_agree_and_their_memory_is_known(model, dtype):
    sides = geometry_step.contenders(model, 3, 16, dtype)
    assert [side.name for side in sides] == ["geometry", "plain", "apart", "scan"]
    losses = [side.run() for side in sides]
    np.testing.assert_allclose(losses, losses[1], rtol=1e-5 if dtype == "float32" else 1e-3)
    assert abs(losses[1] - np.log(2)) > 1e-4  # not the loss of equal log-ratios
    assert all(side.memory > 0 for side in sides)


def test_other_geometry_is_noticed(monkeypatch):
    right = geometry.scan_geometry
    monkeypatch.setattr(geometry, "scan_geometry", lambda *a: jax.tree.map(lambda s: 1.01 * s, right(*a)))
    with pytest.raises(AssertionError):
        geometry_step.contenders(GPT2, 3, 16)


def test_the_decoder_has_the_size_it_stands_for():
    shapes = jax.eval_shape(geometry_step.qwen().init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    # its model card: 0.49 billion, 0.36 billion of them not in the embedding
    assert round(count / 1e9, 2) == 0.49
    assert round((count - 151_936 * 896) / 1e9, 2) == 0.36
