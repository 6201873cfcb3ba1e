"""What a step says of itself does not change what it does: a decoder trained with and without, in the precisions of use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from entangle import geometry, losses, transforms
from entangle.models import DecoderConfig, language_model
from entangle.training.gradients import PreferenceExamples, preference_gradients
from entangle.training.step import init_state, make_step
from entangle.types import PairBatch
from tests.toy import flatten

MODEL = language_model(DecoderConfig(vocab_size=61, max_positions=16, width=16, layers=1, heads=2))
STEPS = 6


@functools.cache
def _start():
    return jax.device_get(jax.jit(MODEL.init)(jax.random.key(0)))


def _examples(seed):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(MODEL.config.vocab_size, size=(4, 2, 12), dtype=np.int32)
    position = np.arange(12)
    mask = (position >= draw.integers(3, 6, (4, 1, 1))) & (position < draw.integers(7, 13, (4, 2, 1)))
    return PreferenceExamples(
        PairBatch(jnp.asarray(tokens), jnp.asarray(mask)), jnp.asarray(draw.normal(-40, 3, (4, 2)))
    )


@functools.cache
def _train(name="adamw", dtype="float32", with_geometry=False, says=False, batch_changes=False, every=1):
    """Final parameters and the metrics of every step, as host arrays."""
    schedule = optax.linear_schedule(1e-3 if name == "adamw" else 1e-2, 0.0, STEPS)
    rule = optax.adamw(schedule) if name == "adamw" else optax.sgd(schedule)
    if every > 1:
        rule = optax.MultiSteps(rule, every).gradient_transformation()
    tx = optax.chain(transforms.combine_pair(transforms.margin()), rule)
    gradients = preference_gradients(MODEL.log_probs, losses.dpo, with_geometry=with_geometry)
    step = jax.jit(make_step(gradients, tx, schedule, MODEL.log_probs if says else None, batch_changes=batch_changes))
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), _start())
    state, metrics = init_state(params, tx), []
    for seed in range(STEPS):
        example = _examples(seed)
        reference = example.reference.astype(jnp.float32)
        state, result = step(state, example._replace(reference=reference), _examples(99).pairs if says else None)
        metrics.append({key: float(value) for key, value in result.metrics.items()})
    return jax.device_get(state.params), metrics


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_changes_on_and_off_give_the_same_parameters_bit_for_bit(dtype):
    silent, _ = _train("adamw", dtype)
    said, metrics = _train("adamw", dtype, says=True, batch_changes=True)
    jax.tree.map(np.testing.assert_array_equal, silent, said)
    assert {"agreement/first_order", "probe/agreement/first_order"} <= metrics[0].keys()
    assert "agreement/predicted" not in metrics[0]


def test_geometry_on_and_off_give_the_same_parameters():
    plain, _ = _train()
    exact, metrics = _train(with_geometry=True, says=True, batch_changes=True)
    moved = flatten(plain) - flatten(_start())
    assert np.abs(moved).max() > 1e-3
    np.testing.assert_allclose(flatten(exact), flatten(plain), rtol=1e-6, atol=1e-6)
    assert "agreement/predicted" in metrics[0]


def test_bfloat16_parameters_have_their_geometry_in_float32():
    """The same run in float32 at the rounded parameters is as close as bfloat16's eight bits let it be."""
    _, half = _train(dtype="bfloat16", with_geometry=True)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), _start())
    s = jax.jit(geometry.pair_geometry, static_argnums=0)(MODEL.log_probs, rounded, _examples(0).pairs)
    norms = np.sqrt(s.chosen_sq_norm)
    np.testing.assert_allclose(half[0]["geometry/chosen_norm"], norms.mean(), rtol=0.02)


def test_accumulation_moves_the_parameters_at_every_other_step():
    params, metrics = _train("sgd", with_geometry=True, says=True, batch_changes=True, every=2)
    for index, of_step in enumerate(metrics):
        assert (of_step["update_norm"] > 0) == (index % 2 == 1)
        assert (of_step["realised/chosen"] != 0) == (index % 2 == 1)
        assert of_step["geometry/chosen_norm"] > 0 and of_step["predicted/rejected"] != 0
    again, _ = _train("sgd", every=2)
    np.testing.assert_allclose(flatten(params), flatten(again), rtol=1e-6, atol=1e-6)
