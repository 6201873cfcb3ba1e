"""Models whose rows see each other are refused by name; what only looks like it is not, and is exact."""

import jax
import jax.numpy as jnp
import pytest

from entangle import geometry
from entangle.errors import UnsupportedModelError
from tests import zoo
from tests.geometry.test_one_backward import hold, pairs

PARAMS = {"w": (zoo.WIDTH, zoo.WIDTH)}


def around(core):
    """A model of the hidden states ``[B, 2, T, D]`` of a batch, which a core may treat as it likes."""
    return zoo.around(lambda p, x, batch: core(x @ p["w"], batch))


def batch_norm(x, batch):
    return (x - x.mean((0, 1, 2), keepdims=True)) / jnp.sqrt(jnp.var(x, (0, 1, 2), keepdims=True) + 1e-5)


def between_sides(x, batch):
    return x - jnp.max(x, 1, keepdims=True)


def attention_across_rows(x, batch):
    flat = x.reshape(-1, x.shape[-1])
    return (jax.nn.softmax(flat @ flat.T, -1) @ flat).reshape(x.shape)


def running_sum(x, batch):
    """As the capacity of an expert is counted over all tokens of a batch."""
    return jnp.cumsum(x.reshape(-1, x.shape[-1]), 0).reshape(x.shape)


def in_a_scan(x, batch):
    """The second iteration is the first to see rows."""
    carried, _ = jax.lax.scan(lambda h, _: (x + h.mean((0, 1), keepdims=True), None), jnp.zeros_like(x), None, length=2)
    return carried


def checkpointed(x, batch):
    return jax.checkpoint(lambda x: x - jnp.sum(x, 0, keepdims=True))(x)


@jax.custom_jvp
def own_derivative(x):
    return x - x.mean(0, keepdims=True)


own_derivative.defjvp(lambda x, t: (own_derivative(*x), own_derivative(*t)))

MIXED = {
    "batch norm": (batch_norm, "reduce_sum"),
    "between sides": (between_sides, "reduce_max"),
    "attention across rows": (attention_across_rows, "reduce_max"),
    "running sum": (running_sum, "cumsum"),
    "in a scan": (in_a_scan, "reduce_sum"),
    "checkpointed": (checkpointed, "reduce_sum"),
    "with a derivative of its own": (lambda x, batch: own_derivative(x), "reduce_sum"),
    "a product over sides": (lambda x, b: jnp.einsum("qr,brtd->bqtd", jnp.ones((2, 2), x.dtype), x), "dot_general"),
}


@pytest.mark.parametrize("kind", MIXED)
def test_rows_that_see_each_other_are_refused_by_name(kind):
    core, operation = MIXED[kind]
    params = zoo.draw(PARAMS, 0, jnp.float32)
    with pytest.raises(UnsupportedModelError, match=rf"rows .* see each other \({operation} at {__file__}:"):
        geometry.parameter_uses(around(core), params, pairs(0))


def test_a_loss_across_rows_is_refused():
    def model(params, batch):
        return jax.nn.log_softmax(zoo.gpt(params, batch), 0)

    _, params = zoo.whole_models(jnp.float32)["gpt, tied"]
    for function in (geometry.vjp_with_geometry, geometry.pair_geometry, geometry.parameter_uses):
        with pytest.raises(UnsupportedModelError, match=r"rows .* see each other"):
            function(model, params, pairs(0))


def flattened(x, batch):
    flat = x.reshape(-1, x.shape[-1])
    return jnp.swapaxes(jnp.swapaxes(jax.nn.log_softmax(flat, -1), 0, 1), 0, 1).reshape(x.shape)


def over_tokens_in_other_axes(x, batch):
    """Rows are taken together in another order, and sums go over the tokens of one row."""
    together = jnp.transpose(x, (2, 0, 1, 3)).reshape(x.shape[2], -1, x.shape[3])
    return x + jnp.sum(together, 0).reshape(*x.shape[:2], 1, x.shape[3])


def own_index(x, batch):
    """The last token of each row, the row found by its number."""
    b, r, t, _ = x.shape
    last = x[jnp.arange(b)[:, None], jnp.arange(r)[None], t - 1]
    return x + last[:, :, None]


def one_row_at_a_time(x, batch):
    return jax.lax.map(lambda row: row - row.mean((-1, -2), keepdims=True), x.reshape(-1, *x.shape[2:])).reshape(
        x.shape
    )


def sorted_tokens(x, batch):
    """Tokens of all rows in the order of their experts, as dropless mixtures have them, and back."""
    flat = x.reshape(-1, x.shape[-1])
    order = jnp.argsort(jnp.argmax(flat, -1))
    return jnp.tanh(flat[order])[jnp.argsort(order)].reshape(x.shape)


def capacity(x, batch):
    """Tokens of all rows are counted, and those beyond an expert's capacity left out: no sum of floats, but rows meet."""
    flat = x.reshape(-1, x.shape[-1])
    expert = jnp.argmax(flat[:, :2], -1)
    place = jnp.cumsum(jax.nn.one_hot(expert, 2, dtype=jnp.int32), 0)
    kept = jnp.take_along_axis(place, expert[:, None], 1) <= 20
    return jnp.where(kept, flat, jnp.zeros_like(flat)).reshape(x.shape)


def other_side(x, batch):
    return x - x[:, ::-1]


def shifted(x, batch):
    return x - jnp.roll(x, 1, 0)


def against_the_first(x, batch):
    return x - x[:, :1]


def sorted_rows(x, batch):
    return jnp.sort(x, 0)


def sign_of_the_side(x, batch):
    return x * (1 - 2 * jnp.arange(x.shape[1], dtype=x.dtype)).reshape(1, -1, 1, 1)


def transformed(x, batch):
    return jnp.fft.fft(x, axis=0).real.astype(x.dtype)


UNKNOWN = [capacity, other_side, shifted, against_the_first, sorted_rows, sign_of_the_side, transformed]


@pytest.mark.parametrize("core", UNKNOWN, ids=lambda core: core.__name__)
def test_rows_that_meet_in_other_ways_are_warned_of(core):
    params = zoo.draw(PARAMS, 0, jnp.float32)
    with pytest.warns(UserWarning, match=rf"could not be shown that rows stay apart \(\w+ at {__file__}:"):
        geometry.parameter_uses(around(core), params, pairs(0))


def test_pairs_and_sides_exchanged_are_warned_of():
    _, params = zoo.whole_models(jnp.float32)["gpt, tied"]
    two = jax.tree.map(lambda leaf: leaf[:2], pairs(0))
    with pytest.warns(UserWarning, match="pairs and sides are exchanged"):
        geometry.parameter_uses(lambda p, b: zoo.gpt(p, b).T, params, two)


def test_results_that_differ_though_no_row_was_met_are_warned_of():
    model = lambda p, x: jnp.zeros(x.shape[:2]) + jnp.arange(2.0)[None, : x.shape[1]] + p  # noqa: E731
    with pytest.warns(UserWarning, match="numbers no row has met"):
        geometry.parameter_uses(model, jnp.ones(()), jnp.ones((3, 2, 4)))


def with_side_results(x, batch):
    """Means that the result does not depend on."""
    _ = x.mean()
    jax.debug.callback(lambda mean: None, x.mean())
    return x


SHOWN = [flattened, over_tokens_in_other_axes, one_row_at_a_time, with_side_results]


@pytest.mark.parametrize("core", SHOWN, ids=lambda core: core.__name__)
@pytest.mark.usefixtures("x64")
def test_rows_that_stay_apart_are_shown_to_and_exact(core):
    hold(around(core), zoo.draw(PARAMS, 0, jnp.float64), pairs(0), 1e-10)


@pytest.mark.parametrize("core", [own_index, sorted_tokens], ids=lambda core: core.__name__)
@pytest.mark.usefixtures("x64")
def test_rows_that_are_moved_and_moved_back_are_warned_of_and_exact(core):
    with pytest.warns(UserWarning, match="could not be shown that rows stay apart"):
        hold(around(core), zoo.draw(PARAMS, 0, jnp.float64), pairs(0), 1e-10)
