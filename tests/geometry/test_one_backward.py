"""One backward against naive gradients, row by row: every layer kind, whole models, and what it must not do."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import geometry
from entangle.errors import UnsupportedModelError
from entangle.geometry import one_backward, taps
from entangle.types import PairBatch
from tests import zoo
from tests.toy import draw_pairs, flatten, row_gradients

PAIRS = 5
WHOLE = list(zoo.whole_models(jnp.float32))


def pairs(seed, *, left=False, vocab=zoo.VOCAB):
    """Ragged pairs; padding tokens are random ones, so that a leak of theirs shows."""
    batch = draw_pairs(seed, PAIRS, vocab=vocab)
    if not left:
        return batch
    return jax.tree.map(lambda leaf: jnp.flip(leaf, -1), batch)


def coefficients(seed=3):
    """Positive, negative and zero ones."""
    d_w, d_l = np.random.default_rng(seed).standard_normal((2, PAIRS))
    d_w[1] = d_l[2] = d_w[3] = d_l[3] = 0
    return d_w, d_l


# compiled whole: operation by operation a model is a hundred programs
forward = jax.jit(lambda log_prob_fn, params, batch: log_prob_fn(params, batch), static_argnums=0)
scanned = jax.jit(geometry.scan_geometry, static_argnums=0)
alone = jax.jit(geometry.pair_geometry, static_argnums=0, static_argnames=("per_parameter",))


def _both(log_prob_fn, params, batch, d_w, d_l, *, apart=False):
    log_probs, pull_back = geometry.vjp_with_geometry(log_prob_fn, params, batch, apart=apart)
    return log_probs, *pull_back(d_w, d_l)


both = jax.jit(_both, static_argnums=0, static_argnames=("apart",))
# XLA's older code generator for CPUs, with which scripts/test compiles where there still is one, clamps int8 ids to 255 in
# int8, and reads elsewhere.
OLDER = "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", "")
NEWER = {"xla_cpu_use_fusion_emitters": True} if OLDER else None
both_by_the_newer = jax.jit(_both, static_argnums=0, compiler_options=NEWER)


def forget():
    """What was compiled, before and after something is put in another's place."""
    both.clear_cache()
    alone.clear_cache()


def disagreement(log_prob_fn, params, batch, plain=None, both=both):
    """Largest relative errors of geometry and training gradient against rows of ``plain`` differentiated one by one."""
    d_w, d_l = coefficients()
    plain = plain or log_prob_fn
    log_probs, gradient, s = both(log_prob_fn, params, batch, jnp.asarray(d_w), jnp.asarray(d_l))
    g = np.asarray(row_gradients(plain, params, batch), np.float64)
    norms = np.linalg.norm(g, axis=-1)
    expected = np.mean(d_l[:, None] * g[:, 1] - d_w[:, None] * g[:, 0], 0)
    return {
        "chosen": np.max(abs(s.chosen_sq_norm - norms[:, 0] ** 2) / norms[:, 0] ** 2),
        "rejected": np.max(abs(s.rejected_sq_norm - norms[:, 1] ** 2) / norms[:, 1] ** 2),
        # a product near zero is a difference of great ones: it is right to the scale of the norms
        "inner": np.max(abs(s.inner_product - np.sum(g[:, 0] * g[:, 1], -1)) / (norms[:, 0] * norms[:, 1])),
        "gradient": np.linalg.norm(flatten(gradient) - expected) / np.linalg.norm(expected),
        "log_probs": np.max(abs(log_probs - forward(plain, params, batch))),
    }


def hold(log_prob_fn, params, batch, tolerance, **options):
    for name, error in disagreement(log_prob_fn, params, batch, **options).items():
        assert error < tolerance, (name, error)


@pytest.fixture(params=["gram", "rows"])
def form(request, monkeypatch):
    monkeypatch.setattr(one_backward, "by_rows", lambda *sizes, with_gradient: request.param == "rows")
    forget()
    yield request.param
    forget()


@pytest.mark.parametrize("kind", zoo.CORES)
@pytest.mark.usefixtures("x64", "form")
def test_every_kind_of_layer(kind):
    core, shapes = zoo.CORES[kind]
    hold(zoo.around(core), zoo.draw(shapes, 0, jnp.float64), pairs(0), 1e-10)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.usefixtures("x64")
def test_whole_models(name, left):
    log_prob_fn, params = zoo.whole_models(jnp.float64)[name]
    hold(log_prob_fn, params, pairs(1, left=left), 1e-10)


@pytest.mark.usefixtures("x64", "form")
def test_the_tied_model_in_both_forms():
    hold(*zoo.whole_models(jnp.float64)["gpt, tied"], pairs(2), 1e-10)


@pytest.mark.parametrize("name", ["gpt, tied", "llama, scanned and checkpointed", "low-rank adapters"])
def test_float32(name):
    log_prob_fn, params = zoo.whole_models(jnp.float32)[name]
    hold(log_prob_fn, params, pairs(1), 1e-4)


def test_bfloat16_accumulates_in_float32():
    """Against the gradients of the same bfloat16 model, differentiated row by row and multiplied in float64."""
    log_prob_fn, params = zoo.around(zoo.CORES["dense"][0]), zoo.draw({"w": (8, 8)}, 0, jnp.bfloat16)
    batch = pairs(1)
    s = alone(log_prob_fn, params, batch)
    assert all(field.dtype == jnp.float32 for field in s)
    exact = scanned(log_prob_fn, jax.tree.map(lambda p: p.astype(jnp.float32), params), batch)
    # bfloat16 has 8 bits: cotangents are off by up to 2^-9 each, at random, sums of squares of dozens by a few percent
    np.testing.assert_allclose(s.chosen_sq_norm, exact.chosen_sq_norm, rtol=0.05)
    np.testing.assert_allclose(geometry.cosine(s), geometry.cosine(exact), atol=0.05)


@pytest.mark.usefixtures("x64")
def test_the_two_gradients_apart():
    log_prob_fn, params = zoo.whole_models(jnp.float64)["gpt, tied"]
    batch, (d_w, d_l) = pairs(4), coefficients(4)
    _, gradients, s = both(log_prob_fn, params, batch, jnp.asarray(d_w), jnp.asarray(d_l), apart=True)
    g = row_gradients(log_prob_fn, params, batch)
    np.testing.assert_allclose(flatten(gradients.chosen), np.mean(d_w[:, None] * g[:, 0], 0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(flatten(gradients.rejected), np.mean(d_l[:, None] * g[:, 1], 0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(s.chosen_sq_norm, np.sum(g[:, 0] ** 2, -1), rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_a_forward_is_pulled_back_twice_for_a_rule_that_needs_norms():
    """The pairwise normalised gradient: mean of g_l / |g_l| - g_w / |g_w|."""
    log_prob_fn, params = zoo.whole_models(jnp.float64)["llama, scanned"]
    batch = pairs(5)

    @jax.jit
    def normalised(params, batch):
        _, pull_back = geometry.vjp_with_geometry(log_prob_fn, params, batch)
        _, s = pull_back(jnp.zeros(PAIRS), jnp.zeros(PAIRS))
        return pull_back(1 / jnp.sqrt(s.chosen_sq_norm), 1 / jnp.sqrt(s.rejected_sq_norm))[0]

    g = row_gradients(log_prob_fn, params, batch)
    unit = g / np.linalg.norm(g, axis=-1, keepdims=True)
    np.testing.assert_allclose(flatten(normalised(params, batch)), np.mean(unit[:, 1] - unit[:, 0], 0), atol=1e-11)


@pytest.mark.usefixtures("x64")
def test_gradients_accumulated_over_parts_of_a_batch():
    log_prob_fn, params = zoo.whole_models(jnp.float64)["gpt, tied"]
    batch, d = pairs(7), jnp.stack([jnp.asarray(c) for c in coefficients()], -1)

    def accumulate(sums, part):
        batch, d = part
        _, pull_back = geometry.vjp_with_geometry(log_prob_fn, params, batch)
        gradient, s = pull_back(d[:, 0], d[:, 1])
        return jax.tree.map(jnp.add, sums, gradient), s

    parts = jax.tree.map(lambda leaf: leaf[:, None], (batch, d))  # one pair at a time
    zeros = jax.tree.map(jnp.zeros_like, params)
    sums, s = jax.jit(lambda parts: jax.lax.scan(accumulate, zeros, parts))(parts)
    _, gradient, whole = both(log_prob_fn, params, batch, d[:, 0], d[:, 1])
    np.testing.assert_allclose(flatten(sums) / PAIRS, flatten(gradient), rtol=1e-10, atol=1e-13)
    for field, expected in zip(s, whole, strict=True):
        np.testing.assert_allclose(field[:, 0], expected, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_per_parameter_and_by_group():
    log_prob_fn, params = zoo.whole_models(jnp.float64)["llama, scanned and checkpointed"]
    batch = pairs(6)
    tree = jax.jit(lambda p: geometry.pair_geometry(log_prob_fn, p, batch, per_parameter=True))(params)
    gradient = jax.jit(jax.vmap(jax.grad(lambda p, row: log_prob_fn(p, row)[0, 0]), in_axes=(None, 0)))
    sides = [
        gradient(params, jax.tree.map(lambda leaf: leaf[:, None], geometry.take_side(batch, side))) for side in (0, 1)
    ]

    def products(chosen, rejected, layered):
        """Over all axes but pairs, and layers where a scan runs over them: ``[L, B]``."""
        chosen, rejected = (leaf.reshape(*leaf.shape[: 1 + layered], -1) for leaf in (chosen, rejected))
        return [
            jnp.moveaxis(jnp.sum(a * b, -1), 0, -1) for a, b in ((chosen,) * 2, (rejected,) * 2, (chosen, rejected))
        ]

    def check(s, chosen, rejected, layered):
        for field, expected in zip(s, products(chosen, rejected, layered), strict=True):
            np.testing.assert_allclose(field, expected, rtol=1e-9, atol=1e-12)

    for name in ("embed", "norm", "head"):
        check(tree[name], sides[0][name], sides[1][name], 0)
    for name, s in tree["layers"].items():
        check(s, sides[0]["layers"][name], sides[1]["layers"][name], 1)
    groups = geometry.by_group(tree, lambda path: path.split("/")[0])
    assert sorted(groups) == sorted(params)
    whole = scanned(log_prob_fn, params, batch)
    np.testing.assert_allclose(
        sum(s.inner_product for s in groups.values()), whole.inner_product, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("name", ["gpt, tied", pytest.param("llama, scanned and checkpointed", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("x64", "form")
def test_derivatives_of_the_results(name):
    """Of log-probabilities and geometry with respect to the parameters, e.g. to penalise <g_w, g_l>."""
    log_prob_fn, params = zoo.whole_models(jnp.float64)[name]
    batch = pairs(1)

    def results(params):
        log_probs, pull_back = geometry.vjp_with_geometry(log_prob_fn, params, batch)
        return jnp.stack([jnp.sum(log_probs), jnp.sum(pull_back(*jnp.zeros((2, PAIRS)))[1].inner_product)])

    def naive(params):
        s = geometry.scan_geometry(log_prob_fn, params, batch)
        return jnp.stack([jnp.sum(log_prob_fn(params, batch)), jnp.sum(s.inner_product)])

    by_result = [jax.jit(jax.jacrev(f))(params) for f in (results, naive)]
    for which in (0, 1):
        found, expected = (flatten(jax.tree.map(lambda leaf: leaf[which], tree)) for tree in by_result)  # noqa: B023
        assert np.linalg.norm(found - expected) < 1e-10 * np.linalg.norm(expected)


@pytest.mark.usefixtures("x64", "form")
def test_several_batches_under_vmap():
    log_prob_fn, params = zoo.whole_models(jnp.float64)["gpt, tied"]
    some = [pairs(seed) for seed in (0, 1)]
    found = jax.jit(jax.vmap(lambda batch: geometry.pair_geometry(log_prob_fn, params, batch)))(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *some)
    )
    for i, batch in enumerate(some):
        expected = alone(log_prob_fn, params, batch)
        for field, value in zip(found, expected, strict=True):
            np.testing.assert_allclose(field[i], value, rtol=1e-10)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])  # of 5 pairs: 2 leaves a remainder, 9 is more than all
@pytest.mark.usefixtures("x64")
def test_some_pairs_at_a_time(batch_size):
    def model(params, batch):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), params["embed"][batch.tokens], params["layers"])
        return zoo.select(x @ params["embed"].T, batch)

    params = zoo.draw({"embed": (zoo.VOCAB, 4), "layers": (3, 4, 4)}, 7, jnp.float64)
    batch = pairs(7)

    @jax.jit
    def one_and_other(params):
        options = ({}, {"batch_size": batch_size}, {"per_parameter": True, "batch_size": batch_size})
        return [geometry.pair_geometry(model, params, batch, **o) for o in options]

    one, other, tree = one_and_other(params)
    assert tree["layers"].inner_product.shape == (3, PAIRS)
    for found in (other, geometry.total(tree)):
        for a, b in zip(one, found, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_what_is_not_used_has_no_geometry():
    log_prob_fn, params = zoo.around(zoo.CORES["dense"][0]), {"w": jnp.ones((8, 8))}
    batch = pairs(8)
    more = {"model": params, "idle": jnp.ones(3), "cut": jnp.ones(2)}

    def model(p, batch):
        return log_prob_fn(p["model"], batch) + jax.lax.stop_gradient(jnp.sum(p["cut"]))

    tree = alone(model, more, batch, per_parameter=True)
    assert all(not np.any(field) and field.shape == (PAIRS,) for name in ("idle", "cut") for field in tree[name])
    np.testing.assert_allclose(
        geometry.total(tree).chosen_sq_norm, scanned(model, more, batch).chosen_sq_norm, rtol=1e-11
    )


@pytest.mark.usefixtures("x64")
def test_equal_sides_and_empty_completions():
    log_prob_fn, params = zoo.whole_models(jnp.float64)["gpt, tied"]
    batch = pairs(2)
    batch = PairBatch(
        batch.tokens.at[0, 1].set(batch.tokens[0, 0]),
        batch.completion_mask.at[0, 1].set(batch.completion_mask[0, 0]).at[1, 0].set(False),
    )
    *_, s = both(log_prob_fn, params, batch, jnp.zeros(PAIRS), jnp.zeros(PAIRS))
    np.testing.assert_allclose([s.rejected_sq_norm[0], s.inner_product[0]], s.chosen_sq_norm[0], rtol=1e-12)
    assert float(s.chosen_sq_norm[1]) == float(s.inner_product[1]) == 0.0 < float(s.rejected_sq_norm[1])


@pytest.mark.usefixtures("x64")
def test_padding_is_not_seen():
    log_prob_fn, params = zoo.whole_models(jnp.float64)["llama, scanned"]
    batch, d = pairs(9), tuple(map(jnp.asarray, coefficients()))
    behind = np.arange(8) > 7 - np.argmax(np.asarray(batch.completion_mask)[..., ::-1], -1)[..., None]
    assert behind.any()
    other = batch._replace(tokens=jnp.where(behind, (batch.tokens + 1) % zoo.VOCAB, batch.tokens))
    one, two = (flatten(both(log_prob_fn, params, b, *d)) for b in (batch, other))
    np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-14)
    # the same comparison when the mask is all true
    leaky = [flatten(both(log_prob_fn, params, b._replace(completion_mask=behind | True), *d)) for b in (batch, other)]
    assert np.max(abs(leaky[0] - leaky[1])) > 0.1


# What would be wrong: each of these must make the comparisons above fail, and by much.


def errors_when(monkeypatch, owner, name, wrong, log_prob_fn, params):
    right = getattr(owner, name)
    hold(log_prob_fn, params, pairs(2), 1e-10)
    monkeypatch.setattr(owner, name, functools.partial(wrong, right))
    forget()
    errors = disagreement(log_prob_fn, params, pairs(2))
    forget()
    return errors


@pytest.mark.usefixtures("x64")
def test_dropped_cross_terms_are_noticed(monkeypatch):
    model = zoo.whole_models(jnp.float64)["gpt, tied"]
    errors = errors_when(monkeypatch, taps, "_head_rows", lambda right, *a: jnp.zeros_like(right(*a)), *model)
    assert errors["chosen"] > 1e-3 and errors["inner"] > 1e-3 and errors["gradient"] < 1e-10


@pytest.mark.usefixtures("x64")
def test_coefficients_applied_twice_are_noticed(monkeypatch):
    model = zoo.whole_models(jnp.float64)["gpt, tied"]
    errors = errors_when(monkeypatch, taps, "_times", lambda right, a, w: right(right(a, w), w), *model)
    assert errors["gradient"] > 0.1 and errors["chosen"] < 1e-10


@pytest.mark.usefixtures("x64")
def test_coefficients_in_the_geometry_are_noticed(monkeypatch):
    """As if the backward started from the loss: then the activations' cotangents hold the coefficients."""
    d = jnp.asarray(np.stack(coefficients(), 1))

    def wrong(right, g):
        return right(None, taps._times(g, d) if len(g) == PAIRS else g)

    model = zoo.whole_models(jnp.float64)["gpt, tied"]
    errors = errors_when(monkeypatch, taps.PairProducts, "rows", wrong, *model)
    assert errors["chosen"] > 1e-3 and errors["gradient"] < 1e-10


@pytest.mark.parametrize(
    ("batch", "model", "message"),
    [
        (jnp.ones((3, 1, 4)), lambda p, x: x @ p, r"batch: .* \[B, 2\] .* got \[\(3, 1\)\]"),
        ((jnp.ones((3, 2, 4)), jnp.ones(3)), lambda p, x: x[0] @ p, r"batch: .* got \[\(3,\), \(3, 2\)\]"),
        ((jnp.ones((3, 2, 4)), 3.0), lambda p, x: x[0] @ p, r"batch: .* got \[\(\), \(3, 2\)\]"),
        (jnp.ones((0, 2, 4)), lambda p, x: x @ p, r"batch: .* B >= 1 pairs, got \[\(0, 2\)\]"),
        ((), lambda p, x: jnp.sum(p), r"batch: .* got \[\]"),
        (jnp.ones((3, 2, 4)), lambda p, x: x * p, r"log_prob_fn: shape \(3, 2\) is needed .* got \(3, 2, 4\)"),
        (jnp.ones((3, 2, 4)), lambda p, x: (x @ p).T, r"log_prob_fn: shape \(3, 2\) is needed .* got \(2, 3\)"),
        (jnp.ones((3, 2, 4)), lambda p, x: (x @ p).astype(int), r"log_prob_fn: floating numbers .* int32"),
        (jnp.ones((3, 2, 4)), lambda p, x: (x @ p, p), r"log_prob_fn: an array is needed, got tuple"),
        (
            jnp.ones((3, 2, 4)),
            lambda p, x: x @ p - jnp.ones((3, 2)),
            r"1 by 1 rows, got \(3, 2\); arrays .* closes over",
        ),
    ],
)
def test_other_shapes_are_refused(batch, model, message):
    for function in (geometry.vjp_with_geometry, geometry.pair_geometry):
        with pytest.raises(ValueError, match=message), jax.numpy_rank_promotion("allow"):
            function(model, jnp.ones(4), batch)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "params: at least one array"),
        (
            {"w": jnp.ones(4), "n": jnp.array(2)},
            r"params\['n'\]: a floating array is needed, got an array of dtype int32",
        ),
        ({"w": jnp.ones(4, jnp.complex64)}, r"params\['w'\]: a floating array .* complex64"),
        ({"w": jnp.ones(4), "b": 1.0}, r"params\['b'\]: a floating array is needed, got float"),
    ],
)
def test_other_parameters_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        geometry.vjp_with_geometry(lambda p, x: x.sum(-1), params, jnp.ones((3, 2, 4)))


@pytest.mark.parametrize(
    "d", [(jnp.ones(()), jnp.ones(3)), (jnp.ones(3), jnp.ones((3, 1))), (jnp.ones(3), jnp.ones(2))]
)
def test_other_coefficients_than_one_a_pair_are_refused(d):
    _, pull_back = geometry.vjp_with_geometry(lambda p, x: x @ p, jnp.ones(4), jnp.ones((3, 2, 4)))
    with pytest.raises(ValueError, match="d_w, d_l: a number for each of 3 pairs, got"):
        pull_back(*d)


@pytest.mark.parametrize("function", [geometry.pair_geometry, geometry.scan_geometry])
def test_no_pairs_at_a_time_are_refused(function):
    batch = jnp.ones((3, 2, 4))
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size: at least 1 pair at a time, got {size}"):
            function(lambda p, x: x @ p, jnp.ones(4), batch, batch_size=size)


def test_other_sides_than_two_are_refused_by_the_scan_and_by_changes():
    model, w = (lambda p, x: x @ p), jnp.ones(4)
    for sides in (1, 3):
        batch = jnp.ones((3, sides, 4))
        for call in (geometry.scan_geometry, lambda *a: geometry.step_changes(a[0], w, w, w, a[2])):
            with pytest.raises(ValueError, match=r"batch: .* \[B, 2\]"):
                call(model, w, batch)


# What a review found.


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32"])
@pytest.mark.parametrize("mode", [None, "clip", "fill"])
@pytest.mark.usefixtures("x64")
def test_ids_too_narrow_for_the_tables_length(dtype, mode):
    def model(dtype, params, batch):
        return zoo.select(jnp.take(params["e"], batch.tokens.astype(dtype), axis=0, mode=mode), batch)

    narrow, wide = functools.partial(model, dtype), functools.partial(model, jnp.int32)
    params = {"e": zoo.draw((256, zoo.VOCAB), 0, jnp.float64)}
    hold(narrow, params, pairs(0), 1e-10, plain=wide, both=both_by_the_newer)


@pytest.mark.parametrize("form", ["halves", "reshaped", "turned"])
@pytest.mark.usefixtures("x64")
def test_per_parameter_a_stack_that_is_not_scanned_as_it_lies_is_summed(form):
    """Its layers would be taken for others."""

    def model(params, batch):
        layer = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        x, w = jax.nn.one_hot(batch.tokens, 4, dtype=jnp.float64), params["w"]
        if form == "halves":
            x, _ = jax.lax.scan(layer, x, w[:2])
            x, _ = jax.lax.scan(layer, x, w[2:])
        elif form == "reshaped":
            x, _ = jax.lax.scan(lambda x, ws: jax.lax.scan(layer, x, ws), x, w.reshape(2, 2, 4, 4))
        else:
            x, _ = jax.lax.scan(layer, x, jnp.swapaxes(w, 0, 1))
        return zoo.select(x, batch)

    params, batch = {"w": zoo.draw((4, 4, 4), 0, jnp.float64)}, pairs(0, vocab=4)
    tree = alone(model, params, batch, per_parameter=True)
    np.testing.assert_allclose(
        tree["w"].chosen_sq_norm, np.sum(row_gradients(model, params, batch)[:, 0] ** 2, -1), rtol=1e-10
    )


@pytest.mark.parametrize("rows", [True, False])
def test_the_models_precision_is_that_of_all_products_of_its_gradients(monkeypatch, rows):
    monkeypatch.setattr(one_backward, "by_rows", lambda *sizes, with_gradient: rows)
    x = jnp.ones((3, 2, 4, 4))

    def step(params):
        model = lambda p, x: jnp.sum(jnp.matmul(x, p, precision="highest"), (-1, -2))  # noqa: E731
        return geometry.vjp_with_geometry(model, params, x)[1](jnp.ones(3), jnp.ones(3))

    program = str(jax.make_jaxpr(step)(jnp.ones((4, 4))))
    found = program.count("dot_general["), program.count("precision=(Precision.HIGHEST")
    # forward, to the input, and the rows' gradients, whose weighted sum is no product of the model's; or the sum and two
    # Grams, these once for TPUs and once for the others
    assert found == ((4, 3) if rows else (7, 7))


@pytest.mark.parametrize("kind", [np.uint8, np.bool_, list])
def test_coefficients_of_other_kinds_are_numbers(kind):
    _, pull_back = geometry.vjp_with_geometry(lambda p, x: x @ p, jnp.ones(4), jnp.ones((3, 2, 4)))
    one = [1, 0, 1] if kind is list else np.array([1, 0, 1], kind)
    expected, _ = pull_back(jnp.array([1.0, 0.0, 1.0]), jnp.zeros(3))
    np.testing.assert_array_equal(pull_back(one, np.zeros(3, np.uint8))[0], expected)
    assert np.all(expected < 0)


def test_weakly_typed_parameters_stay_so():
    """Else the program would compute wider than the model does."""
    model = lambda p, x: jnp.sum(jnp.tanh(x.astype(jnp.bfloat16) * p), -1).astype(jnp.float32)  # noqa: E731
    weak, x = jnp.asarray(0.7), jax.random.normal(jax.random.key(0), (3, 2, 5))
    assert weak.weak_type
    log_probs, _ = geometry.vjp_with_geometry(model, weak, x)
    np.testing.assert_array_equal(log_probs, model(weak, x))


@pytest.mark.usefixtures("x64")
def test_products_with_whole_numbers_are_copied():
    """A dot_general of integer inputs cannot be transposed to them."""

    def model(params, batch):
        x = batch.tokens[..., None] + 1
        dims = (((x.ndim - 1,), (0,)), ((), ()))
        return zoo.select(jax.lax.dot_general(x, params["w"], dims, preferred_element_type=jnp.float64), batch)

    params = {"w": zoo.draw((1, zoo.VOCAB), 0, jnp.float64)}
    assert [use.form for use in geometry.parameter_uses(model, params, pairs(0))] == ["copy"]
    hold(model, params, pairs(0), 1e-10)


def test_empty_parameters_have_no_geometry():
    model = lambda p, x: jnp.sum(x @ p["w"], -1) + x @ p["v"]  # noqa: E731
    params = {"w": jnp.zeros((4, 0)), "v": jnp.ones(4)}
    for batch_size in (None, 2):
        s = geometry.pair_geometry(model, params, jnp.ones((3, 2, 4)), batch_size=batch_size)
        np.testing.assert_array_equal(s.inner_product, 4.0)


# What has no short form is named.


def _uses(core, shapes, **options):
    params = zoo.draw(shapes, 0, jnp.float32)
    return geometry.parameter_uses(zoo.around(core), params, pairs(0), **options)


def test_forms_follow_from_static_shapes():
    def forms(length):
        batch = PairBatch(*(jnp.zeros((1, 2, length), dtype) for dtype in (jnp.int32, bool)))
        model = lambda p, b: zoo.select(jax.nn.one_hot(b.tokens, 64) @ p["w"] @ p["v"], b)  # noqa: E731
        found = geometry.parameter_uses(model, {"w": jnp.ones((64, 96)), "v": jnp.ones((96, 64))}, batch)
        return {use.parameter: use.form for use in found}

    # gram takes 8 T^2 (I + O) operations a pair beyond the gradient's own, rows 8/3 T I O of traffic: 3 T (160), 64 * 96
    assert forms(12) == {"params['w']": "gram", "params['v']": "gram"}
    assert forms(13) == {"params['w']": "rows", "params['v']": "rows"}


def test_uses_are_listed_with_their_place_in_the_code():
    _, params = zoo.whole_models(jnp.float32)["gpt, tied"]
    found = geometry.parameter_uses(zoo.gpt, params, pairs(0))
    forms = {}
    for use in found:
        forms.setdefault(use.parameter, []).append(use.form)
    assert forms["params['embed']"] == ["tied lookup", "tied head"]
    assert forms["params['position']"] == forms["params['norm']['scale']"] == ["copy"]
    assert forms["params['layers'][0]['qkv']"] == ["rows"]
    assert len(forms) == len(jax.tree.leaves(params))
    assert all("zoo.py:" in use.where for use in found)


def test_a_use_inside_the_library_is_placed_at_its_call():
    """``jnp.take`` gathers in a function of its own, none of whose lines are the user's."""
    model = lambda p, b: zoo.select(jnp.moveaxis(jnp.take(p["w"], b.tokens, axis=1), 0, -1), b)  # noqa: E731
    with pytest.raises(UnsupportedModelError, match=rf"gather at {__file__}:"):
        geometry.parameter_uses(model, {"w": jnp.ones((7, 64))}, pairs(0), copy_limit=100)


@pytest.mark.parametrize("kind", ["several uses", "weight norm"])
def test_a_large_parameter_without_a_short_form_is_refused_by_name(kind):
    core, shapes = zoo.CORES[kind]
    name = "w" if kind == "several uses" else "v"
    with pytest.raises(UnsupportedModelError, match=rf"parameter params\['{name}'\].*64 numbers.*copy_limit=63"):
        _uses(core, shapes, copy_limit=63)
    assert {use.form for use in _uses(core, shapes, copy_limit=64)} == {"copy"}


def test_a_large_weight_made_of_small_parameters_is_refused_by_name():
    core, shapes = zoo.CORES["merged low rank"]
    with pytest.raises(
        UnsupportedModelError, match=r"parameters params\['a'\], params\['b'\]: combined into 64 numbers"
    ):
        _uses(core, shapes, copy_limit=63)


@pytest.mark.usefixtures("x64")
def test_activations_that_no_row_has_met_yet_may_be_large():
    """A position table, larger than may be copied, whose rows are looked up for all rows of the batch alike."""

    def model(params, batch):
        positions = params["e"][jnp.arange(batch.tokens.shape[-1])].astype(jnp.float64) * 2
        return zoo.select(jax.nn.one_hot(batch.tokens, zoo.VOCAB) + last_two(positions), batch)

    last_two = lambda x: x.reshape(1, 1, *x.shape)  # noqa: E731
    params = {"e": zoo.draw((20, zoo.VOCAB), 0, jnp.float64)}
    (use,) = geometry.parameter_uses(model, params, pairs(0), copy_limit=10)
    assert use.form == "lookup"
    s = geometry.pair_geometry(model, params, pairs(0), copy_limit=10)
    g = row_gradients(model, params, pairs(0))
    np.testing.assert_allclose(s.inner_product, np.sum(g[:, 0] * g[:, 1], -1), rtol=1e-10)


def test_a_table_with_two_lookups_and_a_head_is_refused_by_name():
    def model(params, batch):
        x = params["e"][batch.tokens] + params["e"][jnp.roll(batch.tokens, 1, -1)]
        return zoo.select(x @ params["e"].T, batch)

    with pytest.raises(UnsupportedModelError, match=r"params\['e'\].*uses"):
        geometry.parameter_uses(model, {"e": jnp.ones((7, 8))}, pairs(0), copy_limit=10)


def test_a_stack_indexed_in_a_loop_is_refused_by_name():
    """It is one parameter used in every iteration; given to the scan as its sequence it is one a layer."""

    def model(params, batch):
        x = jax.nn.one_hot(batch.tokens, 7)
        x, _ = jax.lax.scan(lambda x, i: (jnp.tanh(x @ params["w"][i]), None), x, jnp.arange(4))
        return zoo.select(x, batch)

    params = {"w": zoo.draw((4, 7, 7), 0, jnp.float32)}
    with pytest.raises(UnsupportedModelError, match=rf"params\['w'\].*scan at {__file__}:"):
        geometry.parameter_uses(model, params, pairs(0), copy_limit=100)
    assert [use.form for use in geometry.parameter_uses(model, params, pairs(0))] == ["copy"]
