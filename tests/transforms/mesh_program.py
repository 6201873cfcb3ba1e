"""Run by test_compiled.py in a process of its own, on 8 virtual devices: sharded pair chains, what they send, as JSON."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from entangle import transforms
from entangle.types import PairGradients

jax.config.update("jax_num_cpu_devices", 8)

COLLECTIVE = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if event.endswith("/backend_compile_duration") else None
)
MESHES = [{"fsdp": 8}, {"stage": 2, "fsdp": 4}]
# a parameter's shape, and where it lies on each mesh
PARAMS = {
    "embedding": ((24, 6), P("fsdp", None), P(("stage", "fsdp"), None)),
    "layers": {
        "bias": ((2, 5), P(), P("stage", None)),
        "down": ((2, 16, 6), P(None, "fsdp", None), P(None, ("stage", "fsdp"), None)),
        "up": ((2, 6, 8), P(None, None, "fsdp"), P("stage", None, "fsdp")),
    },
    "norm": ((6,), P(), P()),
}
HEADS = {
    "pcgrad": transforms.combine_pair(transforms.pcgrad()),
    "reward_calibrated": transforms.combine_pair(transforms.reward_calibrated()),
    "grouped": transforms.combine_pair(transforms.pcgrad(), group=lambda path: path.split("/")[0]),
    "stacked": transforms.combine_pair(
        transforms.pcgrad(), group=lambda path: path.split("/")[0], stacked=lambda path: path.startswith("layers")
    ),
}


def pick(which):
    return jax.tree.map(lambda entry: entry[which], PARAMS, is_leaf=lambda node: isinstance(node, tuple))


def draw(seed):
    rng = np.random.default_rng(seed)
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32), pick(0), is_leaf=is_shape)


def draw_gradients(seed):
    """Two gradients in conflict: chosen and -rejected point away from one another."""
    common, one, other = (draw(3 * seed + i) for i in range(3))
    add = lambda a, b: jax.tree.map(lambda a, b: a + b, a, b)  # noqa: E731
    return PairGradients(add(common, one), add(common, other))


def collectives(compiled):
    """Pairs of operation and shape, one for every array that is sent around."""
    found = []
    for shapes, name in re.findall(COLLECTIVE, compiled.as_text()):
        found += [(name, [int(n) for n in shape.split(",") if n]) for shape in re.findall(r"\w\d+\[([\d,]*)\]", shapes)]
    return found


def steps(tx, lie=lambda tree: tree):
    """Three steps: what comes of them, how many programs were compiled for them, and the last one's."""

    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = lie(draw(0))
    state = tx.init(params)
    batches = [PairGradients(*map(lie, draw_gradients(seed))) for seed in range(1, 4)]
    COMPILED.clear()
    for gradients in batches:
        before, (params, state) = (params, state), step(params, state, gradients)
    return params, state, len(COMPILED), step.lower(*before, gradients).compile()


def moved(params, state, specs):
    """Paths of what lies elsewhere than the parameters do; a head's numbers lie everywhere, or layers' with the layers."""
    found = []

    def check(tree, name):
        for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(specs), strict=True):
            if not leaf.sharding.is_equivalent_to(NamedSharding(leaf.sharding.mesh, spec), leaf.ndim):
                found.append(f"{name}{jax.tree_util.keystr(path)}: {leaf.sharding}")

    check(params, "params")
    check(state[1][0].trace, "trace")
    for path, leaf in jax.tree_util.tree_leaves_with_path(state[0]):
        if not (leaf.sharding.is_fully_replicated or leaf.sharding.spec == P("stage")):
            found.append(f"state{jax.tree_util.keystr(path)}: {leaf.sharding}")
    return found


def flat(tree):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def accumulated():
    """Where two micro-batches lead that no jitted function is given: called as they are, and closed over in a scan."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.zeros((4, 8)), NamedSharding(mesh, P("x", "y")))
        gradients = PairGradients(params + 1, params + 3)
        tx = transforms.accumulate_pairs(optax.chain(transforms.combine_pair(transforms.margin()), optax.sgd(1.0)), 2)
        state = tx.init(params)
        eager, eager_state = [], state
        for _ in range(2):
            updates, eager_state = tx.update(gradients, eager_state, params)
            eager.append(updates)
        scanned = jax.lax.scan(lambda s, _: tx.update(gradients, s, params)[::-1], state, length=2)[1]
    return {
        "eager": [np.unique(updates).tolist() for updates in eager],
        "scanned": [np.unique(updates).tolist() for updates in np.asarray(scanned)],
        "lie": [str(updates.sharding.spec) for updates in (*eager, scanned)],
    }


def main():
    result = {}
    for name, head in HEADS.items():
        tx = optax.chain(head, optax.sgd(0.1, momentum=0.9))
        right = steps(tx)[:2]
        for number, sizes in enumerate(MESHES if name == "stacked" else MESHES[:1]):
            specs = pick(1 + number)
            for kind in (AxisType.Auto, AxisType.Explicit):
                mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))

                def lie(tree, mesh=mesh, specs=specs):
                    return jax.tree.map(lambda leaf, s: jax.device_put(leaf, NamedSharding(mesh, s)), tree, specs)

                with jax.set_mesh(mesh):
                    params, state, count, compiled = steps(tx, lie)
                error = jax.tree.map(
                    lambda a, b: np.max(abs(a - b)) / np.max(abs(b) + 1e-30), *map(flat, ((params, state), right))
                )
                result[f"{name}; {' '.join(sizes)}; {kind.name}"] = {
                    "error": float(max(error)),
                    "moved": moved(params, state, specs),
                    "compiled": count,
                    "sent": collectives(compiled),
                    "in parts": len(sizes) * sum(spec != P() for spec in jax.tree.leaves(specs)),
                }
    print(json.dumps({"cases": result, "accumulated": accumulated()}))


if __name__ == "__main__":
    main()
