"""Reads a checkpoint onto four devices, and says what part of the queries each has; run by test_families.py."""

import sys

import jax

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

from entangle.models import load_pretrained  # noqa: E402


def last_axis(leaf):
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    parts = ["fsdp" if axis == leaf.ndim - 1 and leaf.shape[-1] % 4 == 0 else None for axis in range(leaf.ndim)]
    return NamedSharding(mesh, PartitionSpec(*parts))


if __name__ == "__main__":
    folder = sys.argv[1]
    _, whole = load_pretrained(folder, scan_layers=True)
    _, params = load_pretrained(
        folder, scan_layers=True, shardings=lambda config, shapes: jax.tree.map(last_axis, shapes)
    )
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    query = params["layers"]["attention"]["query"]["kernel"]
    print(sorted({shard.data.shape for shard in query.addressable_shards}))
