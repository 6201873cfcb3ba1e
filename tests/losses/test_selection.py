"""Objectives chosen by numbers give what the objectives themselves give."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import losses
from entangle.errors import UserError
from entangle.losses import RunningObjective
from entangle.types import PairLogProbs

PLAIN = [name for name, objective in losses.OBJECTIVES.items() if not isinstance(objective, RunningObjective)]


def numbers_of(name):
    """Its hyperparameters that are numbers, each a little off its default."""
    found = list(inspect.signature(losses.OBJECTIVES[name]).parameters.values())[1:]
    return {p.name: p.default * 0.875 for p in found if isinstance(p.default, float) and np.isfinite(p.default)}


@pytest.fixture(scope="module")
def lp():
    draws = jax.random.uniform(jax.random.key(0), (4, 5), minval=-30.0, maxval=-2.0)
    return PairLogProbs(*draws, jnp.array([4, 7, 3, 9, 5]), jnp.array([6, 2, 8, 4, 5]))


SETTINGS = [(name, numbers_of(name)) for name in PLAIN] + [(name, {}) for name in PLAIN]


@pytest.fixture(scope="module")
def expected(lp):
    return [losses.loss_and_coefficients(losses.get_objective(name, **given), lp) for name, given in SETTINGS]


@pytest.mark.parametrize("mapped", ["vmap", pytest.param("map", marks=pytest.mark.slow)])
def test_all_objectives_in_one_program(lp, expected, mapped):
    selection = losses.Selection(SETTINGS)

    def both(choice):
        return losses.loss_and_coefficients(selection.objective(choice), lp)

    over = jax.vmap(both) if mapped == "vmap" else lambda choices: jax.lax.map(both, choices)
    loss, d = jax.jit(over)(selection.choices)
    for k, ((name, _), (value, coefficients)) in enumerate(zip(SETTINGS, expected, strict=True)):
        np.testing.assert_allclose(loss[k], value, rtol=2e-6, atol=2e-6, err_msg=name)
        for found, wanted in zip(d, coefficients, strict=True):
            np.testing.assert_allclose(found[k], wanted, rtol=1e-5, atol=2e-6, err_msg=name)


def test_settings_that_differ_in_numbers_share_a_branch():
    selection = losses.Selection([("dpo", {"beta": 0.1}), ("dpo", {"beta": 0.5}), ("ipo", {"beta": 0.1}), ("dpo", {})])
    assert selection.choices.branch.tolist() == [0, 0, 1, 2]


def test_a_hyperparameter_that_its_code_branches_on_is_a_branch_of_its_own(lp):
    selection = losses.Selection([(f"{__name__}:branching", {"power": p}) for p in (1.0, 2.0, 2.0)])
    assert selection.choices.branch.tolist() == [0, 1, 1]
    found = jax.lax.map(lambda choice: selection.objective(choice)(lp), selection.choices)
    np.testing.assert_allclose(found[1], branching(lp, 2.0), rtol=1e-6)


def branching(lp, power=1.0):
    margin = lp.rejected - lp.chosen
    return margin if power == 1.0 else margin**2


def test_types_are_kept():
    assert isinstance(one("aot"), losses.BatchObjective)
    assert isinstance(one("beta_dpo"), RunningObjective)
    assert not isinstance(one("dpo"), losses.BatchObjective)
    mixed = losses.Selection([("aot", {}), ("dpo", {})])
    assert isinstance(mixed.objective(jax.tree.map(lambda x: x[1], mixed.choices)), losses.BatchObjective)


def one(name):
    selection = losses.Selection([(name, {})])
    return selection.objective(jax.tree.map(lambda x: x[0], selection.choices))


def test_a_running_objective_keeps_its_memory_and_its_hyperparameters(lp):
    selection = losses.Selection([("beta_dpo", {"beta": 0.1}), ("beta_dpo", {"beta": 0.3})])
    objective = selection.objective(jax.tree.map(lambda x: x[1], selection.choices))
    direct = losses.get_objective("beta_dpo", beta=0.3)
    memory, expected = (o.update(o.init(), lp) for o in (objective, direct))
    np.testing.assert_allclose(memory.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(objective.given(memory)(lp), direct.given(expected)(lp), rtol=1e-6)


def test_what_cannot_share_is_refused():
    with pytest.raises(ValueError, match="shares a program with itself alone"):
        losses.Selection([("beta_dpo", {}), ("dpo", {})])
    with pytest.raises(ValueError, match="no objective"):
        losses.Selection([])
    with pytest.raises(UserError, match=r"beta -1.* is not in"):
        losses.Selection([("dpo", {"beta": 0.1}), ("dpo", {"beta": -1.0})])
