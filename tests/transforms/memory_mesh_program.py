"""Run by test_memory_mesh.py in a process of its own, on 8 virtual devices: heads with memory, what they send, as JSON."""

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

MEMORY, STEPS = 3, 5
COLLECTIVE = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
FORGET = transforms.combine_pair(transforms.fixed(chosen=0.0))
MOMENTUM = optax.sgd(0.1, momentum=0.9)
ADAM = transforms.AdamMetric(b2=0.9, eps=1e-3)
# a parameter's shape and where it lies
PARAMS = {
    "bias": ((5,), P()),
    "down": ((16, 6), P("fsdp", None)),
    "scalar": ((), P()),
    "up": ((2, 6, 8), P(None, None, "fsdp")),
}
CASES = {
    "project_retain": optax.chain(transforms.project_retain(MEMORY), MOMENTUM),
    "project_retain, adam": transforms.project_retain(MEMORY, metric=ADAM, radius=1.0, retain_weight=0.1),
    "retain_invariant": transforms.retain_invariant(optax.chain(FORGET, MOMENTUM), MEMORY),
    "combine_groups": optax.chain(transforms.combine_groups(transforms.soft_aggregation(), 3), MOMENTUM),
    "accumulate_pairs": transforms.accumulate_pairs(
        optax.chain(transforms.combine_pair(transforms.pcgrad()), MOMENTUM), 2
    ),
}


def pick(which):
    return {name: entry[which] for name, entry in PARAMS.items()}


def draw(seed, lead=()):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal((*lead, *shape)), jnp.float32) for name, shape in pick(0).items()}


def lie(tree, mesh, lead=()):
    """Parameters, or rows of them, where they belong."""
    return {name: jax.device_put(x, NamedSharding(mesh, P(*lead, *PARAMS[name][1]))) for name, x in tree.items()}


def draw_updates(case, seed):
    """What goes in at a step, and the leading axes of its leaves."""
    if case == "combine_groups":
        return draw(seed, (3,)), (None,)
    return PairGradients(draw(2 * seed), draw(2 * seed + 1)), ()


def steps(case, mesh=None):
    """Updates of every step, the last state, and the compiled step."""
    tx = CASES[case]
    step = jax.jit(lambda updates, state, params: tx.update(updates, state, params))
    params, found = draw(0), []
    if mesh is not None:
        params = lie(params, mesh)
    state = tx.init(params)
    for seed in range(1, STEPS + 1):
        given, lead = draw_updates(case, seed)
        if mesh is not None:
            whole = isinstance(given, PairGradients)
            given = PairGradients(*(lie(g, mesh) for g in given)) if whole else lie(given, mesh, lead)
        if seed == 1:
            compiled = step.lower(given, state, params).compile()
        updates, state = compiled(given, state, params)
        found.append(updates)
    return found, state, compiled


def collectives(compiled):
    """Shapes of all that is sent around."""
    found = re.findall(COLLECTIVE, compiled.as_text())
    return [
        [int(n) for n in s.split(",") if n] for shapes, _ in found for s in re.findall(r"\w\d+\[([\d,]*)\]", shapes)
    ]


def misplaced(tree, shapes):
    """Paths of arrays that have a parameter's shape, or a row of it in front, and do not lie as it does."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        for shape, spec in shapes:
            lead = (None,) * (leaf.ndim - len(shape))
            if shape and leaf.shape[len(lead) :] == shape and len(lead) <= 1:
                right = NamedSharding(leaf.sharding.mesh, P(*lead, *spec))
                if not leaf.sharding.is_equivalent_to(right, leaf.ndim):
                    found.append(f"{jax.tree_util.keystr(path)}: {leaf.sharding}")
    return found


def main():
    result = {}
    for case in CASES:
        right = steps(case)[:2]
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(kind,))
            with jax.set_mesh(mesh):
                *found, compiled = steps(case, mesh)
            errors = jax.tree.map(
                lambda a, b: np.max(abs(np.asarray(a) - np.asarray(b))) / max(1.0, np.max(abs(b))), tuple(found), right
            )
            kept = [leaf for leaf in jax.tree.leaves(found[1]) if leaf.shape[:1] == (MEMORY,) and leaf.ndim > 1]
            result[f"{case}; {kind.name}"] = {
                "error": float(max(jax.tree.leaves(errors))),
                "misplaced": misplaced(found, list(PARAMS.values())),
                "in parts": sum(not leaf.sharding.is_fully_replicated for leaf in kept),
                "sent": collectives(compiled),
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
