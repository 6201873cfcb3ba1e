"""Run by test_whole_batch.py in a process of its own, on 8 virtual devices: objectives of a sharded batch, as JSON."""

import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from entangle import losses
from entangle.types import PairLogProbs
from tests.losses.batches import drawn

jax.config.update("jax_num_cpu_devices", 8)


def largest(left, right):
    """The largest difference, relative to the numbers' size."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return max(float(jnp.max(jnp.abs(a - b)) / (1.0 + jnp.max(jnp.abs(b)))) for a, b in pairs)


def refusal(function, spread, mesh):
    """The message of a function that cannot be called on a part of the batch."""
    try:
        jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(P("data"),), out_specs=P()))(spread)
    except ValueError as error:
        return str(error)
    return ""


def remembered(objective, lp, spread, mesh):
    """A memory of two batches, and the losses at it, made inside of shard_map and outside."""
    memory = objective.update(objective.update(objective.init(), lp), lp)
    local = losses.across(objective, "data")

    def inside(x):
        found = local.update(local.update(local.init(), x), x)
        return jax.tree.map(lambda leaf: leaf[None], found), local.given(found)(x)

    mapped = jax.shard_map(inside, mesh=mesh, in_specs=(P("data"),), out_specs=P("data"), check_vma=False)
    memories, values = jax.device_get(jax.jit(mapped)(spread))
    return {
        "memory": largest(memories, jax.tree.map(lambda leaf: jnp.full(8, leaf), memory)),
        "given": largest(values, objective.given(memory)(lp)),
        "update refused": refusal(lambda x: objective.update(objective.init(), x), spread, mesh),
    }


def main():
    jax.config.update("jax_enable_x64", True)
    lp = PairLogProbs(*(jnp.asarray(field[:64]) for field in drawn(2.0)))
    # one device's pairs are unlike another's: what is taken over a part of the batch is another number
    lp = lp._replace(chosen=lp.chosen + jnp.arange(64.0), rejected=lp.rejected - jnp.arange(64.0) / 3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    found = {}
    whole = [name for name, objective in losses.OBJECTIVES.items() if isinstance(objective, losses.BatchObjective)]
    for name in [*whole, "dpo"]:
        objective = losses.OBJECTIVES[name]

        def both(x, objective=objective):
            return losses.loss_and_coefficients(objective, x)

        alone = jax.device_get(jax.jit(both)(lp))
        spread = jax.device_put(lp, NamedSharding(mesh, P("data")))
        case = {"auto": largest(jax.device_get(jax.jit(both)(spread)), alone)}
        with jax.set_mesh(explicit):
            result = jax.jit(both)(jax.device_put(lp, NamedSharding(explicit, P("data"))))
            case["spec"] = list(jax.typeof(result[0]).sharding.spec)
        case["explicit"] = largest(jax.device_get(result), alone)
        for checked in (True, False):
            local = losses.across(objective, "data")
            inside = jax.shard_map(
                lambda x, local=local: losses.loss_and_coefficients(local, x),
                mesh=mesh,
                in_specs=(P("data"),),
                out_specs=P("data"),
                check_vma=checked,
            )
            case[f"shard_map {checked}"] = largest(jax.device_get(jax.jit(inside)(spread)), alone)
        inside = jax.shard_map(
            lambda x, objective=objective: losses.across(objective, ())(x), mesh=mesh, in_specs=(P(),), out_specs=P()
        )
        case["whole"] = largest(jax.jit(inside)(lp), alone[0])
        with jax.set_mesh(explicit):
            case["off mesh"] = largest(jax.device_get(jax.jit(both)(lp)), alone)
        if isinstance(objective, losses.RunningObjective):
            case |= remembered(objective, lp, spread, mesh)
        if name == "kto":
            case["point refused"] = refusal(losses.kto_reference_point, spread, mesh)
        try:
            jax.jit(jax.shard_map(objective, mesh=mesh, in_specs=(P("data"),), out_specs=P("data")))(spread)
            case["refused"] = ""
        except ValueError as error:
            case["refused"] = str(error)
        found[name] = case
    print(json.dumps(found))


if __name__ == "__main__":
    main()
