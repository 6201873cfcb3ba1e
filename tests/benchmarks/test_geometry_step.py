"""The contenders of the geometry benchmark do the same work, at a small size."""

import jax
import numpy as np
import pytest

from entangle import geometry
from entangle.models import DecoderConfig
from scripts.benchmarks import geometry_step, qwen

GPT2 = geometry_step.gpt2(DecoderConfig(vocab_size=101, max_positions=16, width=16, layers=1, heads=2))
QWEN = geometry_step.qwen_sized(qwen.QwenConfig(vocab_size=101, width=16, layers=1, heads=4, hidden=24))


@pytest.fixture(autouse=True)
def plain_functions_promote_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


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


def test_the_plain_function_has_the_size_it_stands_for():
    count = lambda config: sum(  # noqa: E731
        leaf.size for leaf in jax.tree.leaves(jax.eval_shape(geometry_step.qwen_sized(config).init, jax.random.key(0)))
    )
    # its model card: 0.49 billion, 0.36 billion of them not in the embedding
    assert round(count(None) / 1e9, 2) == 0.49
    assert round((count(None) - 151_936 * 896) / 1e9, 2) == 0.36


def test_the_plain_function_sees_no_later_token():
    params = QWEN.init(jax.random.key(0))
    batch = geometry_step.draw_examples(101, 2, 8).pairs
    later = batch._replace(tokens=batch.tokens.at[..., -1].set((batch.tokens[..., -1] + 1) % 101))
    seen = [
        jax.jit(QWEN.log_probs)(params, b._replace(completion_mask=b.completion_mask.at[..., -1].set(False)))
        for b in (batch, later)
    ]
    np.testing.assert_array_equal(*seen)
