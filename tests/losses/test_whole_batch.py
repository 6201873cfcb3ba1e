"""Objectives that look at the whole batch say so in their type, and are the same on one device and on eight."""

import functools
import inspect
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import losses
from entangle.types import PairLogProbs
from tests.losses.batches import BATCHES, as_jax

ROOT = Path(__file__).parents[2]
WHOLE = {"kto", "aot", "aot_unpaired", "amapo", "nll_token_mean", "mpo_token_mean", "bco_pair_shifted", "beta_dpo"}
RUNNING = {"bco_pair_shifted", "beta_dpo"}


def test_the_types_say_what_is_seen():
    assert {n for n, o in losses.OBJECTIVES.items() if isinstance(o, losses.BatchObjective)} == WHOLE
    assert {n for n, o in losses.OBJECTIVES.items() if isinstance(o, losses.RunningObjective)} == RUNNING


@pytest.mark.parametrize("name", sorted(WHOLE))
@pytest.mark.usefixtures("x64")
def test_half_a_batch_is_another_batch(name):
    """The type is no label alone: these do depend on the other pairs."""
    lp = as_jax(BATCHES["rising"], jnp.float64)
    half = PairLogProbs(*(field[::2] for field in lp))
    objective = losses.OBJECTIVES[name]
    assert float(jnp.max(jnp.abs(objective(half) - objective(lp)[::2]))) > 1e-6


@pytest.fixture(scope="module")
def found():
    program = [sys.executable, "-m", "tests.losses.whole_batch_program"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("how", ["auto", "explicit", "shard_map True", "shard_map False"])
def test_values_and_coefficients_are_the_same_on_eight_devices(found, how):
    assert set(found) == WHOLE | {"dpo"}
    assert {name: case[how] for name, case in found.items() if not case[how] < 1e-12} == {}


def test_losses_lie_as_the_pairs_do(found):
    assert [case["spec"] for case in found.values()] == [["data"]] * len(found)


def test_a_memory_is_that_of_the_whole_batch_on_every_device(found):
    for name in RUNNING:
        assert found[name]["memory"] < 1e-12 and found[name]["given"] < 1e-12
        assert found[name]["update refused"].startswith(f"{name} looks at the whole batch")
    assert found["kto"]["point refused"].startswith("kto_reference_point looks at the whole batch")


def test_arrays_that_are_not_on_the_mesh_and_batches_that_are_whole_are_taken_as_they_are(found):
    assert {name: case["off mesh"] for name, case in found.items() if not case["off mesh"] < 1e-12} == {}
    assert {name: case["whole"] for name, case in found.items() if not case["whole"] < 1e-12} == {}


@pytest.mark.parametrize("name", sorted(RUNNING))
def test_users_wiring_of_a_memory(name):
    """Defaults of the update alone, any name for the memory, signatures, and a scan in another precision."""
    objective = losses.OBJECTIVES[name]
    assert "memory" not in inspect.signature(objective.given(objective.init())).parameters

    @losses.running(lambda: jnp.zeros(()), lambda state, lp, rate=0.5, **_: rate * state + jnp.mean(lp.chosen))
    def mine(lp, state, beta=0.1):
        return beta * (lp.rejected - lp.chosen) + state

    lp = as_jax(BATCHES["rising"], jnp.float32)
    assert list(inspect.signature(mine).parameters) == ["lp", "beta"]
    state = mine.update(mine.update(mine.init(), lp), lp)
    np.testing.assert_allclose(state, 1.5 * jnp.mean(lp.chosen), rtol=1e-6)
    np.testing.assert_allclose(mine.given(state)(lp, 0.2), 0.2 * (lp.rejected - lp.chosen) + state, rtol=1e-6)
    with jax.enable_x64(True):
        wide = objective.init()
        memory, _ = jax.lax.scan(lambda m, x: (objective.update(m, x), 0), wide, jax.tree.map(lambda x: x[None], lp))
        assert all(jnp.isfinite(leaf) for leaf in jax.tree.leaves(memory))
    empty = PairLogProbs(*(field[:0] for field in lp))
    assert objective.update(wide, empty) is wide


def test_a_part_of_the_batch_is_refused_by_those_that_need_it_all(found):
    assert {name for name, case in found.items() if case["refused"]} == WHOLE
    message = found["aot"]["refused"]
    assert message.startswith("aot looks at the whole batch") and "losses.across(objective, axis_names)" in message


@pytest.mark.usefixtures("x64")
def test_bcos_shift_is_the_mean_over_all_batches():
    first, second = (as_jax(BATCHES[name], jnp.float64) for name in ("rising", "apart"))
    second = PairLogProbs(*(field[:100] for field in second))
    bco, memory = losses.bco_pair_shifted, losses.bco_pair_shifted.init()
    for lp in (first, second):
        memory = bco.update(memory, lp)
    ratios = [r for lp in (first, second) for r in losses.log_ratios(lp)]
    np.testing.assert_allclose(memory.mean, np.mean(np.concatenate(ratios)), rtol=1e-12)
    assert float(memory.seen) == 2 * (324 + 100)
    r_w, r_l = losses.log_ratios(second)
    shift = 0.2 * memory.mean
    expected = np.log1p(np.exp(shift - 0.2 * r_w)) + np.log1p(np.exp(0.2 * r_l - shift))
    np.testing.assert_allclose(bco.given(memory)(second, beta=0.2), expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_beta_dpos_average_moves_and_its_beta_follows():
    lp = as_jax(BATCHES["apart"], jnp.float64)
    margin = np.mean(np.subtract(*losses.log_ratios(lp)))
    objective = losses.get_objective("beta_dpo", momentum=0.5)
    memory = objective.update(objective.update(objective.init(), lp), lp)
    np.testing.assert_allclose(memory.mean, 0.75 * margin, rtol=1e-12)
    beta = 0.1 * (1 + 0.6 * 0.25 * margin)
    np.testing.assert_allclose(objective.given(memory)(lp), losses.dpo(lp, beta=beta), rtol=1e-12)
    down = lp._replace(chosen=lp.rejected, rejected=lp.chosen)
    np.testing.assert_allclose(objective.given(memory)(down), losses.dpo(down, beta=1e-3), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_memory_and_statistics_carry_no_gradient():
    """All but the two that sort: a pair's loss has slopes along its own log-probabilities alone."""
    lp = PairLogProbs(*(field[:6] for field in as_jax(BATCHES["apart"], jnp.float64)))
    lp = lp._replace(chosen=lp.chosen + 60.0)  # kto's point of reference is above 0, beta-DPO's beta above its lowest
    assert float(losses.kto_reference_point(lp)) > 0
    for name in sorted(WHOLE - {"aot", "aot_unpaired"}):
        for side in ("chosen", "rejected"):
            slopes = jax.jacobian(lambda x, side=side, name=name: losses.OBJECTIVES[name](lp._replace(**{side: x})))
            jacobian = slopes(getattr(lp, side))
            np.testing.assert_array_equal(jacobian, np.diag(np.diag(jacobian)), err_msg=name)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: losses.weighted_sum((1.0, losses.dpo), (0.5, o)),
        lambda o: losses.label_smoothed(o, 0.1),
        lambda o: losses.robust(o, 0.1),
        lambda o: losses.with_hyperparameters(o, beta=0.3),
    ],
)
def test_what_is_made_of_an_objective_of_the_batch_is_one(make):
    assert isinstance(make(losses.aot), losses.BatchObjective)
    assert not isinstance(make(losses.cdpo), losses.BatchObjective)


def test_a_memory_is_not_lost_in_a_sum():
    for part in (losses.bco_pair_shifted, functools.partial(losses.bco_pair_shifted, beta=0.1)):
        with pytest.raises(ValueError, match="an objective with a memory cannot be a part of another"):
            losses.weighted_sum((1.0, part))
    assert losses.whole_batch(losses.beta_dpo) is losses.beta_dpo
    hidden = lambda lp: losses.beta_dpo(lp) + losses.nll(lp)  # noqa: E731
    with losses.memory_needed(), pytest.raises(ValueError, match="beta_dpo remembers earlier batches"):
        hidden(as_jax(BATCHES["rising"], jnp.float32))
    for wrong in ((), ((losses.dpo, 1.0),), (losses.dpo, losses.nll)):
        with pytest.raises(ValueError, match="needs terms, pairs of weight and objective"):
            losses.weighted_sum(*wrong)
    with pytest.raises(ValueError, match=r"label_smoothing 0.5 is not in \[0, 0.5\)"):
        losses.robust(losses.dpo, 0.5)
    assert repr(losses.aot) == "<BatchObjective aot>"
