"""Three trials of a preference step on two devices, an objective of the whole batch among them; run by test_trials.py."""

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from entangle import losses, training  # noqa: E402
from entangle.training.trials import stacked, trial  # noqa: E402
from entangle.types import PairBatch  # noqa: E402

STAGE = training.StageConfig(5, 6, training.OptimizerConfig(learning_rate=1e-2))
SETTINGS = [("dpo", {"beta": 0.3}), ("aot", {}), ("slic_hf", {})]


def log_probs(params, batch):
    logits = jnp.tanh(params["embed"][batch.tokens]) @ params["head"]
    taken = jnp.take_along_axis(jax.nn.log_softmax(logits[..., :-1, :]), batch.tokens[..., 1:, None], -1)[..., 0]
    return jnp.sum(jnp.where(batch.completion_mask[..., 1:], taken, 0.0), -1)


def main():
    rng = np.random.default_rng(0)
    params = {"embed": jnp.asarray(rng.normal(size=(11, 6)), jnp.float32), "head": jnp.ones((6, 11)) * 0.1}
    tokens = jnp.asarray(rng.integers(0, 11, (3, 6, 2, 9)), jnp.int32)
    pairs = PairBatch(tokens, jnp.broadcast_to(jnp.arange(9) > 4, tokens.shape))
    batch = training.PreferenceExamples(pairs, jnp.asarray(rng.normal(size=(3, 6, 2)), jnp.float32) - 10)
    selection = losses.Selection(SETTINGS)
    rates = jnp.array([1e-2, 1e-3, 5e-3])
    chain = training.pair_chain("margin")

    def step(probe, choice, rate, state, batch):
        tx = STAGE.optimizer.build(STAGE.steps, chain.head, learning_rate=rate)
        schedule = STAGE.optimizer.schedule(STAGE.steps, learning_rate=rate)
        gradients = training.preference_gradients(log_probs, selection.objective(choice), reward_beta=1.0)
        return training.make_step(gradients, tx, schedule, log_probs)(state, batch, probe)

    tx = STAGE.optimizer.build(STAGE.steps, chain.head)
    state = training.init_state(params, tx, training.preference_memory(losses.dpo, params))
    probe = jax.tree.map(lambda leaf: leaf[0, :4], pairs)
    own = [(trial(selection.choices, k), rates[k], state, trial(batch, k)) for k in range(3)]
    expected = [jax.jit(step)(probe, *one) for one in own]
    mesh = training.trial_mesh(jax.devices()[:2])
    assert mesh.shape == {"trial": 2}
    spread = jax.jit(training.map_trials(step, mesh=mesh))
    found = spread(probe, *stacked(own, 2))
    assert jax.tree.leaves(found)[0].shape[0] == 4
    assert {shard.device for shard in found[0].params["head"].addressable_shards} == set(mesh.devices)
    text = spread.lower(probe, *stacked(own, 2)).compile().as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "collective-permute", "all-to-all"))
    for place, one in enumerate(expected):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(np.asarray(a)[place], b, rtol=1e-5, atol=1e-6)
    print("agreed")


if __name__ == "__main__":
    main()
