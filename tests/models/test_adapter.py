"""Somebody else's Flax NNX models through the adapter: geometry and gradients exact, what would be wrong refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from entangle import geometry
from entangle.errors import UserError
from entangle.models import log_prob_function
from tests.toy import draw_pairs, flatten, row_gradients

VOCAB, WIDTH, HEADS, KEYS, LENGTH = 7, 8, 4, 2, 8


@pytest.fixture(autouse=True, scope="module")
def flax_promotes():
    """nnx.LayerNorm and nnx.RMSNorm promote ranks and dtypes."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


class Block(nnx.Module):
    """Grouped-query attention and a gated feed-forward; the query may carry a low-rank adapter."""

    def __init__(self, norm, low_rank, rngs):
        narrow = WIDTH // HEADS * KEYS
        self.first, self.second = norm(WIDTH, rngs=rngs), norm(WIDTH, rngs=rngs)
        self.query = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        if low_rank:
            self.query = nnx.LoRA(WIDTH, 2, WIDTH, base_module=self.query, rngs=rngs)
        self.key, self.value = (nnx.Linear(WIDTH, narrow, use_bias=False, rngs=rngs) for _ in range(2))
        self.out = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.gate, self.up = (nnx.Linear(WIDTH, 12, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(12, WIDTH, rngs=rngs)

    def __call__(self, x):
        h = self.first(x)
        n, t, _ = h.shape
        q = self.query(h).reshape(n, t, HEADS, -1)
        k, v = (jnp.repeat(f(h).reshape(n, t, KEYS, -1), HEADS // KEYS, 2) for f in (self.key, self.value))
        scores = jnp.einsum("nthd,nshd->nhts", q, k)
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf)
        x = x + self.out(jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores), v).reshape(n, t, -1))
        h = self.second(x)
        return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))


class Foreign(nnx.Module):
    """A small decoder as others write them."""

    def __init__(self, *, tied, norm=nnx.RMSNorm, low_rank=False, extra=None, seed=0):
        rngs = nnx.Rngs(seed)
        wide = jnp.result_type(float)  # nnx.Embed casts its table to a dtype of its own
        self.embed, self.position = (nnx.Embed(n, WIDTH, dtype=wide, rngs=rngs) for n in (VOCAB, LENGTH))
        self.block, self.norm = Block(norm, low_rank, rngs), norm(WIDTH, rngs=rngs)
        self.head = None if tied else nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)
        self.extra = None if extra is None else extra(rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[-1]))
        x = x if self.extra is None else self.extra(x)
        x = self.norm(self.block(x))
        return self.embed.attend(x) if self.head is None else self.head(x)


def adapted(wrt=nnx.Param, **options):
    """Log-probability function and parameters in float64, none of them zero."""
    graph, state = nnx.split(Foreign(**options))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda p: jnp.asarray(np.asarray(p) + 0.3 * rng.standard_normal(p.shape), jnp.float64), state)
    return log_prob_function(nnx.merge(graph, state), wrt=wrt)


@pytest.mark.parametrize(
    "options",
    [
        {"tied": True, "norm": nnx.LayerNorm},
        {"tied": False},
        {"tied": False, "low_rank": True, "wrt": nnx.LoRAParam},
    ],
    ids=["tied, LayerNorm", "untied, RMSNorm", "LoRA on a frozen base"],
)
@pytest.mark.usefixtures("x64")
def test_geometry_and_gradient_are_exact(options):
    log_prob_fn, params = adapted(**options)
    batch = draw_pairs(0)
    d_w, d_l = np.random.default_rng(1).standard_normal((2, 5))

    @jax.jit
    def both(params):
        _, pull_back = geometry.vjp_with_geometry(log_prob_fn, params, batch)
        return pull_back(jnp.asarray(d_w), jnp.asarray(d_l))

    gradient, s = both(params)
    g = row_gradients(log_prob_fn, params, batch)
    np.testing.assert_allclose(s.chosen_sq_norm, np.sum(g[:, 0] ** 2, -1), rtol=1e-10)
    np.testing.assert_allclose(s.inner_product, np.sum(g[:, 0] * g[:, 1], -1), rtol=1e-9, atol=1e-12)
    expected = np.mean(d_l[:, None] * g[:, 1] - d_w[:, None] * g[:, 0], 0)
    np.testing.assert_allclose(flatten(gradient), expected, rtol=1e-9, atol=1e-12)


def test_layers_of_flax_have_short_forms():
    for tied, table in ((True, ["tied lookup", "tied head"]), (False, ["lookup"])):
        log_prob_fn, params = log_prob_function(Foreign(tied=tied))
        forms = {}
        for use in geometry.parameter_uses(log_prob_fn, params, draw_pairs(0)):
            forms.setdefault(use.parameter, []).append(use.form)
        assert forms["params['embed']['embedding']"] == table
        assert forms["params['position']['embedding']"] == ["lookup"]
        kernels = [form for name, form in forms.items() if name.endswith("['kernel']")]
        assert len(kernels) == (7 if tied else 8) and all(form in (["rows"], ["gram"]) for form in kernels)


def test_log_probabilities_by_hand():
    """One row, token by token, from the model's own logits."""
    model = Foreign(tied=False)
    log_prob_fn, params = log_prob_function(model)
    batch = draw_pairs(2)
    for side in (0, 1):
        tokens, mask = np.asarray(batch.tokens[3, side]), np.asarray(batch.completion_mask[3, side])
        logits = np.asarray(model(batch.tokens[3, side][None])[0], np.float64)
        expected = sum(logits[t - 1, tokens[t]] - np.log(np.sum(np.exp(logits[t - 1]))) for t in np.flatnonzero(mask))
        np.testing.assert_allclose(log_prob_fn(params, batch)[3, side], expected, rtol=1e-5)


def test_adapters_alone_are_the_parameters():
    _, params = log_prob_function(Foreign(tied=True, low_rank=True), wrt=nnx.LoRAParam)
    assert jax.tree.map(jnp.shape, params) == {"block": {"query": {"lora_a": (WIDTH, 2), "lora_b": (2, WIDTH)}}}


class Cache(nnx.Module):
    """Keeps what it saw, as a key-value cache does."""

    def __init__(self, rngs):
        self.seen = nnx.Cache(jnp.zeros((1, LENGTH, WIDTH)))

    def __call__(self, x):
        self.seen[...] = x[:1]
        return x


class Kept(nnx.Module):
    """Keeps an activation for later, in a variable that is not there before."""

    def __call__(self, x):
        self.activation = nnx.Intermediate(x)
        return x


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        (lambda rngs: nnx.Dropout(0.5, rngs=rngs), "extra/rngs/count"),
        (lambda rngs: nnx.BatchNorm(WIDTH, rngs=rngs), "extra/mean, extra/var"),
        (Cache, "extra/seen"),
        (lambda rngs: Kept(), "extra/activation"),
    ],
    ids=["dropout", "batch statistics", "cache", "kept activation"],
)
def test_a_call_that_writes_is_refused_by_name(extra, names):
    log_prob_fn, params = log_prob_function(Foreign(tied=False, extra=extra))
    with pytest.raises(UserError, match=rf"^Foreign: the call writes to {names}") as refusal:
        geometry.vjp_with_geometry(log_prob_fn, params, draw_pairs(0))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "extra", [lambda rngs: nnx.Dropout(0.5, rngs=rngs), lambda rngs: nnx.BatchNorm(WIDTH, rngs=rngs)]
)
def test_the_same_module_set_to_evaluation_is_taken(extra):
    model = Foreign(tied=False, extra=extra)
    model.eval()
    log_prob_fn, params = log_prob_function(model)
    assert log_prob_fn(params, draw_pairs(0)).shape == (5, 2)


def test_other_refusals_name_module_and_parameter():
    model = Foreign(tied=False)
    with pytest.raises(UserError, match=r"^Foreign: the filter .*LoRAParam.* chooses no parameter"):
        log_prob_function(model, wrt=nnx.LoRAParam)
    model.embed.embedding = nnx.Param(jnp.zeros((VOCAB, WIDTH), jnp.int8))
    with pytest.raises(UserError, match=r"^Foreign: parameter embed/embedding has dtype int8"):
        log_prob_function(model)
    log_prob_fn, params = log_prob_function(Foreign(tied=False), call=lambda module, tokens: module(tokens)[0])
    with pytest.raises(UserError, match=r"^Foreign: logits of shape \(8, 7\) for tokens of shape \(10, 8\)"):
        log_prob_fn(params, draw_pairs(0))


class Wrapped(nnx.Module):
    """A block under another module's transform."""

    def __init__(self, transform, *, dropout=0.0):
        rngs = nnx.Rngs(0)
        wide = jnp.result_type(float)
        self.embed, self.head = nnx.Embed(VOCAB, WIDTH, dtype=wide, rngs=rngs), nnx.Linear(WIDTH, VOCAB, rngs=rngs)
        self.inner = nnx.Sequential(
            nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Dropout(dropout, rngs=rngs)
        )
        self.transform = transform

    def __call__(self, tokens):
        return self.head(self.transform(lambda inner, x: inner(x))(self.inner, self.embed(tokens)))


class Layers(nnx.Module):
    """Blocks that are scanned over, each under remat."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        wide = jnp.result_type(float)
        self.embed, self.head = nnx.Embed(VOCAB, WIDTH, dtype=wide, rngs=rngs), nnx.Linear(WIDTH, VOCAB, rngs=rngs)
        self.layers = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs))(rngs.split(3))

    def __call__(self, tokens):
        step = nnx.scan(nnx.remat(lambda x, layer: jnp.tanh(layer(x))), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(step(self.embed(tokens), self.layers))


@pytest.mark.parametrize(
    "make", [lambda: Wrapped(nnx.remat), lambda: Wrapped(nnx.jit), Layers], ids=["remat", "jit", "scan"]
)
@pytest.mark.usefixtures("x64")
def test_variables_that_a_transform_writes_back_as_they_were_are_not_written(make):
    module = make()
    module.eval()
    log_prob_fn, params = log_prob_function(module)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    batch = draw_pairs(0, vocab=VOCAB)
    s = jax.jit(geometry.pair_geometry, static_argnums=0)(log_prob_fn, params, batch)
    g = row_gradients(log_prob_fn, params, batch)
    np.testing.assert_allclose(s.chosen_sq_norm, np.sum(g[:, 0] ** 2, -1), rtol=1e-9)


@pytest.mark.parametrize("transform", [nnx.remat, nnx.jit])
def test_what_a_transform_changes_is_written(transform):
    log_prob_fn, params = log_prob_function(Wrapped(transform, dropout=0.5))
    with pytest.raises(UserError, match=r"the call writes to inner/layers/2/rngs/count;"):
        log_prob_fn(params, draw_pairs(0, vocab=VOCAB))


def test_other_batches_and_results_are_refused():
    log_prob_fn, params = log_prob_function(Foreign(tied=False))
    with pytest.raises(UserError, match="Foreign: a PairBatch is needed, got ArrayImpl"):
        log_prob_fn(params, jnp.zeros((1, 2, 3), jnp.int32))
    log_prob_fn, params = log_prob_function(Foreign(tied=False), call=lambda module, tokens: (module(tokens), 1))
    with pytest.raises(UserError, match="Foreign: logits of shape tuple"):
        log_prob_fn(params, draw_pairs(0, vocab=VOCAB))
