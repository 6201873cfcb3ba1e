import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from entangle import geometry, losses, training
from entangle.errors import UserError
from entangle.models import (
    LORA_PRESETS,
    LoraConfig,
    checksum,
    join_params,
    language_model,
    on_frozen,
    preset,
    split_params,
)
from tests.toy import draw_pairs

SIZES = {"width": 8, "layers": 2, "heads": 4, "key_value_heads": 2, "hidden": 6, "max_positions": 16}
LORA = LoraConfig(rank=2, alpha=4.0, targets=("query", "key", "value"), dropout=0.5)
CONFIG = dataclasses.replace(preset("qwen2_5_0_5b", 7), **SIZES, lora=LORA)


def drawn(config=CONFIG, seed=0):
    """Everything drawn, also the half of the adapters that begins at zero."""
    shapes = jax.eval_shape(language_model(config).init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), shapes)


def test_taken_apart_and_joined_it_is_the_same():
    params = drawn()
    trained, frozen = split_params(params)
    names = {name for layer in trained["layers"].values() for matrix in layer.values() for name in matrix}
    assert names == {"lora_a", "lora_b"} and len(jax.tree.leaves(trained)) == 6
    assert jax.tree.structure(join_params(trained, frozen)) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, join_params(trained, frozen), params)
    begun = on_frozen(language_model(CONFIG), frozen).init(jax.random.key(3))
    assert jax.tree.structure(begun) == jax.tree.structure(trained)
    with pytest.raises(ValueError, match="both trained and frozen"):
        join_params(params, frozen)


def test_without_adapters_there_is_nothing_to_train():
    with pytest.raises(UserError, match="no parameter is trained: the model has no adapters"):
        split_params({"layers": {"kernel": jnp.zeros(2)}})


@pytest.mark.parametrize("seeded", [False, True])
def test_geometry_of_the_trained_part_alone(seeded):
    trained, frozen = split_params(drawn())
    batch = draw_pairs(0, pairs=2)
    if seeded:
        batch = batch._replace(seeds=jnp.arange(4, dtype=jnp.uint32).reshape(2, 2))

    def both(frozen, trained, batch):
        log_probs = on_frozen(language_model(CONFIG), frozen).log_probs
        _, pull_back = geometry.vjp_with_geometry(log_probs, trained, batch)
        return pull_back(jnp.ones(2), jnp.ones(2)), geometry.scan_geometry(log_probs, trained, batch)

    (gradient, found), expected = jax.jit(both)(frozen, trained, batch)
    scale = np.sqrt(np.asarray(expected.chosen_sq_norm) * np.asarray(expected.rejected_sq_norm))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one / scale, other / scale, rtol=0, atol=1e-5)
    assert jax.tree.structure(gradient) == jax.tree.structure(trained)


def test_a_row_that_is_given_a_seed_drops_by_it_and_no_other():
    trained, frozen = split_params(drawn())
    log_probs = jax.jit(lambda batch: on_frozen(language_model(CONFIG), frozen).log_probs(trained, batch))
    batch = draw_pairs(0, pairs=2)
    plain = log_probs(batch)
    one = log_probs(batch._replace(seeds=jnp.array([[1, 2], [3, 4]], jnp.uint32)))
    other = log_probs(batch._replace(seeds=jnp.array([[1, 2], [3, 5]], jnp.uint32)))
    assert np.all(np.abs(one - plain) > 1e-4)
    np.testing.assert_array_equal((one == other), [[True, True], [True, False]])


def test_a_step_moves_adapters_and_leaves_the_base():
    trained, frozen = split_params(drawn())
    batch = draw_pairs(0, pairs=2)
    tx = optax.chain(training.pair_chain("margin").head, optax.sgd(0.1))

    def step(frozen, state, examples):
        policy = on_frozen(language_model(CONFIG), frozen).log_probs
        gradients = training.preference_gradients(policy, losses.dpo, reference=training.adapter_off())
        return training.make_step(gradients, tx, optax.constant_schedule(0.1), policy)(state, examples)

    memory = training.preference_memory(losses.dpo, trained, training.adapter_off())
    state = training.init_state(trained, tx, memory)
    after, result = jax.jit(step)(frozen, state, training.PreferenceExamples(batch))
    base = language_model(dataclasses.replace(CONFIG, lora=None)).log_probs(frozen, batch)
    policy = language_model(CONFIG).log_probs(join_params(trained, frozen), batch)
    ratios = policy - base
    np.testing.assert_allclose(
        result.losses, -jax.nn.log_sigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])), rtol=0, atol=1e-5
    )
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.params, trained)
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: -x,
        lambda x: 2 * x,
        lambda x: x.at[0].set(-x[0]),
        lambda x: x[::-1],
        lambda x: x.T,
        lambda x: x.at[3, 4].multiply(1.01),
        lambda x: x.at[0].set(x[1]).at[1].set(x[0]),
    ],
    ids=["negated", "doubled", "one row negated", "turned round", "transposed", "one entry", "two rows swapped"],
)
def test_every_change_has_another_checksum(change, dtype):
    x = jax.random.normal(jax.random.key(0), (8, 8)).astype(dtype)
    assert checksum({"x": x}) == checksum({"x": jnp.array(x)}) != checksum({"x": change(x).astype(dtype)})


@pytest.mark.usefixtures("x64")
def test_all_bits_of_wide_numbers_are_seen():
    x = jax.random.normal(jax.random.key(0), (8, 8), jnp.float64)
    assert len({checksum({"x": y}) for y in (x, x * (1 + 2**-50), -x, 2 * x)}) == 4


def test_query_key_and_value_of_one_matrix_are_its_names_together():
    gpt2 = dataclasses.replace(preset("tiny", 7), lora=LORA_PRESETS["paper"])
    trained, _ = split_params(language_model(gpt2).init(jax.random.key(0)))
    assert {matrix for layer in trained["layers"].values() for matrix in layer["attention"]} == {"qkv"}
    part = dataclasses.replace(gpt2, lora=dataclasses.replace(gpt2.lora, targets=("query", "value")))
    with pytest.raises(UserError, match="no matrix of this decoder is called 'query'"):
        language_model(part).init(jax.random.key(0))
