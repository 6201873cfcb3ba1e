"""The head in slices against the whole head, and what its program holds."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from entangle.errors import UserError
from entangle.models import DecoderConfig, head, language_model
from tests.toy import draw_pairs

ROOT = Path(__file__).parents[2]
PAIRS, LENGTH, WIDTH, VOCAB = 3, 12, 5, 46  # 46 is 2 * 23: what slices leave over, and two shards
# slices that fit; slices and 6 rows left over; two shards of slices that leave rows over in each
CUTS = {"fit": {"chunk": 23}, "left over": {"chunk": 10}, "shards": {"chunk": 12, "shards": 2}}


def draw(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (PAIRS, 2, LENGTH, WIDTH), (VOCAB, WIDTH)
    hidden, table = (jnp.asarray(2 * rng.standard_normal(shape), dtype) for shape in shapes)
    batch = draw_pairs(1, PAIRS, LENGTH, VOCAB)
    # in two pieces, as token masks may be
    holes = batch.completion_mask & (jnp.arange(LENGTH)[None, None] != 6)
    return hidden, table, batch.tokens, holes, jnp.asarray(rng.standard_normal((PAIRS, 2)), dtype)


def longest(mask):
    return int(mask[..., 1:].sum(-1).max())


def with_gradients(hidden, table, tokens, mask, weights, **options):
    def weighted(hidden, table):
        found = head.completion_log_probs(hidden, table, tokens, mask, **options)
        return jnp.sum(weights * found.astype(weights.dtype)), found

    (_, found), gradients = jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))(hidden, table)
    return found, *gradients


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("completions", [False, True], ids=["everywhere", "completions"])
def test_log_probs_and_gradients_are_those_of_the_whole_head(cut, completions):
    with jax.enable_x64(True):
        arguments = draw(np.float64)
        options = {"completion_length": longest(arguments[3])} if completions else {}
        assert longest(arguments[3]) < LENGTH - 1
        expected = with_gradients(*arguments)
        for one, other in zip(with_gradients(*arguments, **options, **CUTS[cut]), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def test_the_slices_are_what_the_cuts_say():
    slices = {
        name: head._slices(VOCAB // cut.get("shards", 1), cut["chunk"], cut.get("shards", 1))
        for name, cut in CUTS.items()
    }
    assert slices == {"fit": (2, 23), "left over": (5, 9), "shards": (4, 5)}


def test_logits_in_the_thousands_do_not_overflow():
    hidden, table, tokens, mask, weights = draw()
    found = with_gradients(300 * hidden, table, tokens, mask, weights, chunk=10)
    assert all(np.isfinite(array).all() for array in found)
    expected = with_gradients(300 * hidden, table, tokens, mask, weights)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


def test_bfloat16_sums_over_slices_in_float32():
    """The cotangent of the hidden states is a sum over slices: in bfloat16 23 of them would each round the whole sum."""
    hidden, table, *others = draw()
    narrow = with_gradients(hidden.astype(jnp.bfloat16), table.astype(jnp.bfloat16), *others, chunk=2)
    wide = with_gradients(*(x.astype(jnp.bfloat16).astype(jnp.float32) for x in (hidden, table)), *others, chunk=2)
    assert [array.dtype for array in narrow] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    np.testing.assert_allclose(narrow[0], wide[0], rtol=1e-5)
    # 2^-9 for the result, as much for the softmax that meets a matrix
    error = np.linalg.norm(narrow[1].astype(jnp.float32) - wide[1]) / np.linalg.norm(wide[1])
    assert error < 2**-8


def test_a_row_with_more_completion_tokens_is_nan():
    hidden, table, tokens, mask, _ = draw()
    length = longest(mask) - 1
    few = head.completion_log_probs(hidden, table, tokens, mask, completion_length=length)
    long = np.asarray(mask[..., 1:].sum(-1) > length)
    assert long.any() and not long.all()
    np.testing.assert_array_equal(np.isnan(few), long)


def test_the_first_token_has_nothing_before_it():
    hidden, table, tokens, mask, _ = draw()
    everywhere = mask.at[..., 0].set(True)
    with_first, without = (
        head.completion_log_probs(hidden, table, tokens, m, completion_length=longest(mask)) for m in (everywhere, mask)
    )
    np.testing.assert_array_equal(with_first, without)


def avals(jaxpr):
    """Every array and every product in a program, inner programs included."""
    for eqn in jaxpr.eqns:
        yield from ((eqn, var.aval) for var in (*eqn.invars, *eqn.outvars))
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: isinstance(p, core.Jaxpr | core.ClosedJaxpr)
        ):
            if isinstance(inner, core.Jaxpr | core.ClosedJaxpr):
                yield from avals(getattr(inner, "jaxpr", inner))


def greatest_and_products(**options):
    """The most numbers per row in an array that is not the table's size, and how many positions meet the table."""
    config = DecoderConfig(vocab_size=997, max_positions=64, width=8, layers=1, heads=1, tied=False)
    model = language_model(config, **options)
    batch = draw_pairs(0, 2, length=64, vocab=997)
    params = jax.eval_shape(model.init, jax.random.key(0))
    closed = jax.make_jaxpr(jax.value_and_grad(lambda p: model.log_probs(p, batch).sum()))(params)
    found = list(avals(closed.jaxpr))
    table = 997 * 8
    greatest = max(aval.size for _, aval in found if 997 not in aval.shape or aval.size != table)
    positions = {
        size
        for eqn, _ in found
        if eqn.primitive.name == "dot_general"
        for var in (*eqn.invars, *eqn.outvars)
        if var.aval.ndim >= 3 and var.aval.shape[-1] > 64
        for size in var.aval.shape[2:-1]
    }
    return greatest, positions


def test_no_array_is_as_large_as_the_logits_and_prompts_do_not_meet_the_vocabulary():
    rows, slice_, completion = 4, 100, 20
    whole, positions = greatest_and_products()
    assert whole == rows * 63 * 997 and positions == {63}
    greatest, positions = greatest_and_products(chunk=slice_)
    assert greatest <= rows * 63 * slice_ and positions == {63}
    greatest, positions = greatest_and_products(chunk=slice_, completion_length=completion)
    # besides the table, attention's 64 by 64 products are the largest then
    assert greatest <= max(rows * completion * slice_, rows * 64 * 64) and positions == {completion}


def test_a_model_takes_the_lengths():
    config = DecoderConfig(vocab_size=VOCAB, max_positions=LENGTH, width=4, layers=1, heads=2)
    plain, batch = language_model(config), draw_pairs(1, PAIRS, LENGTH, VOCAB)
    sliced = language_model(config, completion_length=longest(batch.completion_mask), chunk=10)
    params = jax.tree.map(lambda leaf: 20 * leaf, plain.init(jax.random.key(0)))
    both = [
        jax.jit(lambda p, m=model: (m.log_probs(p, batch), m.token_log_probs(p, batch.tokens)))
        for model in (plain, sliced)
    ]
    for one, other in zip(*(function(params) for function in both), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "head: chunk must be a positive whole number, got 0"),
        ({"chunk": 2.5}, "head: chunk must be a positive whole number, got 2.5"),
        ({"completion_length": -1}, "head: completion_length must be a positive whole number, got -1"),
        ({"shards": 3}, "head: a vocabulary of 46 does not lie in 3 equal shards"),
    ],
)
def test_lengths_without_meaning_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        language_model(DecoderConfig(vocab_size=VOCAB, max_positions=4, width=4, layers=1, heads=2), **options)


def test_on_a_mesh_pairs_and_slices_stay_where_they_lie():
    program = [sys.executable, "-m", "tests.models.head_mesh_program"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"pairs, Auto", "pairs, Explicit", "vocabulary, Auto"}
    assert {name: case["error"] for name, case in found.items() if not case["error"] < 1e-10} == {}
    for name in ("pairs, Auto", "pairs, Explicit"):
        assert found[name]["forward"] == []  # every row by itself
    # the table's gradient is summed over the pairs' devices
    assert {kind for kind, _ in found["pairs, Auto"]["step"]} == {"all-reduce"}
    # sums over the vocabulary, of a number a position; no slice is gathered
    case = found["vocabulary, Auto"]
    assert {kind for kind, _ in case["forward"]} == {"all-reduce"}
    assert all(WIDTH not in shape and size <= case["positions"] for _, shape, size in case["forward_sizes"])
