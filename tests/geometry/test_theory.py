"""Section 4 of arXiv 2410.13828 as tests: the theorems hold of what pair_geometry measures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import geometry
from entangle.types import PairBatch

_geometry = jax.jit(geometry.pair_geometry, static_argnums=0)


def _head(hidden):
    """Setup 1: only the head theta ``[D, V]`` is trained; hidden states ``[T, D]`` are fixed and shared by both sides."""

    @jax.jit
    def log_prob(theta, batch):
        log_probs = jax.nn.log_softmax(hidden @ theta)
        chosen = jnp.take_along_axis(
            jnp.broadcast_to(log_probs, (*batch.tokens.shape, theta.shape[1])), batch.tokens[..., None], -1
        )
        return jnp.sum(jnp.where(batch.completion_mask, chosen[..., 0], 0.0), -1)

    return log_prob


@jax.jit
def _per_position(theta, batch):
    """Setup 2: one learnable row of logits a position, both sides share it; the contexts differ by fixed offsets."""
    pairs, offsets = batch
    log_probs = jax.nn.log_softmax(theta[None, None] + offsets)
    chosen = jnp.take_along_axis(log_probs, pairs.tokens[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(pairs.completion_mask, chosen, 0.0), -1)


def _pair(chosen, rejected):
    tokens = jnp.asarray([[chosen, rejected]], jnp.int32)
    return PairBatch(tokens, jnp.ones(tokens.shape, bool))


@pytest.mark.parametrize("vocab", [2, 3, 10, 100])
@pytest.mark.usefixtures("x64")
def test_theorem_1_single_tokens_under_a_uniform_softmax(vocab):
    hidden = jnp.asarray(np.random.default_rng(vocab).standard_normal((1, 6)))
    h_sq = float(jnp.sum(hidden**2))
    s = _geometry(_head(hidden), jnp.zeros((6, vocab)), _pair([0], [1]))
    np.testing.assert_allclose(s.inner_product, [-h_sq / vocab], rtol=1e-12)
    np.testing.assert_allclose(s.chosen_sq_norm, [h_sq * (1 - 1 / vocab)], rtol=1e-12)
    np.testing.assert_allclose(s.rejected_sq_norm, [h_sq * (1 - 1 / vocab)], rtol=1e-12)
    np.testing.assert_allclose(geometry.cosine(s), [-1 / (vocab - 1)], rtol=1e-12)
    assert int(geometry.case_of(s, jnp.ones(1), jnp.ones(1))[0]) == geometry.Case.IDEAL


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.usefixtures("x64")
def test_single_tokens_under_any_softmax_are_ideal(seed):
    rng = np.random.default_rng(seed)
    hidden, theta = jnp.asarray(rng.standard_normal((1, 6))), jnp.asarray(3 * rng.standard_normal((6, 5)))
    h_sq = float(jnp.sum(hidden**2))
    p = jax.nn.softmax(hidden[0] @ theta)
    s = _geometry(_head(hidden), theta, _pair([0], [1]))
    # |e_w - s|^2 - <e_w - s, e_l - s> = <e_w - s, e_w - e_l> = 1 - s_w + s_l, and the mirror
    np.testing.assert_allclose(s.chosen_sq_norm - s.inner_product, [h_sq * float(1 - p[0] + p[1])], rtol=1e-10)
    np.testing.assert_allclose(s.rejected_sq_norm - s.inner_product, [h_sq * float(1 - p[1] + p[0])], rtol=1e-10)
    assert bool(geometry.condition_1(s)[0])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.usefixtures("x64")
def test_corollary_responses_equal_but_for_their_last_token_are_ideal(seed):
    """With logits of its own at every position the shared prefix cancels, whatever the softmax."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(6, size=4).tolist()
    theta = jnp.asarray(2 * rng.standard_normal((5, 6)))
    s = _geometry(_per_position, theta, (_pair([*prefix, 0], [*prefix, 1]), jnp.zeros((1, 2, 5, 6))))
    last = jax.nn.softmax(theta[-1])
    change = geometry.predicted_changes(s, jnp.ones(1), jnp.ones(1))
    np.testing.assert_allclose(change.chosen, [float(1 - last[0] + last[1])], rtol=1e-10)
    np.testing.assert_allclose(change.rejected, [-float(1 - last[1] + last[0])], rtol=1e-10)
    assert bool(geometry.condition_1(s)[0])


@pytest.mark.usefixtures("x64")
def test_corollary_with_a_shared_head_under_a_uniform_softmax():
    """The prefix cancels where it holds neither contrast token: (1 - s[0]) - (0 - s[1]) needs s[0] = s[1], as here."""
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)))
    s = _geometry(_head(hidden), jnp.zeros((6, 5)), _pair([2, 3, 4, 0], [2, 3, 4, 1]))
    change = geometry.predicted_changes(s, jnp.ones(1), jnp.ones(1))
    last = float(jnp.sum(hidden[-1] ** 2))  # |h|^2 (1 - s_w + s_l) with s_w = s_l
    np.testing.assert_allclose([change.chosen[0], change.rejected[0]], [last, -last], rtol=1e-10)
    assert bool(geometry.condition_1(s)[0])


def _context(rng, length, differs, vocab):
    """Random logits; contexts are one up to and including the differing position, two after it."""
    theta = jnp.asarray(rng.standard_normal((length, vocab)))
    after = (np.arange(length) > differs)[:, None] * rng.standard_normal((length, vocab))
    return theta, jnp.asarray(np.stack([np.zeros((length, vocab)), after])[None])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("x64")
def test_theorem_3_position_by_position(seed):
    length, m, vocab = 6, 2, 7
    rng = np.random.default_rng(seed)
    theta, offsets = _context(rng, length, m, vocab)
    chosen = rng.integers(vocab, size=length)
    chosen[m], rejected = 3, chosen.copy()
    rejected[m] = 5
    # Logits of their own make positions orthogonal: pair i of this batch is the pair with position i alone unmasked.
    pairs = PairBatch(
        jnp.asarray(np.tile([chosen, rejected], (length, 1, 1))),
        jnp.asarray(np.broadcast_to(np.eye(length, dtype=bool)[:, None], (length, 2, length))),
    )
    s = _geometry(_per_position, theta, (pairs, jnp.tile(offsets, (length, 1, 1, 1))))
    change = geometry.predicted_changes(s, jnp.ones(length), jnp.ones(length))
    expected = []
    for i in range(length):
        sw, sl = (np.exp(x) / np.sum(np.exp(x)) for x in np.asarray(theta)[i] + np.asarray(offsets)[0, :, i])
        y, yw, yl = chosen[i], chosen[m], rejected[m]
        if i < m:
            expected.append((np.sum((np.eye(vocab)[y] - sw) ** 2), 0.0, 0.0))
        elif i == m:
            expected.append((sw @ sw - sw[yw] - sw[yl], 1 - sw[yw] + sw[yl], -(1 + sw[yw] - sw[yl])))
        else:
            d = sl - sw
            expected.append((1 - sw[y] - sl[y] + sw @ sl, d[y] - sw @ d, d[y] - sl @ d))
    np.testing.assert_allclose(np.stack([s.inner_product, *change], 1), expected, atol=1e-12)


# suffix length: delta log pi_w / C, delta log pi_l / C, cosine, to two decimals
TOY = {
    0: (1.00, -1.00, 0.05),
    1: (0.87, -1.19, 0.31),
    2: (0.74, -1.38, 0.45),
    4: (0.48, -1.77, 0.61),
    8: (-0.04, -2.54, 0.75),
    16: (-1.08, -4.08, 0.86),
}


def _toy_by_hand(suffix):
    """Sums of section 2's table over two prefix positions, the differing one and the suffix."""
    e = np.e
    p = e**2 / (e**2 + 7)  # a prefix or suffix token: logit 2 against seven zeros
    q = e**3 / (2 * e**3 + 6)  # a contrast token: two logits of 3 against six zeros
    r = e / (e + 7)  # a suffix token in the rejected context: logit 1

    def dot(a, b):
        return a * b + 7 * (1 - a) / 7 * (1 - b) / 7

    same = 1 - 2 * p + dot(p, p)  # |e - s|^2 of a prefix position
    contrast = 2 * q * q + 6 * ((1 - 2 * q) / 6) ** 2  # |s|^2 at the differing position
    inner = 2 * same + contrast - 2 * q + suffix * (1 - p - r + dot(p, r))
    w_sq = 2 * same + 1 - 2 * q + contrast + suffix * same
    l_sq = 2 * same + 1 - 2 * q + contrast + suffix * (1 - 2 * r + dot(r, r))
    return w_sq - inner, inner - l_sq, inner / np.sqrt(w_sq * l_sq)


@pytest.mark.usefixtures("x64")
def test_toy_the_longer_the_shared_suffix_the_lower_the_chosen_one_ends():
    vocab, m, length, suffixes = 8, 2, 19, np.array(list(TOY))
    # tokens: 0 in the prefix, 1 against 2 at the differing position, 3 in the suffix
    tokens = np.full((len(suffixes), 2, length), 3)
    tokens[:, :, :m], tokens[:, 0, m], tokens[:, 1, m] = 0, 1, 2
    mask = np.broadcast_to(np.arange(length) < m + 1 + suffixes[:, None, None], tokens.shape)
    theta, offsets = np.zeros((length, vocab)), np.zeros((len(suffixes), 2, length, vocab))
    theta[:m, 0] = 2.0
    theta[m, [1, 2]] = 3.0
    theta[m + 1 :, 3] = 2.0
    offsets[:, 1, m + 1 :, 3] = -1.0
    batch = (PairBatch(jnp.asarray(tokens), jnp.asarray(mask)), jnp.asarray(offsets))
    s = _geometry(_per_position, jnp.asarray(theta), batch)
    ones = jnp.ones(len(suffixes))
    measured = np.stack([*geometry.predicted_changes(s, ones, ones), geometry.cosine(s)], 1)
    np.testing.assert_allclose(measured, [_toy_by_hand(suffix) for suffix in suffixes], atol=1e-12)
    np.testing.assert_array_equal(np.round(measured, 2), list(TOY.values()))


@pytest.mark.usefixtures("x64")
def test_token_gram_sums_to_the_pair_geometry():
    """The gradient of a response is the sum of its tokens' gradients, so blocks of the token Gram sum to the 2x2 Gram."""
    rng = np.random.default_rng(0)
    theta, offsets = _context(rng, 4, 1, 6)
    pairs = _pair([0, 1, 2, 3], [0, 4, 2, 3])

    def tokens(params, rows):
        log_probs = jax.nn.log_softmax(params[None, None] + rows[1])
        return jnp.take_along_axis(log_probs, rows[0][..., None], -1)[..., 0]

    pair, positions = (pairs.tokens[0], offsets[0]), jnp.tile(jnp.arange(4), (2, 1))
    token_gram = np.asarray(geometry.token_gram(tokens, theta, pair, positions)).sum((1, 3))
    s = _geometry(_per_position, theta, (pairs, offsets))
    expected = [[s.chosen_sq_norm[0], s.inner_product[0]], [s.inner_product[0], s.rejected_sq_norm[0]]]
    np.testing.assert_allclose(token_gram, np.array(expected), rtol=1e-12)
