"""The reference page is what the code says, its formulas are what the code computes, and nothing is missing from it."""

import inspect
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from entangle import transforms
from entangle.transforms.weightings import as_running
from entangle.types import PairGeometry
from scripts.reference import transforms as page

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_code_says():
    assert page.PAGE.read_text(encoding="utf-8") == page.render()


def test_the_command_compares():
    done = subprocess.run([sys.executable, "-m", "scripts.reference.transforms", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0


def _dual(n1, n2, k, c):
    """CAGrad's t by search on a grid, then around its best point, and the two lengths."""
    low, high = np.zeros_like(k), np.ones_like(k)
    mean = np.sqrt(n1**2 + n2**2 + 2 * k * n1 * n2) / 2

    def length(t):
        return np.sqrt((t * n1) ** 2 + ((1 - t) * n2) ** 2 + 2 * t * (1 - t) * k * n1 * n2)

    def value(t):  # <g_t, g0> + c |g0| |g_t|
        product = (t * n1**2 + (1 - t) * n2**2 + k * n1 * n2) / 2
        return product + c * mean * length(t)

    for _ in range(60):
        ts = np.linspace(low, high, 9)
        best = np.argmin(value(ts), 0)
        low, high = (ts[np.clip(best + step, 0, 8), np.arange(len(k))] for step in (-1, 1))
    t = (low + high) / 2
    return {"t": t, "g0": mean, "gt": length(t)}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", transforms.WEIGHTINGS)
def test_formulas_of_the_table_are_what_the_code_computes(name):
    entry = transforms.WEIGHTINGS[name]
    rng = np.random.default_rng(0)
    n1, n2 = np.exp(rng.normal(0, 1.5, (2, 1000)))
    k = rng.uniform(-0.999, 0.999, 1000)
    # settings off their defaults too, so that a formula without them is noticed
    settings = [{p.name: p.default for p in inspect.signature(entry.make).parameters.values()}]
    off = {"target": 0.3, "inset": 0.4, "c": 0.7, "chosen": 0.2, "rejected": 3.0, "decay": 0.5}
    settings += [{setting: off[setting] for setting in settings[0]}]
    for values in settings:
        weighting = as_running(entry.make(**values))
        gram = PairGeometry(*(jnp.asarray(x) for x in (n1**2, n2**2, -k * n1 * n2)))
        found, _ = weighting.update(gram, weighting.init(gram))
        names = {"sqrt": np.sqrt, "where": np.where, "clip": np.clip, "max": np.maximum, "n1": n1, "n2": n2, "k": k}
        names |= values | (_dual(n1, n2, k, values["c"]) if name == "cagrad" else {})
        # where k > 0 band's edges are powers of negative numbers, which its formula does not look at
        with np.errstate(invalid="ignore"):
            expected = [np.broadcast_to(eval(weight, names), k.shape) for weight in entry.weights]
        # the search on a grid ends where the dual's values, not t, can no longer be told apart
        tolerance = 1e-6 if name == "cagrad" else 1e-11
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * 1e-2)


def test_every_public_function_is_on_the_page():
    text = page.PAGE.read_text(encoding="utf-8")
    helpers = {"chain_pair", "combined", "get_weighting", "retained"}
    public = {name for name in transforms.__all__ if inspect.isfunction(getattr(transforms, name))}
    assert [name for name in sorted(public - helpers) if f"\n### {name}\n" not in text] == []
    assert "`chain_pair(...)`" in text and "transforms.combined(state)" in text
