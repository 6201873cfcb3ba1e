"""One preference step with geometry on one device and on meshes of eight, named as arguments; run by test_sharded_step.py."""

import dataclasses
import sys

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from entangle import losses, models, sharding, training  # noqa: E402
from entangle.paths import named_leaves  # noqa: E402
from entangle.types import PairBatch  # noqa: E402

SIZES = {"width": 16, "layers": 2, "heads": 8, "key_value_heads": 4, "hidden": 24, "max_positions": 8}
CONFIGS = {
    "full": dataclasses.replace(models.preset("qwen2_5_0_5b", 16), **SIZES),
    "lora": dataclasses.replace(
        models.preset("llama3_8b", 16), **SIZES, lora=models.LoraConfig(2, 4.0, ("query", "down"), dropout=0.3)
    ),
}
STAGE = training.StageConfig(5, 8, training.OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0))


def drawn_batch(config):
    rng = np.random.default_rng(0)
    tokens = rng.integers(config.vocab_size, size=(8, 2, 8), dtype=np.int32)
    mask = np.broadcast_to(np.arange(8) >= rng.integers(1, 6, (8, 2, 1)), tokens.shape)
    seeds = np.arange(16, dtype=np.uint32).reshape(8, 2) if config.lora else None
    return training.PreferenceExamples(PairBatch(tokens, mask, seeds), rng.normal(size=(8, 2)).astype(np.float32) - 10)


def drawn_params(model):
    def draw(key):
        params = model.init(key)
        bump = lambda path, leaf: leaf + 0.2 * jnp.sin(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)  # noqa: E731
        return jax.tree_util.tree_map_with_path(bump, params)

    return draw


def run(name, mesh):
    """The state after a step and what it reports, on the host; everything is born where it lies."""
    config = CONFIGS[name]
    model, chain = models.language_model(config), training.pair_chain("margin")
    tx = STAGE.optimizer.build(STAGE.steps, chain.head)
    trained = models.is_adapter if config.lora else lambda path: True

    def begin(key):
        params, frozen = models.split_params(drawn_params(model)(key), trained)
        return training.init_state(params, tx), frozen

    def step(frozen, state, batch):
        policy = models.on_frozen(model, frozen).log_probs
        gradients = training.preference_gradients(policy, losses.dpo)
        return training.make_step(gradients, tx, STAGE.optimizer.schedule(STAGE.steps), policy)(state, batch)

    batch = drawn_batch(config)
    if mesh is None:
        state, frozen = jax.jit(begin)(jax.random.key(0))
        return jax.device_get(jax.jit(step)(frozen, state, batch))
    with jax.set_mesh(mesh):
        state, frozen = sharding.born_sharded(begin, mesh, jax.random.key(0))
        batch = jax.device_put(batch, sharding.pair_sharding(mesh))
        places = sharding.shardings((state, frozen), mesh)
        compiled = jax.jit(step, out_shardings=(places[0], None))
        after, result = compiled(frozen, state, batch)
    shares = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves((after, frozen))]
    whole = sum(leaf.size for leaf in jax.tree.leaves((after, frozen)))
    # what is whole on every device (vectors, adapters' other sides) is little
    assert sum(shares) < 2 * whole / (mesh.shape["fsdp"] * mesh.shape["tensor"]), (sum(shares), whole)
    return jax.device_get((after, result))


def decided(path, one):
    """Where a new parameter is told by its gradient, and not by the gradient's rounding.

    AdamW's first step is the gradient over its own size: what is a millionth of its neighbours has no digit that is certain.
    """
    if not path.startswith("0/params/"):
        return True
    (moment,) = (leaf for name, leaf in one.items() if name.endswith(path.replace("0/params/", "/mu/")))
    certain = (np.abs(moment) > 1e-5 * np.max(np.abs(moment))) | (moment == 0)
    assert np.mean(certain) > 0.98, path
    return certain


def differences(one, other):
    """Path to the largest difference over the largest number; an inner product's over the two norms, which it is less than."""
    apart = {}
    for path, a in one.items():
        scale = max(1.0, np.max(np.abs(a)))
        if "inner_product" in path:  # metrics name norms, states their squares
            power, name = (1.0, "norm") if "metrics" in path else (0.5, "sq_norm")
            norms = (one[path.replace("inner_product", f"{side}_{name}")] for side in ("chosen", "rejected"))
            scale = np.prod(list(norms)) ** power
        found = np.abs(np.asarray(a, float) - other[path])
        apart[path] = float(np.max(np.where(decided(path, one), found, 0.0)) / scale)
    return apart


def main(arguments):
    for name in CONFIGS:
        one = run(name, None)
        for text in arguments:
            found = run(name, sharding.make_mesh(text))
            apart = differences(*(dict(named_leaves(result)) for result in (one, found)))
            worst = max(apart, key=apart.get)
            verdict = "equal" if apart[worst] <= 1e-5 else f"{worst} differs by {apart[worst]:.1e}"
            print(name, text, verdict, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
