"""The head of a pair chain: the ordinary gradient step exactly, and the laws of optax for every weighting."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from entangle import geometry, losses, transforms
from entangle.losses import Coefficients
from entangle.types import PairGeometry, PairGradients
from tests.toy import MODELS, draw_pairs, draw_params, flatten, pair_log_probs

WEIGHTINGS = {name: entry.make for name, entry in transforms.WEIGHTINGS.items()}
RUNNING = ("reward_calibrated", "gradvac_ema")


@pytest.fixture
def standard_promotion():
    """For the parts of optax that mix counters and floats; nothing of this package needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def _setting(dtype, seed=0):
    """Policy parameters, the reference's log-probabilities, pairs."""
    params, reference = (draw_params("mlp", 10 * seed + i, dtype) for i in (0, 1))
    batch = draw_pairs(seed)
    return params, MODELS["mlp"](reference, batch), batch


@jax.jit
def _pull_back(params, batch, d):
    return geometry.pair_vjp(MODELS["mlp"], params, batch)[1](*d)


def _pair_gradients(objective, params, reference, batch):
    log_probs = MODELS["mlp"](params, batch)
    return _pull_back(params, batch, losses.coefficients(objective, pair_log_probs(log_probs, reference, batch)))


def _mean_loss(objective, params, reference, batch):
    return jnp.mean(objective(pair_log_probs(MODELS["mlp"](params, batch), reference, batch)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.float64, 1e-12)])
@pytest.mark.parametrize("name", sorted(losses.OBJECTIVES))
@pytest.mark.usefixtures("x64")
def test_the_margin_combination_is_the_gradient_of_the_mean_loss(name, dtype, tolerance):
    params, reference, batch = _setting(dtype)
    objective = losses.OBJECTIVES[name]
    tx = transforms.combine_pair(transforms.margin())
    update, _ = tx.update(_pair_gradients(objective, params, reference, batch), tx.init(params))
    expected = jax.grad(lambda p: _mean_loss(objective, p, reference, batch))(params)
    assert jax.tree.structure(update) == jax.tree.structure(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(update)} == {jnp.dtype(dtype)}
    scale = np.max(np.abs(flatten(expected)))  # rounding is relative to the gradient, not to its smallest entry
    np.testing.assert_allclose(flatten(update) / scale, flatten(expected) / scale, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adamw(0.01, weight_decay=0.1)])
@pytest.mark.usefixtures("x64")
def test_a_margin_chain_follows_the_ordinary_optimizer(optimizer):
    params, reference, batch = _setting(jnp.float64)
    chain = optax.chain(transforms.combine_pair(transforms.margin()), optimizer)
    ours, theirs = (params, chain.init(params)), (params, optimizer.init(params))

    def step(tx, gradient, params, state):
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    apart = jax.jit(partial(step, chain, lambda p: _pair_gradients(losses.dpo, p, reference, batch)))
    ordinary = jax.jit(partial(step, optimizer, jax.grad(lambda p: _mean_loss(losses.dpo, p, reference, batch))))
    for _ in range(4):
        ours, theirs = apart(*ours), ordinary(*theirs)
    # AdamW divides by sqrt(v) and so magnifies rounding where a gradient is tiny
    np.testing.assert_allclose(flatten(ours[0]), flatten(theirs[0]), rtol=1e-10, atol=1e-12)


def test_half_precision_gradients_are_combined_in_float32_and_keep_their_dtype():
    # 1 - (1 + 2^-9) = -2^-9 is a bfloat16 number, but the weight 1 + 2^-9 is not: rounded first, nothing would be left
    ones = jnp.ones(257, jnp.bfloat16)
    tx = transforms.combine_pair(lambda gram: transforms.PairWeights(jnp.float32(1 + 2**-9), jnp.ones_like(gram[0])))
    update, state = tx.update(PairGradients(ones, ones), tx.init(ones))
    assert update.dtype == jnp.bfloat16
    np.testing.assert_array_equal(update.astype(jnp.float32), np.full(257, -(2.0**-9)))
    assert float(state.gram.chosen_sq_norm) == 257  # not a bfloat16 number
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}


def test_the_state_shows_the_gram_and_the_weights_of_the_last_step():
    tx = transforms.combine_pair(transforms.normalized())
    gradients = PairGradients({"w": jnp.array([3.0, 0.0])}, {"w": jnp.array([4.0, 3.0])})
    _, state = tx.update(gradients, tx.init(gradients.chosen))
    np.testing.assert_allclose(state.gram, [9.0, 25.0, 12.0], rtol=1e-6)
    np.testing.assert_allclose(state.weights, [1 / 3, 1 / 5], rtol=1e-6)


def _gradients(dtype):
    params = {"w": jnp.ones((2, 3), dtype), "b": jnp.ones(3, dtype)}
    return params, PairGradients(params, jax.tree.map(lambda x: 2 * x, params))


def _at_an_angle(dtype):
    """The same shapes; the two gradients are entangled, but not parallel."""
    chosen = {"w": jnp.full((2, 3), 2, dtype), "b": jnp.array([1, 0, -1], dtype)}
    return PairGradients(chosen, {"w": jnp.ones((2, 3), dtype), "b": jnp.array([-1, 2, 1], dtype)})


def _assert_laws_of_optax(tx, gradients):
    """Abstract init, one compilation, a state and updates of one structure, extra arguments swallowed."""
    params = gradients.chosen
    state = tx.init(params)

    def signature(tree):
        return jax.tree.structure(tree), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]

    assert signature(jax.eval_shape(tx.init, params)) == signature(state)
    traces = []

    @jax.jit
    def update(gradients, state):
        traces.append(None)
        return tx.update(gradients, state, value=1.0, unknown="swallowed")

    updates, after = update(gradients, state)
    assert signature(after) == signature(state)
    assert signature(updates) == signature(params)
    update(gradients, after)
    assert len(traces) == 1  # the second call is served by the first compilation
    eager, _ = tx.update(gradients, state, params)
    left, right = (flatten(tree).astype(np.float32) for tree in (eager, updates))
    # fused operations round elsewhere: one step of the leaves' dtype
    step = float(jnp.finfo(jax.tree.leaves(params)[0].dtype).eps)
    np.testing.assert_allclose(left, right, rtol=0, atol=2 * step * np.max(np.abs(left)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_laws_of_optax(name, dtype):
    _assert_laws_of_optax(transforms.combine_pair(WEIGHTINGS[name]()), _at_an_angle(dtype))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_maps_over_independent_pairs_of_gradients(name):
    tx = transforms.combine_pair(WEIGHTINGS[name]())
    rng = np.random.default_rng(0)
    many = PairGradients(*(jnp.asarray(rng.standard_normal((4, 3)), jnp.float32) for _ in range(2)))
    state = tx.init(jnp.zeros(3))
    mapped = jax.vmap(lambda g: tx.update(g, state))(many)
    for i in range(4):
        one = tx.update(PairGradients(many.chosen[i], many.rejected[i]), state)
        for left, right in zip(jax.tree.leaves(mapped), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(left[i], right, rtol=1e-5)


def test_inside_inject_hyperparams():
    params, gradients = _gradients(jnp.float32)

    def build(learning_rate):
        return optax.chain(transforms.combine_pair(transforms.margin()), optax.sgd(learning_rate))

    tx = optax.inject_hyperparams(build)(learning_rate=0.5)
    updates, state = tx.update(gradients, tx.init(params), params)
    np.testing.assert_allclose(flatten(updates), np.full(9, -0.5))  # -0.5 (2 - 1)
    assert float(state.hyperparams["learning_rate"]) == 0.5


SETTINGS = [
    ("fixed", "rejected", 1.0, 0.25),
    ("band", "inset", 0.0, 0.5),
    ("gradvac", "target", 0.0, 0.3),
    ("cagrad", "c", 0.4, 0.8),
]


@pytest.mark.parametrize(("name", "setting", "first", "second"), SETTINGS)
def test_a_setting_of_a_weighting_may_be_a_hyperparameter(name, setting, first, second):
    """One compilation serves every value, also where it stands in the chain's state."""
    gradients = _at_an_angle(jnp.float32)

    def build(value):
        return transforms.combine_pair(WEIGHTINGS[name](**{setting: value}))

    tx = optax.inject_hyperparams(build)(value=first)
    update = jax.jit(tx.update)
    state = tx.init(gradients.chosen)
    found = []
    for value in (first, second):
        state.hyperparams["value"] = jnp.float32(value)
        direct = build(value)
        expected, _ = direct.update(gradients, direct.init(gradients.chosen))
        updates, _ = update(gradients, state)
        np.testing.assert_allclose(flatten(updates), flatten(expected), rtol=1e-5, atol=1e-6)
        found.append(flatten(updates))
    assert not np.allclose(*found, rtol=1e-2)
    assert update._cache_size() == 1


@pytest.mark.parametrize("name", RUNNING)
def test_the_decay_of_a_memory_may_be_a_hyperparameter(name):
    gradients = _at_an_angle(jnp.float32)
    turned = PairGradients(gradients.rejected, jax.tree.map(lambda x: 3 * x, gradients.rejected))
    tx = optax.inject_hyperparams(lambda decay: transforms.combine_pair(WEIGHTINGS[name](decay)))(decay=0.5)
    state = tx.init(gradients.chosen)
    direct = transforms.combine_pair(WEIGHTINGS[name](0.25))
    expected = direct.init(gradients.chosen)
    state.hyperparams["decay"] = jnp.float32(0.25)
    for step in (gradients, turned, gradients):
        _, state = tx.update(step, state)
        _, expected = direct.update(step, expected)
    for left, right in zip(jax.tree.leaves(state.inner_state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_before_multi_steps():
    """The head stands before the accumulation: MultiSteps then sees one tree, like the parameters."""
    params, gradients = _gradients(jnp.float32)
    tx = optax.chain(
        transforms.combine_pair(transforms.margin()), optax.MultiSteps(optax.sgd(0.5), 2).gradient_transformation()
    )
    first, state = tx.update(gradients, tx.init(params), params)
    second, _ = tx.update(jax.tree.map(lambda x: 3 * x, gradients), state, params)
    np.testing.assert_allclose(flatten(first), np.zeros(9))
    np.testing.assert_allclose(flatten(second), np.full(9, -1.0), rtol=1e-6)  # -0.5 times the mean of 1 and 3


def test_updates_that_are_not_pair_gradients_are_refused():
    tx = transforms.combine_pair(transforms.margin())
    with pytest.raises(TypeError, match="combine_pair takes PairGradients, got dict: put it first in the chain"):
        tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))


# Groups and stacked layers.


def _model_gradients(seed=0, layers=3):
    """A model with an embedding, stacked blocks of two parameters, and a head of two."""
    rng = np.random.default_rng(seed)
    shapes = {
        "embed": (4, 2),
        "blocks": {"kernel": (layers, 2, 3), "bias": (layers, 3)},
        "head": {"kernel": (2, 4), "scale": ()},
    }
    return PairGradients(
        *(
            jax.tree.map(
                lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
                shapes,
                is_leaf=lambda node: isinstance(node, tuple),
            )
            for _ in range(2)
        )
    )


def _block(path):
    return path.split("/")[0]


def _in_blocks(path):
    return path.startswith("blocks")


def _one_gram(weighting, chosen, rejected):
    """Two lists of arrays combined by themselves, under one Gram; the state, too."""
    tx = transforms.combine_pair(weighting)
    return tx.update(PairGradients(chosen, rejected), tx.init(chosen))


def _assert_close(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_group_is_combined_by_itself(name):
    gradients = _model_gradients()
    tx = transforms.combine_pair(WEIGHTINGS[name](), group=_block)
    update, state = tx.update(gradients, tx.init(gradients.chosen))
    assert jax.tree.structure(update) == jax.tree.structure(gradients.chosen)
    for part in ("embed", "blocks", "head"):
        expected, alone = _one_gram(WEIGHTINGS[name](), gradients.chosen[part], gradients.rejected[part])
        _assert_close(update[part], expected)
        _assert_close((state.gram[part], state.weights[part], state.memory[part]), tuple(alone))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_stacked_layer_is_combined_by_itself(name):
    gradients = _model_gradients()
    tx = transforms.combine_pair(WEIGHTINGS[name](), group=_block, stacked=_in_blocks)
    update, state = tx.update(gradients, tx.init(gradients.chosen))
    shapes = {
        part: {leaf.shape for leaf in jax.tree.leaves((state.gram[part], state.weights[part]))} for part in state.gram
    }
    assert shapes == {"embed": {()}, "blocks": {(3,)}, "head": {()}}
    for layer in range(3):
        two = [jax.tree.map(lambda x, i=layer: x[i], side["blocks"]) for side in gradients]
        expected, alone = _one_gram(WEIGHTINGS[name](), *two)
        _assert_close(jax.tree.map(lambda x, i=layer: x[i], update["blocks"]), expected)
        of_layer = jax.tree.map(
            lambda x, i=layer: x[i], (state.gram["blocks"], state.weights["blocks"], state.memory["blocks"])
        )
        _assert_close(of_layer, tuple(alone))
    for part in ("embed", "head"):
        _assert_close(update[part], _one_gram(WEIGHTINGS[name](), gradients.chosen[part], gradients.rejected[part])[0])


def test_layers_may_be_stacked_without_groups():
    gradients = PairGradients(*(side["blocks"] for side in _model_gradients()))
    tx = transforms.combine_pair(transforms.normalized(), stacked=lambda path: True)
    update, state = tx.update(gradients, tx.init(gradients.chosen))
    assert state.weights.chosen.shape == state.gram.inner_product.shape == (3,)
    for layer in range(3):
        w, l = (flatten(jax.tree.map(lambda x, i=layer: x[i], side)) for side in gradients)
        step = flatten(jax.tree.map(lambda x, i=layer: x[i], update))
        np.testing.assert_allclose(step, l / np.linalg.norm(l) - w / np.linalg.norm(w), rtol=1e-5, atol=1e-6)


def test_groups_are_named_by_the_paths_of_their_parameters():
    seen = []
    gradients = _model_gradients()
    transforms.combine_pair(transforms.margin(), group=lambda path: seen.append(path) or "all").init(gradients.chosen)
    assert set(seen) == {"embed", "blocks/kernel", "blocks/bias", "head/kernel", "head/scale"}


def test_a_function_that_names_one_group_changes_nothing_but_the_state_s_shape():
    gradients = _model_gradients()
    results = []
    for settings in ({}, {"group": lambda path: "whole"}):
        tx = transforms.combine_pair(transforms.gradvac_ema(), **settings)
        results.append(tx.update(gradients, tx.init(gradients.chosen)))
    (plain, state), (grouped, by_name) = results
    np.testing.assert_array_equal(flatten(plain), flatten(grouped))
    assert set(by_name.gram) == set(by_name.weights) == set(by_name.memory) == {"whole"}
    assert by_name.gram["whole"] == state.gram and by_name.memory["whole"] == state.memory


def test_every_group_may_have_a_weighting_of_its_own():
    gradients = _model_gradients()
    weightings = {
        "embed": transforms.margin(),
        "blocks": transforms.reward_calibrated(),
        "head": transforms.normalized(),
    }
    tx = transforms.combine_pair(weightings, group=_block)
    state = tx.init(gradients.chosen)
    assert (state.memory["embed"], state.memory["head"]) == ((), ())
    update, state = tx.update(gradients, state)
    for part, weighting in weightings.items():
        _assert_close(update[part], _one_gram(weighting, gradients.chosen[part], gradients.rejected[part])[0])
    # (1, 1), and lengths of one
    np.testing.assert_array_equal(update["embed"], gradients.rejected["embed"] - gradients.chosen["embed"])
    assert float(state.weights["head"].chosen) == pytest.approx(1 / np.linalg.norm(flatten(gradients.chosen["head"])))


@pytest.mark.parametrize("stacked", [None, _in_blocks])
@pytest.mark.parametrize("name", RUNNING)
def test_every_group_remembers_for_itself(name, stacked):
    """Three steps of all groups in one head, against a head for every group alone."""
    tx = transforms.combine_pair(WEIGHTINGS[name](0.6), group=_block, stacked=stacked)
    steps = [_model_gradients(seed) for seed in range(3)]
    state = tx.init(steps[0].chosen)
    heads = {
        part: transforms.combine_pair(
            WEIGHTINGS[name](0.6), stacked=(lambda path: True) if stacked and _in_blocks(part) else None
        )
        for part in steps[0].chosen
    }
    alone = {part: head.init(steps[0].chosen[part]) for part, head in heads.items()}
    memories = []
    for gradients in steps:
        update, state = jax.jit(tx.update)(gradients, state)
        for part, head in heads.items():
            expected, alone[part] = head.update(PairGradients(*(side[part] for side in gradients)), alone[part])
            _assert_close(update[part], expected)
            _assert_close(state.memory[part], alone[part].memory)
        memories.append(flatten(state.memory))
    assert not np.allclose(memories[0], memories[1], rtol=1e-3)  # it moves
    assert not np.allclose(memories[1], memories[2], rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["pcgrad", *RUNNING])
def test_laws_of_optax_with_groups_and_stacked_layers(name, dtype):
    gradients = jax.tree.map(lambda x: x.astype(dtype), _model_gradients())
    tx = transforms.combine_pair(WEIGHTINGS[name](), group=_block, stacked=_in_blocks)
    _assert_laws_of_optax(tx, gradients)


def test_the_promise_holds_for_every_group():
    chosen, rejected = _model_gradients()
    # nearly parallel and longer: the plain step lowers chosen by |chosen|^2 and more
    gradients = PairGradients(chosen, jax.tree.map(lambda w, l: 3 * w + l, chosen, rejected))

    def gains(weighting):
        tx = transforms.combine_pair(weighting, group=_block)
        update, _ = tx.update(gradients, tx.init(gradients.chosen))
        return [
            sign * flatten(side[part]) @ flatten(update[part])
            for side, sign in ((gradients.chosen, -1), (gradients.rejected, 1))
            for part in side
        ]

    assert min(gains(transforms.pcgrad())) > 0
    assert min(gains(transforms.margin())) < 0  # so that there was something to keep


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"group": lambda path: "all", "stacked": _in_blocks},
            "embed has no layers, others of group 'all' 3 layers",
        ),
        ({"stacked": lambda path: path.startswith("layers")}, "stacked says so of no parameter"),
        ({"where": lambda path: False}, "no parameters are trained"),
        ({"stacked": lambda path: "kernel" in path}, "blocks/kernel has 3 layers, others of group 'all' no layers"),
        (
            {"stacked": lambda path: path != "head/scale", "group": lambda path: path.split("/")[-1]},
            "head/kernel has 2 layers, others of group 'kernel' 3 layers",
        ),
    ],
)
def test_parameters_of_one_group_have_one_number_of_layers(settings, message):
    tx = transforms.combine_pair(transforms.margin(), **settings)
    with pytest.raises(ValueError, match=message):
        tx.init(_model_gradients().chosen)


@pytest.mark.parametrize("group", [None, _block])
def test_what_is_not_trained_is_in_no_gram_and_gets_zero(group):
    gradients = _model_gradients()
    part = PairGradients(*({"head": side["head"]} for side in gradients))
    tx = transforms.combine_pair(transforms.pcgrad(), group=group, where=lambda path: path.startswith("head"))
    alone = transforms.combine_pair(transforms.pcgrad(), group=group)
    update, state = tx.update(gradients, tx.init(gradients.chosen))
    expected, expected_state = alone.update(part, alone.init(part.chosen))
    _assert_close(update["head"], expected["head"])
    _assert_close(tuple(state), tuple(expected_state))
    assert not np.any(flatten(update["embed"])) and not np.any(flatten(update["blocks"]))


@pytest.mark.parametrize(
    ("rejected", "message"),
    [
        ({"a": np.ones(2, np.float32)}, r": b is \(3,\) and missing"),
        ({"a": np.ones(2, np.float32), "b": np.ones(1, np.float32)}, r": b is \(3,\) and \(1,\)"),
        ([np.ones(2, np.float32), np.ones(3, np.float32)], "not trees of one structure and shapes"),
    ],
)
def test_two_trees_that_are_not_alike_are_refused(rejected, message):
    chosen = {"a": jnp.ones(2), "b": jnp.ones(3)}
    tx = transforms.combine_pair(transforms.margin())
    with pytest.raises(ValueError, match=message):
        tx.update(PairGradients(chosen, rejected), tx.init(chosen))


@pytest.mark.parametrize(
    ("leaf", "found"),
    [
        (jnp.array([1, 2]), "int32"),
        (jnp.array([1 + 1j]), "complex64"),
        (np.zeros(2, jax.dtypes.float0), "float0"),
        (jnp.array([True]), "bool"),
        (1.5, "float"),
    ],
    ids=str,
)
def test_leaves_that_are_no_arrays_of_real_floating_numbers_are_refused_by_path(leaf, found):
    tx = transforms.combine_pair(transforms.pcgrad())
    tree = {"a": jnp.ones(2), "b": {"step": leaf}}
    with pytest.raises(TypeError, match=f"^combine_pair: chosen has {found} at b/step, and an array of real"):
        tx.update(PairGradients(tree, tree), tx.init({"a": jnp.ones(2)}))


def test_gradients_of_other_groups_than_the_parameters_are_refused():
    tx = transforms.combine_pair(transforms.pcgrad(), group=lambda path: path)
    one, other = {"a": jnp.ones(2)}, {"b": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"groups and their layers are {'b': \(\)}, those of .* for are {'a': \(\)}"):
        tx.update(PairGradients(other, other), tx.init(one))
    tx = transforms.combine_pair(transforms.gradvac_ema(), stacked=lambda path: True)
    with pytest.raises(ValueError, match=r"are {'all': \(2,\)}, those of .* for are {'all': \(1,\)}"):
        tx.update(PairGradients(jnp.ones((2, 3)), jnp.ones((2, 3))), tx.init(jnp.ones((1, 3))))


def test_paths_that_are_written_alike_are_not_taken_for_one():
    tx = transforms.combine_pair(transforms.margin())
    chosen, rejected = ({"a/b": jnp.ones(3), "a": {"b": jnp.ones(n)}} for n in (2, 1))
    with pytest.raises(ValueError, match="not trees of one structure and shapes"):
        tx.update(PairGradients(chosen, rejected), tx.init(chosen))


def test_maps_over_parameters_find_those_of_the_optimizer():
    """As optax's own tools for placing and masking states ask: with a tree that has no leaves."""
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    head = transforms.combine_pair(transforms.pcgrad())
    chain = optax.chain(head, optax.adam(1.0))
    for tx, mapped in (
        (chain, 4),
        (optax.chain(transforms.project_retain(2), optax.adam(1.0)), 6),
        (optax.chain(transforms.project_retain(0, metric=transforms.AdamMetric()), optax.sgd(1.0)), 2),
        (transforms.protect_chosen(chain), 4),
        (transforms.retain_invariant(chain, 3, remember=lambda path: path == "b"), 5),
        (transforms.accumulate_pairs(chain, 2), 8),
    ):
        state = tx.init(params)
        after = optax.tree.map_params(tx, lambda leaf: leaf + 7, state)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), after, state)
        assert sum(jax.tree.leaves(moved)) == mapped


@pytest.mark.parametrize("name", ["group", "stacked", "where"])
def test_what_should_be_a_function_of_a_path_is_refused(name):
    with pytest.raises(TypeError, match=f"^{name}: a function of a parameter's path is needed, got 'a'"):
        transforms.combine_pair(transforms.pcgrad(), **{name: "a"})


@pytest.mark.parametrize(
    ("weights", "shapes"),
    [
        (lambda g: g.inner_product, r"\[\[\]\]"),
        (lambda g: (1.0, 1.0, 1.0), r"\[\[\], \[\], \[\]\]"),
        (lambda g: (jnp.ones(2), 1.0), r"\[\[2\], \[\]\]"),
    ],
    ids=["one", "three", "of another shape"],
)
def test_a_weighting_that_gives_no_two_weights_is_refused(weights, shapes):
    tx = transforms.combine_pair(weights)
    tree = {"a": jnp.ones(2)}
    with pytest.raises(TypeError, match=rf"two weights, .* of the Gram's shape \[\]; this one gave shapes {shapes}$"):
        tx.update(PairGradients(tree, tree), tx.init(tree))
    if shapes != r"\[\[2\], \[\]\]":
        with pytest.raises(TypeError, match="two weights"):
            transforms.per_pair(weights)(Coefficients(jnp.ones(3), jnp.ones(3)), PairGeometry(*jnp.ones((3, 3))))


def test_what_can_be_meant_for_a_gram_is_a_weighting():
    rule = transforms.pcgrad()
    tree = {"a": jnp.ones(2)}

    def around(*args):
        return list(rule(*args))

    tx = transforms.combine_pair(around)
    updates, _ = tx.update(PairGradients(tree, tree), tx.init(tree))
    assert updates["a"].tolist() == [0, 0]
    with pytest.raises(TypeError, match=r"pcgrad takes no Gram, so it makes a weighting: call it, pcgrad\(\)"):
        transforms.combine_pair(transforms.pcgrad)


def test_numbers_are_weights_too():
    """Of every layer, where layers are groups: the state is the same at every step."""
    tree = {"a": jnp.array([[1.0], [2.0]])}
    tx = transforms.combine_pair(lambda gram: (2.0, 1), stacked=lambda path: True)
    state = tx.init(tree)
    updates, after = tx.update(PairGradients(tree, tree), state)
    assert updates["a"].tolist() == [[-1.0], [-2.0]]
    assert [w.tolist() for w in after.weights] == [[2.0, 2.0], [1.0, 1.0]]
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


@pytest.mark.usefixtures("x64")
def test_the_state_keeps_the_parameters_dtypes_where_groups_differ_or_gradients_are_narrower():
    params = {"w": jnp.ones(3, jnp.float64), "b": jnp.ones(2, jnp.float32)}
    narrow = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    for group, gradients in ((_block, params), (None, narrow)):
        tx = transforms.combine_pair(transforms.pcgrad(), group=group)
        state = tx.init(params)
        after = tx.update(PairGradients(gradients, gradients), state)[1]
        assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]


def test_no_two_arrays_of_the_state_share_a_buffer():
    state = transforms.combine_pair(transforms.pcgrad()).init(jnp.ones(2))
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(places)) == len(places)


def test_a_schedule_in_the_place_of_a_setting_is_refused():
    with pytest.raises(TypeError, match=r"c: a number, not a schedule; optax\.inject_hyperparams"):
        transforms.cagrad(optax.linear_schedule(0.0, 0.5, 3))
    with pytest.raises(ValueError, match=r"c: 5 is not in \[0, 1\)"):
        transforms.cagrad(np.float32(5.0))


def test_weightings_and_groups_are_the_same():
    weightings = {"embed": transforms.margin(), "body": transforms.margin()}
    tx = transforms.combine_pair(weightings, group=_block)
    message = r"weightings are for the groups \['body', 'embed'\], the parameters' are \['blocks', 'embed', 'head'\]"
    with pytest.raises(ValueError, match=message):
        tx.init(_model_gradients().chosen)
    with pytest.raises(ValueError, match="weightings by name of a group need group"):
        transforms.combine_pair(weightings)


def test_what_is_no_weighting_is_refused():
    with pytest.raises(
        TypeError, match=r"a weighting is a function of the Gram, got str 'pcgrad': get_weighting\('pcgrad'\)"
    ):
        transforms.combine_pair("pcgrad")
    with pytest.raises(TypeError, match=r"pcgrad takes no Gram, so it makes a weighting: call it, pcgrad\(\)"):
        transforms.combine_pair({"head": transforms.pcgrad}, group=_block)


# What the heads saw.


@pytest.mark.usefixtures("standard_promotion")
def test_the_heads_of_a_chain_are_found_however_deep():
    gradients = _at_an_angle(jnp.float32)
    params = gradients.chosen

    def head(weighting):
        return transforms.combine_pair(weighting)

    chains = {
        "chain": optax.chain(head(transforms.pcgrad()), optax.adamw(1e-3)),
        "nested": optax.chain(optax.chain(head(transforms.pcgrad())), optax.sgd(0.1)),
        "injected": optax.inject_hyperparams(lambda lr: optax.chain(head(transforms.pcgrad()), optax.sgd(lr)))(lr=0.1),
    }
    for name, tx in chains.items():
        _, state = tx.update(gradients, tx.init(params), params)
        (found,) = transforms.combined({"optimizer": [state, 3]})
        # |chosen|^2 = 6 * 4 + 2, |rejected|^2 = 6 + 6, the product 6 * 2 - 2
        np.testing.assert_allclose(found.gram, [26.0, 12.0, 10.0], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(found.weights, [1 + 10 / 26, 1 + 10 / 12], rtol=1e-6, err_msg=name)
    two = [head(weighting).init(params) for weighting in (transforms.margin(), transforms.gradvac_ema())]
    assert [state.memory for state in transforms.combined(two)] == [(), 0.0]
    assert transforms.combined(optax.adam(0.1).init(params)) == []


# Pair by pair.


@pytest.mark.parametrize("name", sorted(set(WEIGHTINGS) - set(RUNNING)))
@pytest.mark.usefixtures("x64")
def test_per_pair_is_a_loop_over_pairs(name):
    """A head of one pair alone, on the gradients d_w g_w and d_l g_l themselves; coefficients of both signs."""
    rng = np.random.default_rng(1)
    g = rng.standard_normal((6, 2, 4))
    d = rng.uniform(0.2, 2.0, (2, 6)) * np.array([[1, 1, 1, -1, 1, -1], [1, 1, 1, 1, -1, -1]])
    squares = (np.sum(a * b, -1) for a, b in ((g[:, 0], g[:, 0]), (g[:, 1], g[:, 1]), (g[:, 0], g[:, 1])))
    rule = transforms.per_pair(WEIGHTINGS[name]())
    found = rule(Coefficients(*jnp.asarray(d)), PairGeometry(*(jnp.asarray(x) for x in squares)))
    tx = transforms.combine_pair(WEIGHTINGS[name]())
    for i in range(6):
        w, l = (jnp.asarray(d[side, i] * g[i, side]) for side in (0, 1))
        update, _ = tx.update(PairGradients(w, l), tx.init(w))
        step = float(found.rejected[i]) * g[i, 1] - float(found.chosen[i]) * g[i, 0]
        np.testing.assert_allclose(step, update, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", RUNNING)
def test_per_pair_refuses_a_memory(name):
    with pytest.raises(TypeError, match="per_pair takes weightings without memory: a pair is not seen at every step"):
        transforms.per_pair(WEIGHTINGS[name]())
