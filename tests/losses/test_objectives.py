"""Every objective of the table against the formulas of its docstring, evaluated by plain NumPy in float64."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import losses
from entangle.errors import UserError
from entangle.training.gradients import reward_scale
from entangle.types import PairLogProbs
from scripts.reference.formulas import parse
from tests.losses.batches import BATCHES, COUNT, as_jax, drawn, one
from tests.losses.naive import evaluate

OTHER = {  # hyperparameters away from the defaults, every one of them
    "dpo": {"beta": 0.7},
    "cdpo": {"beta": 0.3, "label_smoothing": 0.25},
    "robust_dpo": {"beta": 0.3, "label_smoothing": 0.35},
    "r_dpo": {"beta": 0.3, "alpha": 0.2},
    "margin_dpo": {"beta": 0.3, "margin": -2.5},
    "dpop": {"beta": 0.3, "penalty": 5.0},
    "dpop_outside": {"beta": 0.3, "penalty": 0.7},
    "dpo_shift": {"beta": 0.3, "shift": 0.6},
    "bdpo": {"beta": 0.3, "mixture": 0.9},
    "dpo_norm": {"beta": 0.4},
    "rpo": {"beta": 0.3, "eta": 2.0},
    "mpo_token_mean": {"beta": 0.3, "preference_weight": 0.5, "quality_weight": 2.0, "generation_weight": 0.1},
    "mpo": {"beta": 0.3, "preference_weight": 0.5, "quality_weight": 2.0, "generation_weight": 0.1},
    "f_dpo_forward_kl": {"beta": 0.4},
    "f_dpo_jensen_shannon": {"beta": 3.0},
    "f_dpo_alpha": {"beta": 0.3, "alpha": 1.02},
    "hinge": {"beta": 0.02},
    "ipo": {"beta": 0.02},
    "ipo_averaged": {"beta": 2.0},
    "exo_pair": {"beta": 0.02, "label_smoothing": 0.3},
    "discopop": {"beta": 0.1, "temperature": 1.5},
    "lpo": {"beta": 0.05, "chosen_weight": 0.4, "rejected_weight": 2.0, "penalty": 0.3},
    "nca_pair": {"beta": 0.3},
    "bco_pair": {"beta": 0.3},
    "bco_pair_shifted": {"beta": 0.3},
    "kto": {"beta": 0.4, "desirable": 1.3, "undesirable": 0.6},
    "apo_zero": {"beta": 0.02},
    "apo_down": {"beta": 0.02},
    "sppo": {"beta": 0.05},
    "cal_dpo": {"beta": 0.05},
    "cal_dpo_halved": {"beta": 0.05},
    "aot": {"beta": 0.3, "label_smoothing": 0.2},
    "aot_unpaired": {"beta": 0.3, "label_smoothing": 0.2},
    "beta_dpo": {"beta": 0.3, "strength": 0.05, "momentum": 0.5, "lowest": 0.2},
    "amapo": {"beta": 0.5},
    "cpo": {"beta": 0.5, "nll_weight": 0.1},
    "simpo": {"beta": 10.0, "gamma": 3.0},
    "alphapo": {"beta": 0.7, "gamma": 0.4, "alpha": -0.3},
    "orpo": {"odds_weight": 3.0},
    "asft": {"weight": 0.2},
    "rrhf": {"nll_weight": 0.3},
    "slic_hf": {"delta": 7.0, "nll_weight": 0.0},
    "nll": {},
    "nll_averaged": {},
    "nll_token_mean": {},
}
NAMES = list(losses.OBJECTIVES)
CASES = [(name, hp) for name in NAMES for hp in ([{}, OTHER[name]] if OTHER.get(name) else [{}])]


def sides(d):
    return {"d_w": np.asarray(d.chosen), "d_l": np.asarray(d.rejected)}


def test_every_objective_of_the_table_is_tested_at_all_its_hyperparameters():
    assert set(OTHER) == set(losses.OBJECTIVES)
    for name, objective in losses.OBJECTIVES.items():
        defaults = {p.name: p.default for p in list(inspect.signature(objective).parameters.values())[1:]}
        assert set(OTHER[name]) == set(defaults)
        assert all(OTHER[name][key] != value for key, value in defaults.items())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("name", "hp"), CASES)
@pytest.mark.usefixtures("x64")
def test_values_and_coefficients_equal_the_formulas(name, hp, batch):
    objective, lp = losses.OBJECTIVES[name], as_jax(BATCHES[batch], jnp.float64)
    expected = evaluate(objective, BATCHES[batch], **hp)
    loss, d = losses.loss_and_coefficients(objective, lp, **hp)
    assert loss.dtype == d.chosen.dtype == d.rejected.dtype == jnp.float64
    np.testing.assert_allclose(loss, expected["L"], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(losses.get_objective(name, **hp)(lp), expected["L"], rtol=1e-12, atol=1e-15)
    for side, found in sides(d).items():
        np.testing.assert_allclose(found, expected[side], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("name", "hp"), CASES)
def test_what_the_page_says_of_condition_2_is_so(name, hp, batch):
    """The ratio of the coefficients, and where they are negative; on numbers that do not drown in rounding."""
    said, found = parse(losses.OBJECTIVES[name]), evaluate(losses.OBJECTIVES[name], BATCHES[batch], **hp)
    if said.ratio is not None:
        known = (np.abs(found["ratio"]) < 1e50) & (np.abs(found["d_l"]) > 1e-50)
        assert known.any() or batch in ("extreme", "apart", "kinks")
        np.testing.assert_allclose(
            found["ratio"][known] * found["d_l"][known], found["d_w"][known], rtol=1e-9, atol=1e-12
        )
    for side in ("d_w", "d_l"):
        negative = found[side] < -1e-12
        if side not in said.negative:
            assert not negative.any()
        elif said.negative[side] is not None:
            clear = np.abs(found[side]) > 1e-12
            np.testing.assert_array_equal(negative[clear], found[f"{side} < 0"][clear])


def test_coefficients_that_may_be_negative_are_somewhere():
    for name, objective in losses.OBJECTIVES.items():
        for side in parse(objective).negative:
            found = [evaluate(objective, lp, **hp)[side] for lp in BATCHES.values() for hp in ({}, OTHER[name])]
            assert np.concatenate(found).min() < 0, (name, side)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("x64")
def test_reference_free_is_what_does_not_depend_on_the_reference(name):
    lp = as_jax(BATCHES["falling"], jnp.float64)
    moved = lp._replace(ref_chosen=lp.ref_chosen - 1.0, ref_rejected=lp.ref_rejected[::-1])
    same = bool(jnp.all(losses.OBJECTIVES[name](lp) == losses.OBJECTIVES[name](moved)))
    assert same != parse(losses.OBJECTIVES[name]).needs_reference


@pytest.mark.parametrize(("name", "hp"), CASES)
def test_float32_is_finite_with_finite_coefficients_on_the_extreme_batch(name, hp):
    loss, d = losses.loss_and_coefficients(losses.OBJECTIVES[name], as_jax(BATCHES["extreme"], jnp.float32), **hp)
    for array in (loss, *d):
        assert array.dtype == jnp.float32
        assert bool(jnp.all(jnp.isfinite(array)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_widened_before_anything_is_computed(name, dtype):
    half = as_jax(drawn(0.0), dtype)._replace(chosen_length=jnp.arange(COUNT), rejected_length=jnp.arange(COUNT)[::-1])
    wide = PairLogProbs(*(field.astype(jnp.float32) for field in half))
    for got, expected in zip(
        jax.tree.leaves(losses.loss_and_coefficients(losses.OBJECTIVES[name], half)),
        jax.tree.leaves(losses.loss_and_coefficients(losses.OBJECTIVES[name], wide)),
        strict=True,
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", [n for n in NAMES if not isinstance(losses.OBJECTIVES[n], losses.BatchObjective)])
@pytest.mark.usefixtures("x64")
def test_a_plain_function_sees_no_other_pair(name):
    """What is no BatchObjective keeps its promise: neither values nor gradients depend on the rest of the batch."""
    lp, objective = as_jax(BATCHES["rising"], jnp.float64), losses.OBJECTIVES[name]
    six = PairLogProbs(*(field[:6] for field in lp))
    np.testing.assert_allclose(objective(six), objective(lp)[:6], rtol=1e-13)
    for side in ("chosen", "rejected"):
        jacobian = jax.jacobian(lambda x, side=side: objective(six._replace(**{side: x})))(getattr(six, side))
        np.testing.assert_array_equal(jacobian, np.diag(np.diag(jacobian)))


def test_coefficients_of_a_users_own_objective():
    def exponential(lp, rate):
        return jnp.exp(rate * (lp.rejected - 2.0 * lp.chosen))

    d = losses.coefficients(exponential, one(-1.0, -3.0, 0.0, 0.0, 1.0, 1.0), rate=0.5)
    # x = exp(0.5 * (-3 + 2)); dL/dl_w = -2 * 0.5 x, dL/dl_l = 0.5 x
    np.testing.assert_allclose([d.chosen[0], d.rejected[0]], [math.exp(-0.5), 0.5 * math.exp(-0.5)], rtol=1e-6)


@pytest.mark.parametrize("shape", [lambda x: jnp.mean(x), lambda x: x[:, None], lambda x: x[:-1]])
def test_an_objective_of_another_shape_is_refused_by_name(shape):
    def crooked(lp):
        return shape(losses.dpo(lp))

    with pytest.raises(ValueError, match=r"crooked returned shape .*one loss a pair is needed, \(324,\)"):
        losses.coefficients(crooked, as_jax(BATCHES["rising"], jnp.float32))


@pytest.mark.parametrize("name", NAMES)
def test_hyperparameters_may_be_traced_and_everything_maps_over_a_further_axis(name):
    lp, hp = as_jax(BATCHES["rising"], jnp.float32), OTHER[name]
    two = {key: jnp.array([value, 1.25 * value], jnp.float32) for key, value in hp.items()} | {"": jnp.zeros(2)}

    def both(values):
        return losses.loss_and_coefficients(losses.OBJECTIVES[name], lp, **{k: v for k, v in values.items() if k})

    mapped = jax.jit(jax.vmap(both))(two)
    for i in range(2):
        single = both({key: float(values[i]) for key, values in two.items()})
        for got, expected in zip(jax.tree.leaves(mapped), jax.tree.leaves(single), strict=True):
            np.testing.assert_allclose(got[i], expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "hp", "message"),
    [
        ("simpo", {"alpha": 1.0}, r"'simpo' has no hyperparameter alpha: it has beta, gamma"),
        ("ld_dpo", {}, r"'ld_dpo' takes log-probabilities of tokens, .*: training.row_gradients trains with it"),
        ("nll", {"beta": 1.0}, r"'nll' has no hyperparameter beta: it has none"),
        ("ipo", {"beta": 0.0}, r"'ipo': beta 0.0 is not in \(0, inf\)"),
        ("robust_dpo", {"label_smoothing": 0.5}, r"'robust_dpo': label_smoothing 0.5 is not in \[0, 0.5\)"),
        ("exo_pair", {"label_smoothing": 0.0}, r"'exo_pair': label_smoothing 0.0 is not in \(0, 0.5\)"),
        ("bdpo", {"mixture": 1.5}, r"'bdpo': mixture 1.5 is not in \(0, 1\]"),
        ("beta_dpo", {"momentum": 1.0}, r"'beta_dpo': momentum 1.0 is not in \[0, 1\)"),
        ("kto", {"desirable": -1.0}, r"'kto': desirable -1.0 is not in \[0, inf\)"),
        ("dpo", {"beta": float("nan")}, r"'dpo': beta nan is not in \(0, inf\)"),
        ("dpo", {"beta": "much"}, r"'dpo': beta 'much' is no number"),
        ("dpo", {"beta": True}, r"'dpo': beta True is no number"),
        ("dpo", {"beta": None}, r"'dpo': beta None is no number"),
        ("dpo", {"beta": 10**400}, r"'dpo': beta 1000.* is not in \(0, inf\)"),
        ("margin_dpo", {"margin": float("inf")}, r"'margin_dpo': margin inf is not in \(-inf, inf\)"),
        (
            "IPO-averaged",
            {},
            r"unknown objective 'IPO-averaged' \(did you mean ipo_averaged\?\): choose one of alphapo",
        ),
        (None, {}, r"an objective is looked up by its name, not by None"),
        ("entangle.losses:ld_dpo", {}, r"takes log-probabilities of tokens, .*: training.row_gradients trains with it"),
        ("sppo", {"beta": 1e-30}, r"'sppo': at \{'beta': 1e-30\} the loss of an ordinary pair is not finite"),
    ],
)
def test_get_objective_refuses_what_cannot_work(name, hp, message):
    with pytest.raises(UserError, match=message):
        losses.get_objective(name, **hp)


def test_get_objective_keeps_name_type_and_defaults():
    for name in NAMES:
        fixed = losses.get_objective(name, **OTHER[name])
        assert type(fixed) is type(losses.OBJECTIVES[name]) or not isinstance(fixed, losses.BatchObjective)
        assert isinstance(fixed, losses.BatchObjective) == isinstance(losses.OBJECTIVES[name], losses.BatchObjective)
        assert fixed.__name__ == name
        found = {p.name: p.default for p in list(inspect.signature(fixed).parameters.values())[1:]}
        assert found == OTHER[name]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of one's own on the path."""
    code = (
        "import jax, jax.numpy as jnp\n"
        "def cubic(lp, target=1.0):\n"
        "    return jax.nn.relu(target - lp.chosen + lp.rejected) ** 3\n"
        "def mean(lp):\n"
        "    return jnp.mean(lp.chosen)\n"
        "number = 3\n"
        "def crooked(lp):\n"
        "    return lp.chosen.no_such_thing\n"
        "def none(lp, beta=None):\n"
        "    return lp.rejected - lp.chosen\n"
        "def named(lp, name=1.0):\n"
        "    return name * (lp.rejected - lp.chosen)\n"
        "class Own:\n"
        "    def __call__(self, lp, scale=2.0):\n"
        "        return scale * (lp.rejected - lp.chosen)\n"
        "own = Own()\n"
        "def hinted(lp: 'NotThere', beta: float = 1.0) -> 'NotThereEither':\n"
        "    return beta * (lp.rejected - lp.chosen)\n"
    )
    (tmp_path / "my_objectives_of_a_test.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_objectives_of_a_test"


@pytest.mark.parametrize(
    ("name", "hp", "expected"),
    [("none", {}, 4.0), ("named", {"name": 3.0}, 12.0), ("own", {"scale": 0.5}, 2.0), ("hinted", {"beta": 2.0}, 8.0)],
)
def test_ordinary_python_is_an_objective(mine, name, hp, expected):
    objective = losses.get_objective(f"{mine}:{name}", **hp)
    assert objective(one(-5.0, -1.0, 0.0, 0.0, 1.0, 1.0)).tolist() == [expected]
    assert reward_scale(objective) == hp.get("beta", 1.0)


def test_numbers_of_numpy_and_a_value_for_each_pair_are_hyperparameters():
    lp = as_jax(drawn(0.0), jnp.float32)
    for beta in (np.float32(0.25), np.array(0.25), jnp.array(0.25), 0.25):
        np.testing.assert_allclose(losses.get_objective("dpo", beta=beta)(lp), losses.dpo(lp, beta=0.25), rtol=1e-6)
    margins = jnp.linspace(0.0, 1.0, COUNT)
    found = losses.get_objective("margin_dpo", margin=margins)(lp)
    np.testing.assert_allclose(found[-1], losses.margin_dpo(lp, margin=1.0)[-1], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_hyperparameters_may_be_given_by_position_and_a_batch_may_be_empty(name):
    lp, values = as_jax(drawn(0.0), jnp.float32), OTHER[name]
    order = [p for p in inspect.signature(losses.OBJECTIVES[name]).parameters if p in values]
    by_position = losses.OBJECTIVES[name](lp, *(values[p] for p in order))
    np.testing.assert_array_equal(by_position, losses.OBJECTIVES[name](lp, **values))
    empty = PairLogProbs(*(field[:0] for field in lp))
    assert losses.OBJECTIVES[name](empty).shape == (0,)


def test_the_rates_of_alphapo_and_the_alpha_divergence_have_slopes_at_their_limits():
    lp = as_jax(drawn(0.0), jnp.float32)
    for objective, limit in ((losses.alphapo, 0.0), (losses.f_dpo_alpha, 1.0)):
        total = lambda alpha, objective=objective: jnp.sum(objective(lp, alpha=alpha))  # noqa: E731
        around = (total(limit + 1e-3) - total(limit - 1e-3)) / 2e-3
        np.testing.assert_allclose(jax.grad(total)(limit), around, rtol=2e-2)


def test_an_objective_of_ones_own_by_module_and_name(mine):
    objective = losses.get_objective(f"{mine}:cubic", target=2.0)
    assert objective(one(-1.0, -1.0, 0.0, 0.0, 1.0, 1.0)).tolist() == [8.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such_module_at_all:f",
            r"module 'no_such_module_at_all' cannot be imported: ModuleNotFoundError: No module",
        ),
        ("{mine}:crooked", r"on two ordinary pairs: AttributeError: .*no_such_thing"),
        ("math:log", r"'math:log': "),
        (".x:y", r"module '.x' cannot be imported: TypeError"),
        ("{mine}:square", r"module 'my_objectives_of_a_test' has no 'square'"),
        ("{mine}:number", r"it is no function, but int"),
        ("{mine}:mean", r"mean returned shape \(\): one loss a pair is needed, \(2,\)"),
        (":f", r"module '' cannot be imported"),
    ],
)
def test_an_objective_of_ones_own_that_cannot_work_is_refused_in_one_line(mine, name, message):
    with pytest.raises(UserError, match=message) as error:
        losses.get_objective(name.format(mine=mine))
    assert "\n" not in str(error.value)
