"""Evaluations that tell the geometry layer by layer, against the rows' own gradients in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import losses
from entangle.training import PreferenceExamples, pair_diagnostics
from entangle.training.metrics import layer_metrics
from entangle.types import PairGeometry
from tests.toy import draw_pairs, draw_params, mlp, row_gradients

PLACES = {"embed": slice(6, 41), "in": slice(41, 71)}  # of the flat gradient: bias 6, embed 7*5, in 5*6, out 6*7


@pytest.fixture(scope="module")
def looked_at():
    params, pairs = draw_params("mlp", 0, jnp.float32), draw_pairs(1)
    examples = PreferenceExamples(pairs, mlp(params, pairs))
    looks = [
        jax.jit(pair_diagnostics(mlp, losses.dpo, batch_size=2, layer_of=layer_of))(params, examples, jnp.array(0.1))
        for layer_of in (None, lambda path: path)
    ]
    return looks, row_gradients(mlp, params, pairs)


@pytest.mark.parametrize("layer", PLACES)
def test_a_layers_numbers_are_those_of_its_slice_of_the_gradients(looked_at, layer):
    (_, found), gradients = looked_at
    whole, part = np.linalg.norm(gradients, axis=-1), gradients[..., PLACES[layer]]
    norms, product = np.linalg.norm(part, axis=-1), np.sum(part[:, 0] * part[:, 1], axis=-1)
    expected = {
        "cosine": product / norms.prod(1),
        "cosine_part": product / whole.prod(1),
        "chosen_share": (norms[:, 0] / whole[:, 0]) ** 2,
        "rejected_share": (norms[:, 1] / whole[:, 1]) ** 2,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[f"layer/{layer}/{name}"], values, rtol=2e-4, atol=1e-6)


def test_parts_add_up_and_the_rest_of_the_look_is_what_it_was(looked_at):
    (without, found), _ = looked_at
    parts = sum(value for name, value in found.items() if name.endswith("/cosine_part"))
    np.testing.assert_allclose(parts, found["geometry/cosine"], rtol=1e-5, atol=1e-6)
    assert set(without) == {name for name in found if not name.startswith("layer/")}
    for name, value in without.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_pair_without_gradients_has_shares_of_zero():
    nothing = PairGeometry(*jnp.zeros((3, 1)))
    assert all(float(value[0]) == 0.0 for value in layer_metrics({"a": nothing, "b": nothing}).values())
