"""One table of all weightings, one list of laws, over gradients of every size, angle and kind."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle import geometry, transforms
from entangle.losses import Coefficients
from entangle.transforms import WEIGHTINGS, Promises
from entangle.transforms.weightings import as_running
from entangle.types import PairGeometry, PairGradients
from tests.toy import MODELS, draw_pairs, draw_params, flatten
from tests.transforms import naive


class Case(NamedTuple):
    """A weighting at some settings, with what it promises there."""

    name: str
    settings: Mapping[str, float]
    promises: Promises

    def __str__(self):
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.settings.items())])


IDEAL = Promises(chosen=True, rejected=True, margin=True, symmetric=True, degree=1)
MARGIN = IDEAL._replace(chosen=False, rejected=False)
NOTHING = MARGIN._replace(margin=False)
CASES = {
    str(case): case
    for case in [
        *(Case(name, {}, entry.promises) for name, entry in WEIGHTINGS.items()),
        Case("fixed", {"chosen": 0.0}, NOTHING._replace(rejected=True, symmetric=False)),
        Case("band", {"inset": 0.5}, IDEAL),
        Case("band", {"inset": 1.0}, IDEAL),
        Case("gradvac", {"target": 0.3}, NOTHING),
        # With r = |g2| / |g1|, p the target, s^2 = 1 - k^2 and q^2 = 1 - p^2 the margin's gain over |g1|^2 is
        # (1 + r^2)(s^2 + k p s / q) + 2 r p s / q. For k < p < 0 it is least at r = 1, 2 s (s + p (1 + k) / q), and that is
        # positive, since ((1 - k) / (1 + k))^(1/2) > (1 - p) / q > -p / q. A positive target can be too much to ask.
        Case("gradvac", {"target": -0.4}, MARGIN),
        Case("gradvac_ema", {"decay": 0.5}, NOTHING),
        Case("cagrad", {"c": 0.0}, MARGIN),
        Case("cagrad", {"c": 0.9}, MARGIN),
        # without an average it is scale_preserving
        Case("reward_calibrated", {"decay": 0.0}, IDEAL),
    ]
}
CONSTANT = [name for name, case in CASES.items() if case.name in ("margin", "fixed")]
RUNNING = ("reward_calibrated", "gradvac_ema")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float64)


def each(cases):
    return pytest.mark.parametrize("case", cases)


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)


@functools.cache
def weighting_of(case):
    """With a memory, so that all can be called alike."""
    name, settings, _ = CASES[case]
    return as_running(WEIGHTINGS[name].make(**settings))


# The inputs: rows of two vectors of SIZE entries, which go in as pytrees of ragged leaves.

SHAPES = {"vector": (3,), "nested": {"matrix": (2, 2), "scalar": (), "empty": (0, 2)}, "row": (1, 4)}
SIZE = 12
PLAIN, EXACT, EXTREME, BAD = "plain", "exact", "extreme", "bad"


def _at_angle(rng, angle, chosen, rejected):
    """Two vectors of given norms and angle, in a random plane."""
    plane = np.linalg.qr(rng.standard_normal((SIZE, 2)))[0].T
    return chosen * plane[0], rejected * (np.cos(angle) * plane[0] + np.sin(angle) * plane[1])


@functools.cache
def rows():
    """Kind, chosen and rejected vector of every row."""
    rng = np.random.default_rng(0)
    found = []
    for angle in (1e-3, 0.2, 0.4, 0.8, 1.2, np.pi / 2, 2.0, 2.6, np.pi - 1e-3):
        for ratio in (1e-2, 1e-1, 0.3, 1.0, 3.0, 10.0, 100.0):
            size = 10 ** rng.uniform(-1, 1)
            found.append((PLAIN, *_at_angle(rng, angle, size, size * ratio)))
    g = rng.standard_normal(SIZE)
    exact = [(g, 0 * g), (0 * g, g), (0 * g, 0 * g), (g, g), (g, -g), (g, 2 * g), (4 * g, g), (g, -4 * g), (-2 * g, g)]
    found += [(EXACT, *pair) for pair in exact]
    for size in (1e-10, 1e15):
        found += [(EXTREME, size * w, size * l) for w, l in exact]
    norms = [(1, 1), (1, 3), (1e-10, 1e-10), (1e15, 1e15), (1e-10, 1e15), (1e15, 1e-10), (1, 1e6), (1e-3, 1)]
    norms += list(10 ** rng.uniform(-10, 15, (3, 2)))
    near = (0.0, 1e-6, 1e-3)
    for angle in (*near, *(np.pi - x for x in near), np.pi / 2, *rng.uniform(0, np.pi, 4)):
        found += [(EXTREME, *_at_angle(rng, angle, *pair)) for pair in norms]
    for value in (np.nan, np.inf, -np.inf):
        for side in (0, 1):
            pair = rng.standard_normal((2, SIZE))
            pair[side, rng.integers(SIZE)] = value
            found.append((BAD, *pair))
    kinds, chosen, rejected = zip(*found, strict=True)
    return np.array(kinds), np.stack(chosen), np.stack(rejected)


def _tree(vectors, dtype):
    """The rows ``[N, SIZE]`` cut into leaves ``[N, ...]``."""
    shapes, structure = jax.tree.flatten(SHAPES, is_leaf=lambda node: isinstance(node, tuple))
    cuts = np.cumsum([int(np.prod(shape)) for shape in shapes])
    assert cuts[-1] == SIZE
    leaves = zip(shapes, np.split(vectors, cuts[:-1], 1), strict=True)
    return jax.tree.unflatten(structure, [jnp.asarray(v.reshape(len(v), *s), dtype) for s, v in leaves])


def _vectors(tree):
    leaves = [np.asarray(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)


class Result(NamedTuple):
    """What a weighting made of the rows of some kinds; float64 NumPy."""

    chosen: np.ndarray
    rejected: np.ndarray
    x: np.ndarray
    y: np.ndarray
    update: np.ndarray

    def norms(self):
        return np.linalg.norm(self.chosen, axis=1), np.linalg.norm(self.rejected, axis=1)

    def changes(self):
        """First-order gains of both sides, chosen's rise and rejected's fall, and the sizes of what is summed in them."""
        ww, ll, wl = (np.sum(a * b, 1) for a, b in zip(*self._pairs(), strict=True))
        n1, n2 = self.norms()
        sizes = np.abs(self.x) * n1 + np.abs(self.y) * n2
        return {"chosen": self.x * ww - self.y * wl, "rejected": self.y * ll - self.x * wl}, {
            "chosen": sizes * n1,
            "rejected": sizes * n2,
        }

    def _pairs(self):
        return (self.chosen, self.rejected, self.chosen), (self.chosen, self.rejected, self.rejected)


@functools.cache
def _compiled(case):
    """Once for float32 and bfloat16, whose Grams are float32; what is in float64 runs as it is, which is sooner done."""
    weighting = weighting_of(case)
    return weighting._replace(update=jax.jit(weighting.update))


@functools.cache
def _all_rows(case, dtype):
    """The head of the chain over all rows at once, as the layers of one stacked group: every row has a Gram of its own.

    What has a memory has already seen some other row a hundred times, with all that may be wrong with it.
    """
    with jax.enable_x64(dtype == jnp.float64):
        _, *vectors = rows()
        now, before = (PairGradients(*(_tree(np.roll(v, by, 0), dtype) for v in vectors)) for by in (0, 31))
        weighting = weighting_of(case) if dtype == jnp.float64 else _compiled(case)
        tx = transforms.combine_pair(weighting, stacked=lambda path: True)
        state = tx.init(now.chosen)
        if CASES[case].name in RUNNING:
            gram, memory = geometry.gram(before, leading_axes=1), state.memory
            for _ in range(100):
                memory = weighting.update(gram, memory)[1]
            state = state._replace(memory=memory)
        update, state = tx.update(now, state)
        weights = (np.asarray(w, np.float64) for w in state.weights)
        return Result(_vectors(now.chosen), _vectors(now.rejected), *weights, _vectors(update))


def result(case, dtype, *kinds):
    chosen = np.isin(rows()[0], kinds)
    return Result(*(field[chosen] for field in _all_rows(case, dtype)))


def eps(dtype):
    """Of the weights: bfloat16 gradients have float32 ones."""
    return float(jnp.finfo(jnp.float64 if dtype == jnp.float64 else jnp.float32).eps)


GOOD = (PLAIN, EXACT, EXTREME)


@each_dtype
@each(CASES)
def test_weights_and_updates_are_finite_and_the_update_is_the_weighed_difference(case, dtype):
    found = result(case, dtype, *GOOD)
    assert all(np.isfinite(field).all() for field in found)
    difference = found.y[:, None] * found.rejected - found.x[:, None] * found.chosen
    # two products and a difference in float32 or better, then one rounding to the leaf's dtype
    sizes = np.abs(found.y[:, None] * found.rejected) + np.abs(found.x[:, None] * found.chosen)
    error = np.abs(found.update - difference)
    assert (error <= 2 * eps(dtype) * sizes + float(jnp.finfo(dtype).eps) * np.abs(difference)).all()


@each_dtype
@each(sorted(set(CASES) - set(CONSTANT)))
def test_one_number_that_is_not_finite_makes_the_whole_update_nan(case, dtype):
    assert np.isnan(result(case, dtype, BAD).update).all()


@each_dtype
@each(CONSTANT)
def test_constant_weights_leave_a_number_that_is_not_finite_where_it_is(case, dtype):
    found = result(case, dtype, BAD)
    good = np.isfinite(found.chosen) & np.isfinite(found.rejected)
    assert (np.sum(~good, 1) == 1).all()
    np.testing.assert_array_equal(np.isfinite(found.update), good)
    assert np.isnan(found.update[np.isnan(found.chosen) | np.isnan(found.rejected)]).all()


def _gains(found):
    gains, sizes = found.changes()
    # the weighted margin is both sides' gain together
    return {**gains, "margin": gains["chosen"] + gains["rejected"]}, {
        **sizes,
        "margin": sizes["chosen"] + sizes["rejected"],
    }


def _promises(kept):
    every = [(name, side) for name in CASES for side in ("chosen", "rejected", "margin")]
    return pytest.mark.parametrize(
        ("case", "side"), [(name, side) for name, side in every if getattr(CASES[name].promises, side) == kept]
    )


@each_dtype
@_promises(True)
def test_a_promised_side_never_moves_the_wrong_way(case, side, dtype):
    """Over every row, from the vectors in float64 and the weights as they came out.

    Rounding leaves the Gram's entries, sums of SIZE products, within SIZE / 2 = 6 eps of ``|g_i| |g_j|``, and the weights'
    ratio within 16 eps (logarithms up to 58, whose last digit is 2^5 eps, are halved and exponentiated; others have less).
    At that Gram the promise holds, so at the vectors' own it holds to the sum of both, 22 eps, of the products of the norms.
    """
    gains, sizes = _gains(result(case, dtype, *GOOD))
    assert (gains[side] >= -22 * eps(dtype) * sizes[side]).all()


@_promises(False)
def test_a_side_without_a_promise_does_move_the_wrong_way_somewhere(case, side):
    gains, sizes = _gains(result(case, jnp.float64, PLAIN))
    assert (gains[side] < -1e-3 * sizes[side]).any()


# Grams rather than gradients: norms are powers of two, so that the cosine is the same number for both orders and scales.

COSINES = np.array([-1.0, -1 + 2.0**-40, -1 + 2.0**-20, -0.9, -0.5, -0.25, 0.0, 0.3, 0.75, 1 - 2.0**-20, 1.0])
NORMS = 2.0 ** np.array([-33, -3, 0, 1, 10, 50])


def grams():
    """Norms 0 and from 1e-10 to 1e15, against all cosines; k is that of the ascent directions."""
    n1, n2, k = (x.ravel() for x in np.meshgrid(np.append(NORMS, 0.0), np.append(NORMS, 0.0), COSINES))
    return n1, n2, k


def gram_of(n1, n2, k):
    return PairGeometry(*(jnp.asarray(x) for x in (n1 * n1, n2 * n2, -k * n1 * n2)))


def second_step(case, gram):
    """Weights and memory; where there is one, the first step saw another norm and cosine."""
    weighting = weighting_of(case)
    memory = weighting.init(gram)
    if CASES[case].name in RUNNING:
        memory = weighting.update(jax.tree.map(lambda x: jnp.roll(x, 25), gram), memory)[1]
    return weighting.update(gram, memory)


def weights(case, n1, n2, k):
    return tuple(np.asarray(w) for w in second_step(case, gram_of(n1, n2, k))[0])


@each([name for name, case in CASES.items() if case.promises.symmetric])
@pytest.mark.usefixtures("x64")
def test_exchanging_the_sides_exchanges_the_weights(case):
    n1, n2, k = grams()
    x, y = weights(case, n1, n2, k)
    np.testing.assert_allclose(weights(case, n2, n1, k), (y, x), rtol=1e-14)


@each([name for name, case in CASES.items() if not case.promises.symmetric])
@pytest.mark.usefixtures("x64")
def test_without_symmetry_exchanging_the_sides_gives_other_weights(case):
    n1, n2, k = grams()
    x, y = weights(case, n1, n2, k)
    assert not np.allclose(weights(case, n2, n1, k), (y, x), rtol=1e-3)


@pytest.mark.parametrize("scale", [3.0, 4.0])
@each(CASES)
@pytest.mark.usefixtures("x64")
def test_the_step_scales_with_the_gradients_to_its_degree(case, scale):
    n1, n2, k = grams()
    scaled = np.stack(weights(case, scale * n1, scale * n2, k))
    # the step is weights times gradients, so the weights' degree is one less
    expected = scale ** (CASES[case].promises.degree - 1) * np.stack(weights(case, n1, n2, k))
    if scale == 3:  # it rounds the cosine: away from where the last digit matters
        scaled, expected = (w[:, np.abs(k) < 0.95] for w in (scaled, expected))
    np.testing.assert_allclose(scaled, expected, rtol=1e-13)


@each([name for name, case in CASES.items() if case.name not in RUNNING])
def test_the_step_is_its_definition_on_the_vectors(case):
    """Within 1e-8 of the two summands' lengths: at an angle of 1e-3 the Gram knows ``1 - k^2`` to 1e-16 / 1e-6 only."""
    name, settings, _ = CASES[case]
    found = result(case, jnp.float64, PLAIN, EXACT)
    n1, n2 = found.norms()
    kinds = rows()[0][np.isin(rows()[0], (PLAIN, EXACT))]
    for i, update in enumerate(found.update):
        expected = getattr(naive, name)(found.chosen[i], -found.rejected[i], **settings)
        if expected is None:
            assert kinds[i] == EXACT  # a zero gradient, or no plane between both
            continue
        size = max(abs(found.x[i]) * n1[i] + abs(found.y[i]) * n2[i], np.linalg.norm(expected))
        np.testing.assert_allclose(-update, expected, rtol=0, atol=1e-8 * size, err_msg=f"row {i}")


def _both_there(found):
    n1, n2 = found.norms()
    return (n1 > 0) & (n2 > 0)


def _entangled(found):
    """The cosine of chosen and rejected is above 0, by more than its rounding."""
    n1, n2 = found.norms()
    with np.errstate(invalid="ignore"):
        wl = np.sum(found.chosen / n1[:, None] * (found.rejected / n2[:, None]), 1)
    return wl > 1e-6


def _everywhere(found):
    return np.full(len(found.x), True)


# one weighting is a multiple of another, on what rows, and within how many eps: 58 / 2 more, where logarithms are taken
FALL_TOGETHER = {
    "PCGrad is twice UPGrad": ("pcgrad", "upgrad", 2.0, _everywhere, 4),
    "GradVac at 0 is PCGrad": ("gradvac", "pcgrad", 1.0, _everywhere, 4),
    "the margin is twice the mean": ("margin", "cagrad c=0.0", 2.0, _everywhere, 0),
    "fixed at 1 is the margin": ("fixed", "margin", 1.0, _everywhere, 0),
    "the band's centre is scale-preserving": ("band inset=1.0", "scale_preserving", 1.0, _entangled, 4),
    "calibration without average is scale-preserving": (
        "reward_calibrated decay=0.0",
        "scale_preserving",
        1.0,
        _both_there,
        36,
    ),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("law", FALL_TOGETHER)
def test_weightings_that_fall_together(law, dtype):
    one, other, factor, where, tolerance = FALL_TOGETHER[law]
    one, other = (result(case, dtype, *GOOD) for case in (one, other))
    there = where(one)
    assert np.sum(there) > 50
    for field in ("x", "y"):
        left, right = getattr(one, field)[there], factor * getattr(other, field)[there]
        np.testing.assert_allclose(left, right, rtol=tolerance * eps(dtype), atol=0)


BISECTORS = ("normalized", "nash", "scale_preserving", "imtl_g", "config")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
@each(BISECTORS)
def test_the_bisectors_are_parallel_to_the_sum_of_the_unit_vectors(case, dtype):
    found = result(case, dtype, *GOOD)
    n1, n2 = found.norms()
    there = _both_there(found)
    # equal lengths of the two summands: norms are roots of sums of SIZE squares, and both have a division or three
    np.testing.assert_allclose((found.x * n1)[there], (found.y * n2)[there], rtol=(SIZE / 2 + 4) * eps(dtype))


def test_the_bisectors_differ_in_length_alone():
    """(1, 1) against opposite lengths: |g1| = 2, |g2| = 6, k = 1/2 and so |u1 + u2| = sqrt(3)."""
    x, _ = zip(*(weights(case, np.float32(2), np.float32(6), np.float32(0.5)) for case in BISECTORS), strict=True)
    # the factor of u1 + u2 is 2 x: 1, 1 / sqrt(3/2), sqrt(12), 12 / 8, (2 + 6) / 2
    np.testing.assert_allclose(2 * np.array(x), [1, 1.5**-0.5, 12**0.5, 1.5, 4], rtol=1e-6)


def test_parallel_to_rounding_is_parallel():
    """Of a float32 cosine within units of -1 or 1 nothing but the sign is known: Nash's steps stop, alignment averages."""
    unit = np.float32(2.0**-23)
    units = np.array([0, 1, 4, 8], np.float32)
    one = np.ones_like(units)
    # 1 / sqrt(1 + k) at 8 units is 2^10
    np.testing.assert_array_equal(weights("nash", one, one, units * unit - 1), [[0, 0, 0, 2**10]] * 2)
    # Unit vectors' mean is an eigenvector of the Gram: for k near -1 the small one, which stays; for k near 1 the large one,
    # which shrinks by sqrt((1 - k) / (1 + k)).
    np.testing.assert_allclose(weights("aligned_mtl", one, one, units * unit - 1)[0], [0.5] * 4, rtol=1e-3)
    shrunk = [(j * unit / 2) ** 0.5 / 2 for j in (4, 8)]
    np.testing.assert_allclose(weights("aligned_mtl", one, one, 1 - units * unit)[0], [0.5, 0.5, *shrunk], rtol=1e-3)


# Arrays, derivatives.


@each(CASES)
@pytest.mark.usefixtures("x64")
def test_an_array_of_grams_is_weighed_one_by_one(case):
    n1, n2, k = grams()
    many = second_step(case, gram_of(n1, n2, k))
    assert {leaf.shape for leaf in jax.tree.leaves(many)} == {k.shape}
    weighting = weighting_of(case)
    for i in np.random.default_rng(0).choice(np.flatnonzero(np.abs(k) < 0.95), 8):
        before, now = (gram_of(*(x[j] for x in (n1, n2, k))) for j in (i - 25, i))
        alone = weighting.update(now, weighting.update(before, weighting.init(before))[1])
        for one, array in zip(jax.tree.leaves(alone), jax.tree.leaves(many), strict=True):
            assert one.shape == ()
            np.testing.assert_allclose(array[i], one, rtol=1e-13)


@each(CASES)
@pytest.mark.usefixtures("x64")
def test_the_derivative_by_the_gram_is_finite_also_where_a_gradient_is_zero_or_both_are_parallel(case):
    gram = gram_of(*grams())
    weighting = weighting_of(case)

    @jax.grad
    def slopes(gram):
        x, y = weighting.update(gram, weighting.init(gram))[0]
        return jnp.sum(x) + jnp.sum(y)

    for slope in slopes(gram):
        assert bool(jnp.isfinite(slope).all())


# Memory.


def _sequence(seed):
    """Vectors that turn and grow; the third step's chosen gradient is zero, the fifth's rejected one is not finite."""
    rng = np.random.default_rng(seed)
    steps = [_at_angle(rng, angle, *10 ** rng.uniform(-1, 1, 2)) for angle in rng.uniform(0.1, 3.0, 8)]
    steps[2] = (0 * steps[2][0], steps[2][1])
    steps[4] = (steps[4][0], np.full(SIZE, np.inf))
    return steps


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.98])
@each(RUNNING)
@pytest.mark.usefixtures("x64")
def test_a_weighting_with_memory_is_its_definition_over_a_sequence(case, decay):
    sequence = _sequence(5)
    tx = transforms.combine_pair(WEIGHTINGS[case].make(decay))
    state = tx.init(_tree(sequence[0][0][None], jnp.float64))
    updates = []
    for step in sequence:
        update, state = tx.update(PairGradients(*(_tree(v[None], jnp.float64) for v in step)), state)
        updates.append(_vectors(update)[0])
    with np.errstate(invalid="ignore"):
        expected = getattr(naive, case)([(w, -l) for w, l in sequence], decay)
    assert np.isnan(updates[4]).all()
    for i in (0, 1, 2, 3, 5, 6, 7):
        np.testing.assert_allclose(-updates[i], expected[i], rtol=1e-10, atol=1e-12, err_msg=f"step {i}")


@pytest.mark.parametrize("bad", [(np.inf, 1.0, 1.0), (1.0, np.nan, np.nan), (1.0, np.inf, 0.5)])
@each(RUNNING)
def test_the_memory_outlives_a_gram_that_is_not_finite(case, bad):
    """Also one whose norm overflowed although its inner product did not."""
    weighting = as_running(WEIGHTINGS[case].make(0.5))
    good, bad = (PairGeometry(*(jnp.float32(x) for x in gram)) for gram in ((4.0, 16.0, -4.0), bad))
    _, memory = weighting.update(good, weighting.init(good))
    refused, after = weighting.update(bad, memory)
    assert np.isnan(refused).all()
    for left, right in zip(jax.tree.leaves(after), jax.tree.leaves(memory), strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_gradvac_target_that_has_rounded_to_one_gives_a_finite_step():
    weighting = transforms.gradvac_ema(0.5)
    opposite, ordinary = (PairGeometry(*(jnp.float32(x) for x in (1.0, 1.0, inner))) for inner in (-1.0, 0.5))
    target = weighting.init(opposite)
    for _ in range(40):
        _, target = weighting.update(opposite, target)
    assert float(target) == 1
    (x, y), _ = weighting.update(ordinary, target)
    # 1 + p sqrt((1 - k^2) / (1 - p^2)) - k with k = -1/2 and 1 - p^2 no less than 4 eps
    assert float(x) == float(y) == pytest.approx(1.5 + (0.75 / (4 * 2**-23)) ** 0.5, rel=1e-6)


# Pair by pair.


@functools.cache
def _padded_pairs():
    """Parameters, the pairs, coefficients and geometry: no completion in pair 1, none chosen in pair 3, d_l = 0 in pair 4."""
    params, batch = draw_params("bigram", 4, jnp.float32), draw_pairs(4)
    batch = batch._replace(completion_mask=batch.completion_mask.at[1].set(False).at[3, 0].set(False))
    d = Coefficients(jnp.array([1.0, 0.5, 2.0, 1.5, 0.7]), jnp.array([0.3, 0.5, 1.0, 1.5, 0.0]))
    return params, batch, d, jax.jit(geometry.pair_geometry, static_argnums=0)(MODELS["bigram"], params, batch)


@jax.jit
def _gradient(params, batch, d):
    chosen, rejected = geometry.pair_vjp(MODELS["bigram"], params, batch)[1](*d)
    return jax.tree.map(jnp.subtract, rejected, chosen)


@each([name for name, case in CASES.items() if case.name not in RUNNING])
def test_a_padded_pair_adds_nothing_and_changes_no_other_pair(case):
    name, settings, _ = CASES[case]
    rule = transforms.per_pair(WEIGHTINGS[name].make(**settings))
    params, batch, d, s = _padded_pairs()
    assert float(s.chosen_sq_norm[1]) == float(s.rejected_sq_norm[1]) == float(s.chosen_sq_norm[3]) == 0
    found = rule(d, s)
    another = rule(*jax.tree.map(lambda x: x.at[1].set(x[0]), (d, s)))
    for side, other in zip(found, another, strict=True):
        assert bool(jnp.isfinite(side).all())
        np.testing.assert_array_equal(np.delete(side, 1), np.delete(other, 1))
    # whatever coefficients it has, they meet a gradient of zero
    without = Coefficients(*(side.at[1].set(0.0) for side in found))
    np.testing.assert_array_equal(*(flatten(_gradient(params, batch, c)) for c in (found, without)))
