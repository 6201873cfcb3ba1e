"""Pair chains by name: what stands around the whole chain has the last word; settings are checked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from entangle.errors import UserError
from entangle.training import pair_chain, pair_chains
from entangle.types import PairGradients

# plain, the chosen response falls, and under Adam it does so even where the rejected gradient is projected first
GRADIENTS = PairGradients(jnp.array([1.0, 0.2, 0.0]), jnp.array([3.0, 0.1, 1.0]))


def chosen_change(name, optimizer, **settings):
    """To first order, at the second of two steps."""
    found = pair_chain(name, **settings)
    tx = found.around(optax.chain(found.head, optimizer))
    params = jnp.ones(3)
    earlier = PairGradients(jnp.array([0.0, 1.0, 1.0]), GRADIENTS.rejected)
    _, state = tx.update(earlier, tx.init(params), params)
    return float(jnp.vdot(GRADIENTS.chosen, tx.update(GRADIENTS, state, params)[0]))


@pytest.mark.parametrize("name", ["protect_chosen", "retain_invariant"])
@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adam(0.1)], ids=["sgd", "adam"])
def test_wrappers_keep_the_chosen_side_whatever_the_optimizer(name, optimizer):
    assert chosen_change("margin", optimizer) < -0.01
    assert abs(chosen_change(name, optimizer)) < 1e-6  # on the edge of what is allowed


def test_a_projection_before_the_optimizer_keeps_it_under_sgd_alone():
    assert abs(chosen_change("project_retain", optax.sgd(0.1))) < 1e-6
    assert abs(chosen_change("project_retain", optax.adam(0.1))) > 0.01


def test_wrappers_remember_as_many_steps_as_was_said():
    found = pair_chain("retain_invariant", memory=3)
    state = found.around(optax.chain(found.head, optax.sgd(0.1))).init(jnp.ones(5))
    assert [leaf.shape for leaf in jax.tree.leaves(state.retain.earlier)] == [(3, 5)]


def test_every_name_makes_a_chain():
    for name in pair_chains():
        found = pair_chain(name)
        tx = found.around(optax.chain(found.head, optax.sgd(0.1)))
        params = jnp.ones(3)
        update, _ = tx.update(GRADIENTS, tx.init(params), params)
        assert np.all(np.isfinite(update)) and np.any(update != 0), name


@pytest.mark.parametrize(("name", "setting"), [("cagrad", "c"), ("project_retain", "memory")])
def test_a_setting_that_is_no_number_is_refused(name, setting):
    with pytest.raises(UserError, match=f"{name}': {setting}: a (whole )?number is needed, got '0.4'"):
        pair_chain(name, **{setting: "0.4"})


@pytest.mark.parametrize("memory", [-1.0, 0.5, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["project_retain", "retain_invariant"])
def test_a_memory_that_is_no_number_of_steps_is_refused(name, memory):
    with pytest.raises(UserError, match=rf"^pair chain '{name}': memory: {memory:g} is no whole number from 0 up"):
        pair_chain(name, memory=memory)


def test_unknown_names_and_settings_are_refused():
    with pytest.raises(UserError, match=r"^unknown pair chain 'protect_chose' \(did you mean protect_chosen\?\)"):
        pair_chain("protect_chose")
    with pytest.raises(UserError, match=r"^pair chain 'protect_chosen': no setting 'memory'; it has none"):
        pair_chain("protect_chosen", memory=2)
