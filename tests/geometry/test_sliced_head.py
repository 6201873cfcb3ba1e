"""Geometry of heads in slices of the vocabulary: tables in parts, in scans and checkpoints, looked up in besides or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import geometry
from entangle.errors import UnsupportedModelError
from entangle.models import DecoderConfig, language_model
from entangle.models.head import completion_log_probs, token_log_probs
from tests.geometry.test_one_backward import both, disagreement, hold
from tests.toy import draw_pairs, flatten

PAIRS, VOCAB, WIDTH = 5, 23, 6


def pairs():
    return draw_pairs(1, PAIRS, vocab=VOCAB)


def params(*names):
    """In float64, where the flag is on."""
    rng = np.random.default_rng(0)
    shapes = {"embed": (VOCAB, WIDTH), "mix": (WIDTH, WIDTH), "head": (VOCAB, WIDTH)}
    return {name: jnp.asarray(rng.standard_normal(shapes[name])) for name in names}


def model(head_of, **options):
    """Embedding, one dense layer, and the head that a function of the parameters gives."""

    def log_prob_fn(params, batch):
        hidden = jnp.tanh(params["embed"][batch.tokens] @ params["mix"])
        return completion_log_probs(hidden, head_of(params), batch.tokens, batch.completion_mask, **options)

    return log_prob_fn


def tied(**options):
    return model(lambda params: params["embed"], **options)


def untied(**options):
    return model(lambda params: params["head"], **options)


def forms(log_prob_fn, params, name):
    return [u.form for u in geometry.parameter_uses(log_prob_fn, params, pairs(), copy_limit=0) if name in u.parameter]


# 23 is prime: in slices of 6 at most it is 4 of 5, and 3 rows left over; in slices of 1 nothing is
@pytest.mark.parametrize("options", [{"chunk": 6, "completion_length": 7}, {"chunk": 2}], ids=["left over", "fit"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.usefixtures("x64")
def test_against_gradients_row_by_row(kind, options):
    make, names = (tied, ("embed", "mix")) if kind == "tied" else (untied, ("embed", "mix", "head"))
    hold(make(**options), params(*names), pairs(), 1e-10, plain=make())


@pytest.mark.usefixtures("x64")
def test_the_forms():
    tied_params, untied_params = params("embed", "mix"), params("embed", "mix", "head")
    assert forms(tied(), tied_params, "embed") == ["tied lookup", "tied head"]
    assert forms(tied(chunk=2), tied_params, "embed") == ["tied lookup", "tied head"]
    assert forms(tied(chunk=6), tied_params, "embed") == ["tied lookup", "tied head", "tied head"]
    assert forms(untied(chunk=6), untied_params, "embed") == ["lookup"]
    assert set(forms(untied(chunk=6), untied_params, "head")) <= {"gram", "rows"}


@pytest.mark.usefixtures("x64")
def test_slices_of_two_shards():
    given = {name: leaf[:22] if name == "embed" else leaf for name, leaf in params("embed", "mix").items()}
    batch = draw_pairs(1, PAIRS, vocab=22)
    hold(tied(chunk=6, shards=2), given, batch, 1e-10, plain=tied())


@pytest.mark.slow  # the layers, which other tests have, take the time
@pytest.mark.usefixtures("x64")
def test_the_decoder_as_it_is_trained():
    """Tied, its layers scanned over and computed again, the head in slices: against the scan over pairs of the plain one."""
    config = DecoderConfig(VOCAB, 8, 8, layers=2, heads=2, scan_layers=True, remat="full")
    plain, sliced = language_model(config), language_model(config, chunk=6, completion_length=7)
    given = jax.tree.map(lambda leaf: 10 * leaf.astype(jnp.float64), plain.init(jax.random.key(0)))
    d = jnp.linspace(-1.0, 1.0, PAIRS)
    log_probs, gradient, s = both(sliced.log_probs, given, pairs(), d, 1 + d)
    exact = jax.jit(geometry.scan_geometry, static_argnums=0)(plain.log_probs, given, pairs())
    for one, other in zip(s, exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)

    def loss(given):
        found = plain.log_probs(given, pairs())
        return jnp.mean((1 + d) * found[:, 1] - d * found[:, 0])

    np.testing.assert_allclose(flatten(gradient), flatten(jax.jit(jax.grad(loss))(given)), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(log_probs, plain.log_probs(given, pairs()), rtol=1e-10)


def test_float32():
    given = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params("embed", "mix"))
    errors = disagreement(tied(chunk=6, completion_length=7), given, pairs(), plain=tied())
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


@pytest.mark.usefixtures("x64")
def test_products_of_tokens():
    given = params("embed", "mix")

    def by_token(chunk):
        def token_fn(params, tokens):
            hidden = jnp.tanh(params["embed"][tokens] @ params["mix"])
            return token_log_probs(hidden, params["embed"], tokens, chunk=chunk)

        gram = lambda params: geometry.token_gram(token_fn, params, pairs().tokens[0], jnp.array([[2, 5], [3, -1]]))  # noqa: E731
        return jax.jit(gram)(given)

    np.testing.assert_allclose(by_token(6), by_token(None), rtol=1e-10, atol=1e-12)


def twice(params, batch):
    """Two sliced heads over the same table: what they have in common has no short form."""
    hidden = jnp.tanh(params["embed"][batch.tokens] @ params["mix"])
    lengths = {"tokens": batch.tokens, "mask": batch.completion_mask}
    return sum(completion_log_probs(h, params["embed"], chunk=6, **lengths) for h in (hidden, hidden**2))


def through_the_width(params, batch):
    """A scan over the columns of the table, which is no head in slices."""
    hidden = jnp.tanh(params["embed"][batch.tokens] @ params["mix"])
    columns = jnp.moveaxis(hidden, -1, 0), params["embed"].T

    def add(logits, column):
        x, u = column
        return logits + x[..., None] * u.reshape(*(1,) * x.ndim, -1), None

    logits, _ = jax.lax.scan(add, jnp.zeros((*batch.tokens.shape, VOCAB)), columns)
    taken = jnp.take_along_axis(jax.nn.log_softmax(logits[..., :-1, :]), batch.tokens[..., 1:, None], -1)[..., 0]
    return jnp.sum(jnp.where(batch.completion_mask[..., 1:], taken, 0.0), -1)


@pytest.mark.parametrize("other", [twice, through_the_width])
@pytest.mark.usefixtures("x64")
def test_other_uses_of_a_tied_table_are_copied_or_refused(other):
    hold(other, params("embed", "mix"), pairs(), 1e-10)
    with pytest.raises(UnsupportedModelError, match="embed"):
        geometry.parameter_uses(other, params("embed", "mix"), pairs(), copy_limit=0)
