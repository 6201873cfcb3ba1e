import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from entangle.errors import UserError
from entangle.models import Decoder, DecoderConfig
from entangle.models.attention import attend, sees

CONFIG = DecoderConfig(vocab_size=11, max_positions=9, width=8, layers=2, heads=2)


@pytest.fixture(scope="module")
def logits():
    model = Decoder(CONFIG, nnx.Rngs(0))
    return jax.jit(model.logits)


@pytest.fixture
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (2, 3, 7), 0, CONFIG.vocab_size, dtype=jnp.int32)


def test_later_tokens_do_not_reach_earlier_logits(logits, tokens):
    changed = tokens.at[..., 4:].set((tokens[..., 4:] + 1) % CONFIG.vocab_size)
    before, after = logits(tokens), logits(changed)
    # Exactly: a later position enters with weight exp(-inf) = 0.
    np.testing.assert_array_equal(before[..., :4, :], after[..., :4, :])
    assert np.all(np.any(np.asarray(before[..., 4:, :] != after[..., 4:, :]), axis=-1))


def test_leading_axes_are_rows(logits, tokens):
    alone = jnp.stack([jnp.stack([logits(row) for row in rows]) for rows in tokens])
    np.testing.assert_allclose(logits(tokens), alone, rtol=0, atol=1e-6)


def test_order_of_tokens_matters_through_positions(logits):
    # Attention over equal values returns that value at every position, so only the position embedding can differ.
    same = logits(jnp.array([3, 3]))
    assert not np.allclose(same[0], same[1], atol=1e-3)


def test_attention_with_equal_keys_is_a_running_mean():
    # Equal keys give equal scores, so position t averages the values up to t: 1, (1+3)/2, (1+3+8)/3.
    values = jnp.array([1.0, 3.0, 8.0]).reshape(1, 3, 1, 1)
    out = attend(jnp.ones((1, 3, 1, 1)), jnp.ones((1, 3, 1, 1)), values, sees(values.shape[1]))
    np.testing.assert_allclose(out[0, :, 0, 0], [1.0, 2.0, 4.0], rtol=1e-6)


def test_attention_scores_are_divided_by_the_root_of_the_head_width():
    # Second position: q.k is 0 and 4 ln 3, over sqrt(4): 0 and ln 9, so the weights are 1/10 and 9/10.
    key = jnp.stack([jnp.zeros(4), jnp.full(4, jnp.log(3.0))]).reshape(1, 2, 1, 4)
    values = jnp.stack([jnp.zeros(4), jnp.ones(4)]).reshape(1, 2, 1, 4)
    np.testing.assert_allclose(
        attend(jnp.ones((1, 2, 1, 4)), key, values, sees(values.shape[1]))[0, 1, 0], 0.9, rtol=1e-6
    )


def test_initial_parameters_follow_gpt2():
    config = DecoderConfig(vocab_size=500, max_positions=300, width=64, layers=8, heads=2)
    layer = nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(0)), nnx.Param))
    first, last = layer["layers"]["0"], layer["layers"]["7"]
    # Deviations of n normal draws lie within 5 / sqrt(2 n) of the truth, relatively; the smallest n is 64 * 64.
    for leaf in (layer["token_embedding"], layer["position_embedding"], first["attention"]["qkv"]["kernel"]):
        assert np.std(leaf) == pytest.approx(0.02, rel=5 / np.sqrt(2 * 4096))
    # Residual projections: 0.02 / sqrt(2 * 8 layers) = 0.005.
    for leaf in (first["attention"]["out"]["kernel"], last["feed_forward"]["down"]["kernel"]):
        assert np.std(leaf) == pytest.approx(0.005, rel=5 / np.sqrt(2 * 4096))
    assert not np.any(first["attention"]["qkv"]["bias"]) and np.all(layer["final_norm"]["scale"] == 1)
    assert not np.array_equal(first["attention"]["qkv"]["kernel"], last["attention"]["qkv"]["kernel"])


def test_a_token_beyond_the_vocabulary_makes_its_row_nan_and_no_other(logits, tokens):
    changed = logits(tokens.at[1, 2, 3].set(CONFIG.vocab_size))
    rows = np.isnan(np.asarray(changed)).any((-1, -2))
    np.testing.assert_array_equal(rows, [[False, False, False], [False, False, True]])


def test_more_tokens_than_positions_are_refused(logits):
    with pytest.raises(UserError, match="10 tokens are more than the 9 positions"):
        logits(jnp.zeros((1, 10), jnp.int32))
