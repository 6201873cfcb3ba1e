import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from entangle import losses, transforms
from entangle.training.gradients import PreferenceExamples, preference_gradients
from entangle.training.step import init_state, make_step
from tests.toy import MODELS, draw_pairs, draw_params, flatten, pair_log_probs, row_gradients

MLP = MODELS["mlp"]
STEPS = 3


def _setting():
    """Parameters, a fresh batch a step, and a probe; float64."""
    params, reference = (draw_params("mlp", seed, jnp.float64) for seed in (0, 1))
    batches = [PreferenceExamples(pairs, MLP(reference, pairs)) for pairs in map(draw_pairs, range(STEPS))]
    return params, batches, draw_pairs(9)


def _schedule(step):
    return 0.01 * (1 + step)


@functools.cache
def _run(instrumented):
    """Final state and the results of every step, with all diagnostics or with none."""
    params, batches, probe = _setting()
    tx = optax.chain(transforms.combine_pair(transforms.margin()), optax.adamw(_schedule, weight_decay=0.1))
    gradient_fn = preference_gradients(MLP, losses.dpo, with_geometry=instrumented)
    step = jax.jit(make_step(gradient_fn, tx, _schedule, MLP if instrumented else None))
    state, results = init_state(params, tx), []
    for batch in batches:
        state, result = step(state, batch, probe)
        results.append(result)
    return state, results


@pytest.mark.usefixtures("x64")
def test_steps_equal_hand_written_optax_steps_on_the_mean_loss():
    params, batches, probe = _setting()
    state, results = _run(instrumented=True)

    tx = optax.adamw(_schedule, weight_decay=0.1)
    expected, opt_state = params, tx.init(params)
    for i, batch in enumerate(batches):

        def loss(p, batch=batch):
            return jnp.mean(losses.dpo(pair_log_probs(MLP(p, batch.pairs), batch.reference, batch.pairs)))

        value, gradient = jax.value_and_grad(loss)(expected)
        updates, opt_state = jax.jit(tx.update)(gradient, opt_state, expected)
        before, expected = expected, optax.apply_updates(expected, updates)
        metrics = {key: float(x) for key, x in results[i].metrics.items()}
        u = flatten(updates)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-7)
        np.testing.assert_allclose(metrics["learning_rate"], 0.01 * (1 + i), rtol=1e-6)
        np.testing.assert_allclose(metrics["update_norm"], np.linalg.norm(u), rtol=1e-7)
        plain = row_gradients(MLP, before, batch.pairs) @ (-0.01 * (1 + i) * flatten(gradient))
        right = np.sign(plain) == np.sign(np.asarray(MLP(expected, batch.pairs)) - np.asarray(MLP(before, batch.pairs)))
        np.testing.assert_allclose(metrics["predicted_batch/chosen"], plain[:, 0].mean(), rtol=1e-6)
        np.testing.assert_allclose(metrics["predicted_batch/rejected"], plain[:, 1].mean(), rtol=1e-6)
        np.testing.assert_allclose(metrics["agreement/predicted_batch"], np.mean(right), rtol=1e-6)
        for pairs, prefix in ((batch.pairs, ""), (probe, "probe/")):
            first_order = row_gradients(MLP, before, pairs) @ u
            realised = np.asarray(MLP(expected, pairs)) - np.asarray(MLP(before, pairs))
            right = np.mean(np.sign(first_order) == np.sign(realised))
            np.testing.assert_allclose(metrics[f"{prefix}agreement/first_order"], right, rtol=1e-6)
            for side, name in enumerate(("chosen", "rejected")):
                np.testing.assert_allclose(
                    metrics[f"{prefix}first_order/{name}"], first_order[:, side].mean(), rtol=1e-6
                )
                np.testing.assert_allclose(metrics[f"{prefix}realised/{name}"], realised[:, side].mean(), rtol=1e-6)
    assert int(state.step) == STEPS
    # the head of the chain rounds before Adam divides by the root of a small second moment
    np.testing.assert_allclose(flatten(state.params), flatten(expected), rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("x64")
def test_instrumentation_does_not_change_the_parameters():
    full, results = _run(instrumented=True)
    bare, bare_results = _run(instrumented=False)
    np.testing.assert_allclose(flatten(full.params), flatten(bare.params), rtol=1e-12, atol=1e-14)
    extra = set(results[0].metrics) - set(bare_results[0].metrics)
    groups = {"geometry", "case", "predicted", "predicted_batch", "first_order", "realised", "agreement", "probe"}
    assert {key.split("/")[0] for key in extra} == groups
