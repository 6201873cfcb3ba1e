import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import models
from entangle.models.token_statistics import sliced_token_statistics
from tests.toy import draw_pairs

MODEL = models.language_model(models.DecoderConfig(vocab_size=11, max_positions=12, width=8, layers=1, heads=2))
PAIRS = draw_pairs(0, pairs=3, length=9, vocab=11)


@pytest.fixture(scope="module")
def found():
    """Two models far from uniform, and what is said of their tokens."""
    params, reference = (jax.tree.map(lambda x: 4.0 * x, MODEL.init(jax.random.key(seed))) for seed in (0, 1))
    return params, reference, jax.jit(models.token_statistics(MODEL.logits))(params, reference, PAIRS)


def softmax(params):
    logits = np.asarray(MODEL.logits(params, PAIRS.tokens), np.float64)[..., :-1, :]
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def test_log_probs_are_the_models_own(found):
    params, reference, tokens = found
    for mine, p in ((tokens.log_probs, params), (tokens.ref_log_probs, reference)):
        np.testing.assert_allclose(mine, MODEL.token_log_probs(p, PAIRS.tokens), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(tokens.completion_mask, PAIRS.completion_mask)


def test_divergence_and_squares_are_sums_over_the_vocabulary(found):
    params, reference, tokens = found
    p, q = softmax(params), softmax(reference)
    np.testing.assert_allclose(tokens.kl[..., 1:], (q * (np.log(q) - np.log(p))).sum(-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(tokens.log_sum_squares[..., 1:], np.log((p**2).sum(-1)), rtol=1e-5)
    assert float(tokens.kl[..., 1:].min()) > 1e-4
    for field in (tokens.log_probs, tokens.ref_log_probs, tokens.log_sum_squares, tokens.kl):
        assert field.shape == PAIRS.tokens.shape and not np.any(field[..., 0])


def test_a_policy_that_is_its_reference_has_no_divergence():
    params = MODEL.init(jax.random.key(0))
    tokens = models.token_statistics(MODEL.logits)(params, params, PAIRS)
    np.testing.assert_array_equal(tokens.kl, 0.0)
    np.testing.assert_array_equal(tokens.log_probs, tokens.ref_log_probs)


def test_logits_in_half_precision_are_widened_before_they_are_normalised():
    def half(params, tokens):
        return MODEL.logits(params, tokens).astype(jnp.bfloat16)

    def wide(params, tokens):
        return half(params, tokens).astype(jnp.float32)

    params, reference = (jax.tree.map(lambda x: 4.0 * x, MODEL.init(jax.random.key(seed))) for seed in (0, 1))
    left, right = (models.token_statistics(f)(params, reference, PAIRS) for f in (half, wide))
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_vocabulary_that_is_padded_with_minus_infinity_adds_nothing():
    def padded(params, tokens):
        return jnp.where(jnp.arange(14) < 11, jnp.pad(params, (0, 3)), -jnp.inf) + jnp.zeros((*tokens.shape, 1))

    def plain(params, tokens):
        return params + jnp.zeros((*tokens.shape, 1))

    policy, reference = jnp.linspace(0.0, 2.0, 11), jnp.linspace(1.0, 0.0, 11)
    with jax.numpy_rank_promotion("allow"):
        left, right = (models.token_statistics(f)(policy, reference, PAIRS) for f in (padded, plain))
        np.testing.assert_allclose(left.kl, right.kl, rtol=1e-5)
        slopes = jax.grad(lambda p: jnp.sum(models.token_statistics(padded)(p, reference, PAIRS).kl))(policy)
        expected = jax.grad(lambda p: jnp.sum(models.token_statistics(plain)(p, reference, PAIRS).kl))(policy)
    np.testing.assert_allclose(slopes, expected, rtol=1e-4, atol=1e-5)


def test_what_is_certain_stays_finite():
    """Logits of minus a billion: probabilities of exactly 0 in the reference."""

    def unigram(params, tokens):
        return jnp.broadcast_to(params, (*tokens.shape, 11))

    sure = jnp.where(jnp.arange(11) == 3, 0.0, -1e9)
    tokens = models.token_statistics(unigram)(jnp.zeros(11), sure, PAIRS)
    np.testing.assert_allclose(tokens.kl[..., 1:], np.log(11), rtol=1e-6)
    slopes = jax.grad(lambda p: jnp.sum(models.token_statistics(unigram)(p, sure, PAIRS).kl))(jnp.zeros(11))
    assert bool(jnp.all(jnp.isfinite(slopes)))


def test_heads_in_slices_give_the_same_numbers_and_gradients():
    """23 in slices of 6 at most is 4 of 5, and 3 entries left over."""
    rng = np.random.default_rng(0)
    batch = draw_pairs(0, pairs=3, length=9, vocab=23)
    with jax.enable_x64(True):
        hidden = jnp.asarray(rng.standard_normal((3, 2, 9, 4)))
        policy, reference = (jnp.asarray(2 * rng.standard_normal((23, 4))) for _ in range(2))
        weights = jnp.asarray(rng.standard_normal((4, 3, 2, 9)))

        def weighed(statistics, params):
            found = statistics(params, reference, batch)
            said = (found.log_probs, found.ref_log_probs, found.log_sum_squares, found.kl)
            return sum(jnp.sum(w * x) for w, x in zip(weights, said, strict=True)), said

        whole = models.token_statistics(lambda table, tokens: hidden @ table.T)
        sliced = sliced_token_statistics(lambda table, tokens: (hidden, table), chunk=6)
        both = [jax.jit(jax.grad(lambda p, s=s: weighed(s, p), has_aux=True))(policy) for s in (sliced, whole)]
        for one, other in zip(*map(jax.tree.leaves, both), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-12)


def test_a_model_in_slices_has_its_statistics_in_slices(found):
    params, reference, tokens = found
    sliced = models.language_model(MODEL.config, chunk=4)
    for one, other in zip(jax.jit(sliced.token_statistics)(params, reference, PAIRS), tokens, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
