"""Objectives of rows in training: gradients against plain autodiff, geometry against norms, masks that are learned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from entangle import losses, models, training, transforms
from entangle.training.row_objectives import masked_rows, row_gradients
from entangle.types import PairBatch
from tests.toy import draw_pairs, draw_params, flatten

CONFIG = models.DecoderConfig(vocab_size=20, max_positions=12, width=8, layers=1, heads=2)
MODEL = models.language_model(CONFIG)
STATISTICS = models.token_statistics(MODEL.logits)
RATE = jnp.asarray(0.1, jnp.float32)
PAIRS = draw_pairs(0, pairs=4, length=10, vocab=7)


def toy_hidden(params, tokens):
    return jnp.tanh(params["embed"][tokens])


def toy_logits(params, tokens):
    return toy_hidden(params, tokens) @ params["out"]


TOY = models.token_statistics(toy_logits)


def toy_log_probs(params, batch):
    return jnp.sum(jnp.where(batch.completion_mask, TOY(params, params, batch).log_probs, 0.0), axis=-1)


def start(seed):
    return {name: x for name, x in draw_params("mlp", seed, jnp.float64, hidden=5).items() if name in ("embed", "out")}


def masked(rows):
    return losses.masked_dpo(*rows, beta=0.5, sparsity=0.01)


def cases():
    """Name -> rows function, objective, parameters of the policy and of the reference."""
    found = {
        name: (TOY, functools.partial(o, beta=0.5), start(0), start(1)) for name, o in losses.TOKEN_OBJECTIVES.items()
    }
    with_mask = [
        {"policy": start(seed), "mask": losses.MaskParams(0.3 * jnp.arange(5.0), jnp.asarray(0.2))} for seed in (0, 1)
    ]
    return found | {"masked_dpo": (masked_rows(TOY, toy_hidden), masked, *with_mask)}


@pytest.mark.parametrize("name", [*losses.TOKEN_OBJECTIVES, "masked_dpo"])
@pytest.mark.usefixtures("x64")
def test_gradients_equal_plain_autodiff_of_the_mean_loss(name):
    rows_fn, objective, params, ref = cases()[name]
    params, ref = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, ref))
    reference = training.frozen_copy()
    memory = training.preference_memory(objective, ref, reference)
    examples = training.PreferenceExamples(PAIRS)
    plain = jax.jit(jax.grad(lambda p: jnp.mean(objective(rows_fn(p, ref, PAIRS)))))(params)
    for with_geometry in (True, False):
        fn = row_gradients(rows_fn, objective, reference, with_geometry=with_geometry)
        result = jax.jit(fn)(params, examples, RATE, memory)
        combined = jax.tree.map(lambda w, l: l - w, result.gradients.chosen, result.gradients.rejected)
        np.testing.assert_allclose(flatten(combined), flatten(plain), rtol=1e-8, atol=1e-11)
        np.testing.assert_allclose(result.losses, objective(rows_fn(params, ref, PAIRS)), rtol=1e-9)
    assert np.max(np.abs(flatten(plain))) > 1e-4


@pytest.mark.parametrize("name", ["tdpo1", "masked_dpo"])
@pytest.mark.usefixtures("x64")
def test_weighed_geometry_is_that_of_the_two_sides_own_gradients(name):
    rows_fn, objective, params, ref = cases()[name]
    params, ref = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, ref))
    reference = training.frozen_copy()
    memory = training.preference_memory(objective, ref, reference)
    result = jax.jit(row_gradients(rows_fn, objective, reference))(
        params, training.PreferenceExamples(PAIRS), RATE, memory
    )
    alone = jax.jit(row_gradients(rows_fn, objective, reference, with_geometry=False))
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], PAIRS)
        apart = alone(params, training.PreferenceExamples(one), RATE, memory)
        g_w, g_l = (flatten(g) for g in apart.gradients)
        np.testing.assert_allclose(result.metrics["weighed/geometry/chosen_norm"][i], np.linalg.norm(g_w), rtol=1e-8)
        np.testing.assert_allclose(
            result.metrics["weighed/geometry/inner_product"][i], g_w @ g_l, rtol=1e-7, atol=1e-12
        )


@pytest.mark.usefixtures("x64")
def test_ld_dpo_at_alpha_1_is_dpo():
    params, ref = start(0), start(1)
    reference = training.frozen_copy()
    objective = functools.partial(losses.ld_dpo, alpha=1.0)
    memory = training.preference_memory(objective, ref, reference)
    examples = training.PreferenceExamples(PAIRS)
    rows = jax.jit(row_gradients(TOY, objective, reference))(params, examples, RATE, memory)
    plain = training.preference_gradients(toy_log_probs, losses.dpo, reference=reference)
    whole = jax.jit(plain)(params, examples, RATE, memory)
    np.testing.assert_allclose(rows.losses, whole.losses, rtol=1e-9)
    np.testing.assert_allclose(flatten(rows.gradients), flatten(whole.gradients), rtol=1e-7, atol=1e-12)
    # the coefficients are in the weighed gradients already
    norm = whole.metrics["coefficient/chosen"] * whole.metrics["geometry/chosen_norm"]
    np.testing.assert_allclose(rows.metrics["weighed/geometry/chosen_norm"], norm, rtol=1e-8)


def contrast_pairs(seed, count=16):
    """A prompt, one of two contrasting labels, and six tokens that both sides share."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, 20, size=(count, 1, 9)).repeat(2, 1)
    first = rng.integers(0, 2, size=count)
    tokens[:, 0, 2], tokens[:, 1, 2] = first, 1 - first
    tokens[:, :, 1] = (first + 2)[:, None]  # the prompt says which label is right
    mask = np.broadcast_to(np.arange(9) >= 2, tokens.shape)
    return PairBatch(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))


def trained_masks(sparsity, least_share, steps=80):
    """Masks of pairs not trained on, after joint training with the policy; and which of their tokens are which."""
    params = {"policy": MODEL.init(jax.random.key(0)), "mask": losses.init_mask(8)}
    reference, rows_fn = training.frozen_copy(), masked_rows(STATISTICS, MODEL.hidden_states)

    def objective(rows):
        return losses.masked_dpo(*rows, sparsity=sparsity, least_share=least_share)

    gradients = row_gradients(rows_fn, objective, reference, with_geometry=False)
    faster = optax.multi_transform(
        {"policy": optax.adam(2e-3), "mask": optax.adam(0.1)}, {"policy": "policy", "mask": "mask"}
    )
    tx = optax.chain(transforms.combine_pair(transforms.margin()), faster)
    step = jax.jit(training.make_step(gradients, tx, optax.constant_schedule(2e-3)))
    state = training.init_state(params, tx, training.preference_memory(objective, params, reference))
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam relies on it
        for i in range(steps):
            state, _ = step(state, training.PreferenceExamples(contrast_pairs(i)))
    held_out = contrast_pairs(1000)
    masks = losses.token_masks(state.params["mask"], MODEL.hidden_states(state.params["policy"], held_out.tokens))
    contrast = np.asarray(losses.oracle_masks(held_out)) == 1
    return np.asarray(masks), contrast, np.asarray(held_out.completion_mask) & ~contrast


def test_masks_trained_with_the_policy_let_go_of_shared_tokens_and_keep_the_contrast():
    """Nobody told the masks which tokens both sides share. One of the two labels is enough to tell a pair apart."""
    masks, contrast, shared = trained_masks(sparsity=0.005, least_share=0.15)
    assert masks[shared].max() < 0.1
    assert (np.where(contrast, masks, 0).max(axis=(1, 2)) > 0.9).all()


def test_without_the_l1_term_masks_are_not_sparse():
    masks, _, shared = trained_masks(sparsity=0.0, least_share=0.0)
    assert masks[shared].mean() > 0.5


@pytest.mark.parametrize("name", ["ld_dpo", "tdpo1"])
@pytest.mark.usefixtures("x64")
def test_a_pair_rule_makes_every_pair_of_a_token_objective_ideal(name):
    """Of the two weighed rows: with PCGrad neither side of a pair's own gradient step moves the wrong way."""
    rows_fn, objective, params, ref = cases()[name]
    params, ref = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, ref))
    reference = training.frozen_copy()
    memory = training.preference_memory(objective, ref, reference)
    # the rejected response is the chosen one, gone on with: the same tokens, and more of them
    tokens = PAIRS.tokens.at[:, 1].set(PAIRS.tokens[:, 0])
    place = jnp.arange(10)
    mask = jnp.stack([(place >= 3) & (place < end) for end in (6, 10)])
    examples = training.PreferenceExamples(PairBatch(tokens, jnp.broadcast_to(mask, tokens.shape)))

    def metrics(rule):
        return jax.jit(row_gradients(rows_fn, objective, reference, pair_rule=rule))(params, examples, RATE, memory)

    plain, mended = metrics(None), metrics(transforms.per_pair(transforms.pcgrad()))
    assert np.all(mended.metrics["weighed/predicted/chosen"] >= 0)
    assert np.all(mended.metrics["weighed/predicted/rejected"] <= 0)
    s = [plain.metrics[f"weighed/geometry/{key}"] for key in ("chosen_norm", "rejected_norm", "inner_product")]
    # 1 + max(e, 0) / a times each side's gradient; what is promised is not kept by the plain one in every pair
    x = 1 + np.maximum(s[2], 0) / np.asarray(s[0]) ** 2
    np.testing.assert_allclose(
        mended.metrics["weighed/predicted/chosen"],
        float(RATE) * (x * s[0] ** 2 - (1 + np.maximum(s[2], 0) / np.asarray(s[1]) ** 2) * s[2]),
        rtol=1e-8,
        atol=1e-12,
    )
    assert not np.all(
        (plain.metrics["weighed/predicted/chosen"] >= 0) & (plain.metrics["weighed/predicted/rejected"] <= 0)
    )


def test_a_pair_rule_without_geometry_is_refused():
    rule = transforms.per_pair(transforms.pcgrad())
    with pytest.raises(ValueError, match="needs the geometry"):
        row_gradients(STATISTICS, losses.tdpo1, training.frozen_copy(), with_geometry=False, pair_rule=rule)
