"""The token Gram against gradients of tokens taken one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import geometry
from entangle.geometry import tokens as geometry_tokens
from entangle.types import PairBatch
from tests import zoo
from tests.toy import draw_pairs, flatten

MODELS = ("gpt, tied", "llama, scanned and checkpointed", "low-rank adapters")


def naive(tokens_fn, params, tokens, positions):
    def gradient(side, position):
        return flatten(jax.grad(lambda p: tokens_fn(p, tokens[None])[0, side, position])(params))

    zero = np.zeros_like(flatten(params))
    g = [gradient(side, p) if p >= 0 else zero for side in (0, 1) for p in positions[side]]
    return (np.stack(g) @ np.stack(g).T).reshape(2, len(positions[0]), 2, len(positions[0]))


def by_token(log_prob_fn):
    """A model of the zoo with ``select`` replaced, so that one forward gives every token's log-probability."""

    def tokens_fn(params, tokens):
        found = {}

        def keep(logits, batch):
            log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits[..., :-1, :]), tokens[..., 1:, None], -1)[..., 0]
            found["tokens"] = jnp.concatenate([jnp.zeros_like(log_probs[..., :1]), log_probs], -1)
            return jnp.sum(log_probs, -1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zoo, "select", keep)
            log_prob_fn(params, PairBatch(tokens, jnp.ones(tokens.shape, bool)))
        return found["tokens"]

    return tokens_fn


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("x64")
def test_token_gram_equals_gradients_one_by_one(name):
    log_prob_fn, params = zoo.whole_models(jnp.float64)[name]
    tokens_fn = by_token(log_prob_fn)
    tokens = draw_pairs(0).tokens[1]
    positions = [[2, 3, 7], [4, 1, -1]]
    gram = jax.jit(lambda p: geometry.token_gram(tokens_fn, p, tokens, jnp.array(positions)))(params)
    expected = naive(jax.jit(tokens_fn), params, tokens, positions)
    np.testing.assert_allclose(gram, expected, rtol=1e-10, atol=1e-12 * np.abs(expected).max())
    assert not np.any(gram[1, 2]) and not np.any(gram[:, :, 1, 2])


@pytest.mark.parametrize("kind", ["experts", "several uses", "embedding, clipped", "position table", "sliced"])
@pytest.mark.usefixtures("x64")
def test_other_kinds_of_layers(kind):
    core, shapes = zoo.CORES[kind]
    params, tokens = zoo.draw(shapes, 0, jnp.float64), draw_pairs(0).tokens[2]
    tokens_fn = by_token(zoo.around(core))
    positions = [[2, 5], [3, 1]]
    gram = jax.jit(lambda p: geometry.token_gram(tokens_fn, p, tokens, jnp.array(positions)))(params)
    expected = naive(jax.jit(tokens_fn), params, tokens, positions)
    np.testing.assert_allclose(gram, expected, rtol=1e-10, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("outputs", [3, 8, 16])
@pytest.mark.usefixtures("x64")
def test_wide_layers_in_slices_of_their_outputs(monkeypatch, outputs):
    """Slices that do and do not divide the widths, and one exactly as wide."""
    monkeypatch.setattr(geometry_tokens, "OUTPUTS_AT_ONCE", outputs)
    test_token_gram_equals_gradients_one_by_one("gpt, tied")


@pytest.mark.usefixtures("x64")
def test_token_gram_sums_to_the_geometry_of_the_pair():
    """A row's gradient is the sum of its tokens' gradients."""
    log_prob_fn, params = zoo.whole_models(jnp.float64)["gpt, tied"]
    tokens_fn = by_token(log_prob_fn)
    batch = draw_pairs(3)
    masks = np.asarray(batch.completion_mask[0])
    count = masks.sum(-1).max()
    positions = np.stack([np.pad(p, (0, count - len(p)), constant_values=-1) for p in map(np.flatnonzero, masks)])
    gram = jax.jit(lambda p: geometry.token_gram(tokens_fn, p, batch.tokens[0], positions))(params)
    one = jax.tree.map(lambda leaf: leaf[:1], batch)
    s = jax.jit(lambda p: geometry.scan_geometry(log_prob_fn, p, one))(params)
    sums = np.sum(gram, (1, 3))
    np.testing.assert_allclose([sums[0, 0], sums[1, 1], sums[0, 1]], np.ravel(s), rtol=1e-10)


def test_positions_that_no_row_has():
    unigram = lambda params, tokens: jax.nn.log_softmax(params)[tokens]  # noqa: E731
    tokens = jnp.array([[0, 1], [0, 2]])
    gram = geometry.token_gram(unigram, jnp.zeros(3), tokens, jnp.array([[1, 2, -1], [0, 1, -2]]))
    asked = np.array([[True, False, True], [True, True, False]])
    np.testing.assert_array_equal(np.isfinite(gram), asked[:, :, None, None] & asked[None, None])
    for wrong in (jnp.array([0, 1]), jnp.array([[0.0], [1.0]]), jnp.zeros((3, 1), int)):
        with pytest.raises(ValueError, match=r"positions: whole numbers \[2, N\]"):
            geometry.token_gram(unigram, jnp.zeros(3), tokens, wrong)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-3), ("float16", 1e-4)])
def test_narrow_inputs_are_multiplied_in_float32(dtype, tolerance):
    """Products of inputs, about 10^6, are more than float16 holds and more digits than bfloat16 has."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(100 * rng.standard_normal((2, 5, 64)), dtype)
    params = jnp.asarray(rng.standard_normal((64, 8)), dtype)
    linear = lambda w, x: jnp.sum((x @ w).astype(jnp.float32) / 1024, -1)  # noqa: E731
    gram = geometry.token_gram(linear, params, x, jnp.array([[0, 2], [1, 3]]))
    taken = np.stack([np.asarray(x, np.float64)[0, [0, 2]], np.asarray(x, np.float64)[1, [1, 3]]])
    expected = np.einsum("ink,jmk->injm", taken, taken) * 8 / 1024**2
    np.testing.assert_allclose(gram, expected, atol=tolerance * expected.max())
