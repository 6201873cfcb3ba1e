"""Run by test_head.py in a process of its own, on 4 virtual devices of 8: values and collectives of the head, as JSON."""

import json
import math
import re

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from entangle.models.head import completion_log_probs  # noqa: E402
from tests.toy import draw_pairs  # noqa: E402

PAIRS, LENGTH, WIDTH, VOCAB = 4, 12, 6, 52
COLLECTIVE = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def collectives(compiled):
    """Operation and shape of every floating array that is sent around."""
    found = []
    for shapes, name in re.findall(COLLECTIVE, compiled.as_text()):
        found += [(name, [int(n) for n in shape.split(",") if n]) for shape in re.findall(r"f64\[([\d,]*)\]", shapes)]
    return found


def main():
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.standard_normal(s)) for s in ((PAIRS, 2, LENGTH, WIDTH), (VOCAB, WIDTH)))
    batch = draw_pairs(0, PAIRS, LENGTH, VOCAB)
    length = int(batch.completion_mask.sum(-1).max())
    result = {}
    cases = (("pairs", AxisType.Auto), ("pairs", AxisType.Explicit), ("vocabulary", AxisType.Auto))
    for sharded, kind in cases:
        shards = 2 if sharded == "vocabulary" else 1

        def forward(hidden, table, batch, shards=shards):
            lengths = {"completion_length": length, "chunk": 14, "shards": shards}
            return completion_log_probs(hidden, table, batch.tokens, batch.completion_mask, **lengths)

        def step(hidden, table, batch, forward=forward):
            return jax.value_and_grad(lambda h, t: forward(h, t, batch).sum(), (0, 1))(hidden, table)

        whole = lambda h, t: completion_log_probs(h, t, batch.tokens, batch.completion_mask).sum()  # noqa: E731
        expected = jax.jit(jax.value_and_grad(whole, (0, 1)))(hidden, table)
        mesh = jax.make_mesh((2, 2), ("data", "vocabulary"), axis_types=(kind,) * 2, devices=jax.devices()[:4])
        pairs = P("data") if shards == 2 else P(("data", "vocabulary"))
        rows = P("vocabulary") if shards == 2 else P()
        lie = [NamedSharding(mesh, spec) for spec in (pairs, rows)]
        arguments = *map(jax.device_put, (hidden, table), lie), jax.device_put(batch, lie[0])
        with jax.set_mesh(mesh):
            compiled = {f.__name__: jax.jit(f).lower(*arguments).compile() for f in (forward, step)}
            found = compiled["step"](*arguments)
        errors = jax.tree.map(lambda a, b: float(abs(np.asarray(a) - np.asarray(b)).max()), found, expected)
        sent = {name: collectives(program) for name, program in compiled.items()}
        sizes = [(name, shape, math.prod(shape)) for name, shape in sent["forward"]]
        result[f"{sharded}, {kind.name}"] = {
            "error": max(jax.tree.leaves(errors)),
            "forward_sizes": sizes,
            "positions": PAIRS // 2 * 2 * length,
            **sent,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
