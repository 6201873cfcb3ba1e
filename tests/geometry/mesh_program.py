"""Run by test_mesh.py in a process of its own, on 8 virtual devices: values and collectives of sharded programs, as JSON."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from entangle import geometry
from entangle.geometry import meshes, one_backward
from tests import zoo
from tests.geometry.test_tokens import by_token
from tests.toy import draw_pairs, flatten

jax.config.update("jax_num_cpu_devices", 8)

PAIRS = 8
COLLECTIVE = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def collectives(compiled):
    """Pairs of operation and shape, one for every array that is sent around."""
    found = []
    for shapes, name in re.findall(COLLECTIVE, compiled.as_text()):
        found += [(name, [int(n) for n in shape.split(",") if n]) for shape in re.findall(r"f64\[([\d,]*)\]", shapes)]
    return found


def spec(path, leaf, sharding):
    """Where a parameter lies: everywhere, in parts, or by Megatron's rules."""
    name, lead = jax.tree_util.keystr(path), (None,) * (leaf.ndim - 2)
    if sharding == "replicated" or leaf.ndim < 2 or "norm" in name:
        return P()
    if sharding == "fsdp":
        return P(*lead, "fsdp", None) if leaf.shape[-2] % 2 == 0 else P(*lead, None, "fsdp")
    if "out" in name or "down" in name:
        return P(*lead, "tensor", None)
    return P() if "embed" in name or leaf.shape[-1] % 2 else P(*lead, None, "tensor")


# model, where the parameters lie, form of the dense layers, kind of axes, programs to compile
CASES = [
    ("gpt, tied", "replicated", "gram", AxisType.Auto, ("alone", "step", "plain", "mapped")),
    ("llama, scanned", "replicated", "rows", AxisType.Explicit, ("alone", "step", "plain")),
    ("gpt, tied", "fsdp", "rows", AxisType.Auto, ("alone", "step", "forward")),
    ("llama, scanned", "tensor", "gram", AxisType.Explicit, ("alone", "step", "plain", "tokens")),
    ("llama, untied", "tensor", "gram", AxisType.Auto, ("alone", "plain")),
    ("llama, untied", "tensor", "rows", AxisType.Auto, ("alone", "plain")),
]


def case_name(name, sharding, form, kind, programs):
    return f"{name}; {sharding}; {form}; {kind.name}"


def main():
    jax.config.update("jax_enable_x64", True)
    d_w, d_l = (jnp.asarray(d) for d in np.random.default_rng(0).standard_normal((2, PAIRS)))
    result = {}
    for case in CASES:
        name, sharding, form, kind, wanted = case
        mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
        log_prob_fn, params = zoo.whole_models(jnp.float64)[name]
        batch = draw_pairs(0, PAIRS)
        one_backward.by_rows = lambda *sizes, with_gradient, form=form: form == "rows"

        def alone(params, batch, model=log_prob_fn):
            return geometry.pair_geometry(model, params, batch)

        def step(params, batch, model=log_prob_fn):
            _, pull_back = geometry.vjp_with_geometry(model, params, batch)
            return pull_back(d_w, d_l)

        def forward(params, batch, model=log_prob_fn):
            return meshes.automatic(model, P(("data", "fsdp")))(params, batch)

        def tokens(params, batch, model=log_prob_fn):
            pair = meshes.automatic(lambda tokens: tokens[0], P())(batch.tokens)
            return geometry.token_gram(by_token(model), params, pair, jnp.array([[3, 4], [5, -1]]))

        def mapped(params, batch, model=alone):
            lie = {"in_specs": (P(), P("data")), "out_specs": P("data")}
            return jax.shard_map(model, **lie, axis_names={"data"}, check_vma=False)(params, batch)

        def plain(params, batch, model=forward):
            def loss(params):
                log_probs = model(params, batch)
                return jnp.mean(d_l * log_probs[:, 1] - d_w * log_probs[:, 0])

            return jax.grad(loss)(params)

        s = jax.jit(geometry.scan_geometry, static_argnums=0)(log_prob_fn, params, batch)
        expected = {"alone": s}
        if "step" in wanted:
            expected["step"] = (jax.jit(plain)(params, batch), s)
        if "mapped" in wanted:
            expected["mapped"] = s
        if "tokens" in wanted:
            expected["tokens"] = jax.jit(tokens)(params, batch)
        lie = jax.tree_util.tree_map_with_path(
            lambda k, leaf, mesh=mesh, s=sharding: NamedSharding(mesh, spec(k, leaf, s)), params
        )
        arguments = jax.device_put(params, lie), jax.device_put(batch, NamedSharding(mesh, P(("data", "fsdp"))))
        with jax.set_mesh(mesh):
            compiled = {
                f.__name__: jax.jit(f).lower(*arguments).compile()
                for f in (alone, step, forward, plain, mapped, tokens)
                if f.__name__ in wanted
            }
            found = {key: compiled[key](*arguments) for key in expected}
        errors = {
            key: np.max(abs(flatten(found[key]) - flatten(value)) / (abs(flatten(value)) + 1e-3))
            for key, value in expected.items()
        }
        sent = {key: collectives(program) for key, program in compiled.items()}
        result[case_name(*case)] = {"error": float(max(errors.values())), **sent}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
