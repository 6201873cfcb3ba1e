"""References scored inside the step: frozen, moving, or the policy without its adapter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from entangle import losses, models, training, transforms
from entangle.training.checkpoints import Checkpoints
from entangle.training.gradients import preference_gradients
from tests.toy import MODELS, draw_pairs, draw_params, flatten

MLP = MODELS["mlp"]


def run(objective, reference, steps, *, rate=0.3, examples=None, donate=False):
    """Train on one batch; the states before every step and after the last, and the metrics of every step."""
    params = draw_params("mlp", 1, jnp.float32)
    examples = examples or training.PreferenceExamples(draw_pairs(0))
    tx = optax.chain(transforms.combine_pair(transforms.margin()), optax.sgd(rate))
    gradients = preference_gradients(MLP, objective, with_geometry=False, reference=reference)
    step = jax.jit(
        training.make_step(gradients, tx, optax.constant_schedule(rate)), donate_argnums=(0,) if donate else ()
    )
    memory = training.preference_memory(objective, params, reference)
    states, metrics = [training.init_state(params, tx, memory)], []
    for _ in range(steps):
        before = jax.tree.map(jnp.copy, states[-1]) if donate else states[-1]
        state, result = step(before, examples)
        states.append(state)
        metrics.append(result.metrics)
    return states, metrics


def test_a_frozen_copy_gives_what_scores_taken_before_give():
    pairs, params = draw_pairs(0), draw_params("mlp", 1, jnp.float32)
    scored = training.PreferenceExamples(pairs, MLP(params, pairs))
    inside, _ = run(losses.dpo, training.frozen_copy(), 4, donate=True)
    outside, _ = run(losses.dpo, None, 4, examples=scored)
    np.testing.assert_allclose(flatten(inside[-1].params), flatten(outside[-1].params), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(flatten(inside[-1].memory.reference), flatten(params))
    assert np.any(flatten(inside[-1].params) != flatten(params))


def test_a_moving_reference_is_nearer_after_every_so_many_steps_and_else_stays():
    rate, every = 0.25, 3
    states, _ = run(losses.dpo, training.moving_reference(rate, every), 8)
    expected = flatten(states[0].params)
    for taken in range(8):  # the memory after step `taken` is what that step was scored with
        if taken in (3, 6):
            expected = rate * flatten(states[taken].params) + (1 - rate) * expected
        np.testing.assert_allclose(flatten(states[taken + 1].memory.reference.params), expected, rtol=1e-6, atol=1e-7)


def test_a_hard_update_makes_the_loss_log_2_again():
    _, metrics = run(losses.dpo, training.moving_reference(1.0, 2), 5)
    found = [float(m["loss"]) for m in metrics]
    np.testing.assert_allclose([found[0], found[2], found[4]], np.log(2), rtol=1e-5)
    assert found[1] < 0.69 and found[3] < 0.69


@pytest.mark.parametrize(("rate", "every"), [(0.0, 1), (1.5, 1), (0.5, 0)])
def test_a_moving_reference_that_cannot_move_is_refused(rate, every):
    with pytest.raises(ValueError, match=r"a rate in \(0, 1\] and at least one step are needed"):
        training.moving_reference(rate, every)


def test_memory_of_objective_and_reference_goes_on_from_a_checkpoint(tmp_path):
    objective = losses.beta_dpo
    states, _ = run(objective, training.moving_reference(0.5, 2), 3)
    assert float(states[-1].memory.objective.mean) != 0.0
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, states[-1], {})
    restored, _ = checkpoints.restore(states[0])
    checkpoints.close()
    for left, right in zip(jax.tree.leaves(restored), jax.tree.leaves(states[-1]), strict=True):
        np.testing.assert_array_equal(left, right)
    assert int(restored.memory.reference.step) == 3


def test_a_running_objective_is_trained_with_its_memory():
    """The second step's loss is that at the memory of two batches, not that of a first step."""
    params = draw_params("mlp", 1, jnp.float32)
    pairs = draw_pairs(0)
    scored = training.PreferenceExamples(pairs, MLP(params, pairs) + jnp.array([[2.0, -1.0]]))
    objective = losses.get_objective("beta_dpo", momentum=0.5, strength=0.3)
    states, metrics = run(objective, None, 2, examples=scored)
    memory = objective.init()
    for i in range(2):
        lp = training.gradients.pair_log_probs(MLP(states[i].params, pairs), scored)
        memory = objective.update(memory, lp)
        np.testing.assert_allclose(metrics[i]["loss"], jnp.mean(objective.given(memory)(lp)), rtol=1e-5)
        np.testing.assert_allclose(states[i + 1].memory.objective.mean, memory.mean, rtol=1e-5)
    assert abs(float(metrics[1]["loss"]) - float(jnp.mean(objective(lp)))) > 1e-4


class Adapted(nnx.Module):
    """A bigram model whose two layers carry low-rank adapters."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.up = nnx.LoRALinear(6, 8, lora_rank=2, rngs=rngs)
        self.head = nnx.LoRALinear(8, 7, lora_rank=2, rngs=rngs)

    def __call__(self, tokens):
        return self.head(jnp.tanh(self.up(self.embed(tokens))))


def test_with_the_adapter_off_the_base_model_is_left_bit_for_bit():
    module, pairs = Adapted(nnx.Rngs(0)), draw_pairs(0)
    base, whole = models.log_prob_function(module)
    adapter_fn, adapter = models.log_prob_function(module, wrt=nnx.LoRAParam)
    adapter = jax.tree.map(lambda x: x + 0.5, adapter)  # a trained one: both factors away from zero
    reference = training.adapter_off()
    zeros = reference.params(reference.init(adapter), adapter)
    plain = jax.tree.map_with_path(lambda path, x: 0 * x if "lora" in jax.tree_util.keystr(path) else x, whole)
    np.testing.assert_array_equal(adapter_fn(zeros, pairs), base(plain, pairs))
    assert float(jnp.max(jnp.abs(adapter_fn(adapter, pairs) - adapter_fn(zeros, pairs)))) > 1e-2


def test_an_adapter_is_trained_against_its_base():
    module = Adapted(nnx.Rngs(0))
    log_prob_fn, adapter = models.log_prob_function(module, wrt=nnx.LoRAParam)
    reference, examples = training.adapter_off(), training.PreferenceExamples(draw_pairs(0))
    gradients = preference_gradients(log_prob_fn, losses.dpo, reference=reference)
    memory = training.preference_memory(losses.dpo, adapter, reference)
    first = gradients(adapter, examples, jnp.asarray(0.1), memory)
    np.testing.assert_allclose(first.losses, np.log(2), rtol=1e-6)  # lora_b begins at zero: policy = base
    tx = optax.chain(transforms.combine_pair(transforms.margin()), optax.sgd(0.5))
    step = jax.jit(training.make_step(gradients, tx, optax.constant_schedule(0.5)))
    state = training.init_state(adapter, tx, memory)
    for _ in range(10):
        state, result = step(state, examples)
    assert float(result.metrics["loss"]) < 0.68


def test_policy_and_reference_of_one_step_agree_at_the_start():
    """What decides dpop's kink: log-ratios at the first step, when both are the same parameters scored in one step."""
    config = models.DecoderConfig(vocab_size=40, max_positions=16, width=16, layers=2, heads=2)
    model = models.language_model(config)
    params, reference = model.init(jax.random.key(0)), training.frozen_copy()
    pairs = draw_pairs(3, pairs=8, length=12, vocab=40)
    gradients = preference_gradients(model.log_probs, losses.dpop, reference=reference)
    memory = training.preference_memory(losses.dpop, params, reference)
    result = jax.jit(gradients)(params, training.PreferenceExamples(pairs), jnp.asarray(0.1), memory)
    # two programs that XLA may fuse differently: within two units in the last place of log-probabilities of some 30 nats
    assert 16 < float(jnp.max(-result.metrics["log_prob/chosen"])) < 64
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(result.metrics[f"log_ratio/{side}"], 0.0, atol=2 * 2**-18)


def test_an_evaluation_is_made_with_the_memory_of_training():
    pairs, params = draw_pairs(0), draw_params("mlp", 1, jnp.float32)
    scored = training.PreferenceExamples(pairs, MLP(params, pairs) + jnp.array([[2.0, -1.0]]))
    states, _ = run(losses.beta_dpo, None, 6, examples=scored)
    diagnose = training.pair_diagnostics(MLP, losses.beta_dpo, with_geometry=False)
    found = diagnose(states[-1].params, scored, jnp.asarray(0.1), states[-1].memory)
    lp = training.gradients.pair_log_probs(MLP(states[-1].params, pairs), scored)
    expected = losses.beta_dpo.given(states[-1].memory.objective)(lp)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    assert float(jnp.max(jnp.abs(expected - losses.beta_dpo(lp)))) > 1e-4
    with pytest.raises(ValueError, match="this step remembers"):
        diagnose(states[-1].params, scored, jnp.asarray(0.1))


def test_a_reference_that_is_missing_is_asked_for():
    with pytest.raises(ValueError, match=r"no reference log-probabilities: give PreferenceExamples.reference"):
        preference_gradients(MLP, losses.dpo)(
            draw_params("mlp", 1, jnp.float32), training.PreferenceExamples(draw_pairs(0)), jnp.asarray(0.1)
        )


@pytest.mark.parametrize(
    "hide", [lambda o: functools.partial(o, strength=0.3), lambda o: lambda lp: o(lp, strength=0.3)]
)
def test_a_hidden_memory_is_found_or_asked_for(hide):
    objective, params = hide(losses.beta_dpo), draw_params("mlp", 1, jnp.float32)
    examples = training.PreferenceExamples(draw_pairs(0), jnp.zeros((5, 2)))
    memory = training.preference_memory(objective, params)
    gradients = preference_gradients(MLP, objective, with_geometry=False)
    if isinstance(objective, functools.partial):
        assert float(gradients(params, examples, jnp.asarray(0.1), memory).memory.objective.mean) != 0.0
    else:
        with pytest.raises(ValueError, match="beta_dpo remembers earlier batches, and inside of another function"):
            gradients(params, examples, jnp.asarray(0.1), memory)


@pytest.mark.parametrize(("objective", "reference"), [(losses.beta_dpo, None), (losses.dpo, training.frozen_copy())])
def test_a_memory_that_was_not_begun_is_asked_for(objective, reference):
    examples = training.PreferenceExamples(draw_pairs(0), jnp.zeros((5, 2)))
    gradients = preference_gradients(MLP, objective, reference=reference)
    with pytest.raises(ValueError, match="this step remembers: begin with init_state"):
        gradients(draw_params("mlp", 1, jnp.float32), examples, jnp.asarray(0.1))
