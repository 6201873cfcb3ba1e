"""What combining the pair's two gradients costs in the optimizer's step: a pair chain against AdamW alone, on one gradient.

No model runs: parameters and gradients are random, of a decoder's shapes. Every step gives its parameters and state away, as
a training step does, so each contender goes on from where it was; the gradients stay the same, and so does the work.

The contenders' steps differ, so their numbers cannot be held against each other. Each is held against the step in NumPy: all
of the first one, and in every run one number, the length of the first leaf's way along the way that it should have gone, over
that one's length, and so 1 on all sides.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from entangle import transforms
from entangle.models import language_model, preset
from entangle.paths import named_leaves
from entangle.types import PairGradients, Params
from scripts.benchmarks.measuring import Contender

# optax's defaults, written again for the step in NumPy
LEARNING_RATE, WEIGHT_DECAY, DECAYS, EPSILON = 1e-5, 1e-4, (0.9, 0.999), 1e-8
# Of the norms of a leaf's change and of its two moments. A float32 parameter is good to 1e-4 of the change that a step makes
# in it, and where gradients are nearly zero AdamW magnifies their rounding: at full size the worst leaf is off by 2e-4, 4e-7
# and 6e-7.
AGREEMENT = np.array([1e-3, 1e-5, 1e-5])
# Of the parameters' bytes: a copy of them, or of one gradient, would be 1.
MOST_TEMPORARY = 0.1
# Entries of a leaf: their float64 fits the processor's cache.
PART = 8192
ALL = slice(None)

Rule = Callable[[float, float, float], tuple[float, float]]
"""The two squared norms and the inner product to the weights x and y of ``y rejected - x chosen``."""


class Side(NamedTuple):
    """A chain, and what it should do.

    Attributes:
      tx: the chain.
      given: the updates that it is given at every step.
      rule: weights of a group.
      group: a parameter's path to the name of its group.
    """

    tx: optax.GradientTransformationExtraArgs
    given: Any
    rule: Rule
    group: Callable[[str], str]


class CopyError(RuntimeError):
    """A chain holds temporary arrays that it should not need."""


def prepare(folder: Path) -> tuple[Contender, ...]:
    """Make the contenders at GPT-2-small size; the folder is not used."""
    return contenders(gpt2_shapes())


def gpt2_shapes() -> Params:
    """Shapes of this package's GPT-2 small."""
    return jax.eval_shape(language_model(preset("gpt2", 50257)).init, jax.random.key(0))


def contenders(shapes: Params) -> tuple[Contender, ...]:
    """Make the contenders at any size: PCGrad, AdamW alone, the margin's own combination, PCGrad in every block.

    Args:
      shapes: parameters, of which shapes and names are used.

    Raises:
      AssertionError: the first step is not NumPy's.
      CopyError: a step has temporary arrays of a tenth of the parameters' size or more.
    """
    params, gradients = draw(shapes)
    return tuple(contender(name, side, params, gradients) for name, side in sides(gradients).items())


def draw(shapes: Params) -> tuple[Params, PairGradients]:
    """Random parameters and gradients in float32; the two gradients' cosine differs from leaf to leaf."""
    rng = np.random.default_rng(0)

    def normal(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return rng.standard_normal(leaf.shape, dtype=np.float32)

    def along(leaf: jax.Array) -> jax.Array:
        cosine = np.float32(rng.uniform(-0.2, 0.9))
        return jnp.asarray(2 * (cosine * leaf + np.float32(1e-3) * np.sqrt(1 - cosine**2) * normal(leaf)))

    params = jax.tree.map(lambda leaf: jnp.asarray(np.float32(0.02) * normal(leaf)), shapes)
    chosen = jax.tree.map(lambda leaf: jnp.asarray(np.float32(1e-3) * normal(leaf)), shapes)
    return params, PairGradients(chosen, jax.tree.map(along, chosen))


def sides(gradients: PairGradients) -> dict[str, Side]:
    """The chains by name."""

    def chain(weighting: transforms.Weighting, group: Callable[[str], str] | None = None) -> Any:
        return optax.chain(transforms.combine_pair(weighting, group=group), optax.adamw(LEARNING_RATE))

    def whole(path: str) -> str:
        return ""

    return {
        "pcgrad": Side(chain(transforms.pcgrad()), gradients, _pcgrad, whole),
        "adamw": Side(optax.adamw(LEARNING_RATE), gradients.chosen, lambda a, b, c: (-1.0, 0.0), whole),
        "margin": Side(chain(transforms.margin()), gradients, lambda a, b, c: (1.0, 1.0), whole),
        "blocks": Side(chain(transforms.pcgrad(), block), gradients, _pcgrad, block),
    }


def _pcgrad(chosen_sq_norm: float, rejected_sq_norm: float, inner_product: float) -> tuple[float, float]:
    # Yu et al., algorithm 1, on chosen and -rejected, which conflict where the inner product is positive
    conflict = max(inner_product, 0.0)
    return 1 + conflict / chosen_sq_norm, 1 + conflict / rejected_sq_norm


def block(path: str) -> str:
    """``layers/3`` of a parameter in the fourth block, else the path's first name."""
    names = path.split("/")
    return "/".join(names[:2]) if names[0] == "layers" else names[0]


def compile_step(tx: optax.GradientTransformationExtraArgs, params: Params, gradients: Any) -> Any:
    """The optimizer's step, compiled: parameters, state and gradients to the next parameters and state; the first two go."""

    def step(params: Params, state: Any, gradients: Any) -> tuple[Params, Any]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), gradients).compile()


def peak_memory(compiled: Any, params: Params) -> int:
    """Bytes of arguments, results and temporaries, what is shared counted once.

    Raises:
      CopyError: the temporaries have a tenth of the parameters' size or more, or the state is copied.
    """
    memory = compiled.memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    for kind, found in (("temporaries", memory.temp_size_in_bytes), ("results not in place", new)):
        if found >= MOST_TEMPORARY * size:
            raise CopyError(f"{kind} of {found:,} bytes in a step of {size:,} bytes of parameters; nothing was timed")
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + new


def contender(name: str, side: Side, params: Params, gradients: PairGradients) -> Contender:
    """Compile a side's step, check its memory and its first step, and let it go on from the start.

    Raises:
      AssertionError: the first step is not NumPy's.
      CopyError: as :func:`peak_memory`.
    """
    compiled = compile_step(side.tx, params, side.given)
    memory = peak_memory(compiled, params)
    right = right_gradients(side, gradients)

    def begin() -> tuple[Params, Any]:
        return jax.tree.map(jnp.copy, params), side.tx.init(params)

    check_first_step(params, *compiled(*begin(), side.given), right)
    state = begin()
    start, gradient = _wide(jax.tree.leaves(params)[0]), right(0)
    should = start

    def run() -> float:
        nonlocal state, should
        state = jax.block_until_ready(compiled(*state, side.given))
        should = _moved(should, gradient)
        way = _wide(jax.tree.leaves(state[0])[0]) - start
        return float(np.vdot(way, should - start) / np.vdot(should - start, should - start))

    return Contender(name, run, memory)


def right_gradients(side: Side, gradients: PairGradients) -> Callable[..., np.ndarray]:
    """A leaf's number and a part of its entries to the gradient that AdamW should be given there, in float64."""
    groups = [side.group(path) for path, _ in named_leaves(gradients.chosen)]
    leaves = list(zip(jax.tree.leaves(gradients.chosen), jax.tree.leaves(gradients.rejected), strict=True))
    grams = {name: np.zeros(3) for name in groups}
    for name, (chosen, rejected) in zip(groups, leaves, strict=True):
        for part in _parts(chosen):
            w, l = _wide(chosen, part), _wide(rejected, part)
            grams[name] += [w @ w, l @ l, w @ l]
    weights = {name: side.rule(*gram) for name, gram in grams.items()}

    def gradient(leaf: int, part: slice = ALL) -> np.ndarray:
        (x, y), (chosen, rejected) = weights[groups[leaf]], leaves[leaf]
        return y * _wide(rejected, part) - x * _wide(chosen, part)

    return gradient


def check_first_step(params: Params, after: Params, state: Any, right: Callable[..., np.ndarray]) -> None:
    """Compare every parameter's change and both of its moments with the step in NumPy.

    Raises:
      AssertionError: somewhere they are off by more than AGREEMENT of the norm.
    """
    moments = [optax.tree_utils.tree_get(state, name) for name in ("mu", "nu")]
    leaves = zip(*map(jax.tree.leaves, (params, after, *moments)), strict=True)
    for leaf, (before, now, first, second) in enumerate(leaves):
        off, size = np.zeros(3), np.zeros(3)
        for part in _parts(before):
            old, gradient = _wide(before, part), right(leaf, part)
            expected = _moved(old, gradient) - old, (1 - DECAYS[0]) * gradient, (1 - DECAYS[1]) * gradient**2
            found = _wide(now, part) - old, _wide(first, part), _wide(second, part)
            off += [np.sum((a - b) ** 2) for a, b in zip(found, expected, strict=True)]
            size += [np.sum(b**2) for b in expected]
        np.testing.assert_array_less(np.sqrt(off), AGREEMENT * np.sqrt(size))


def _moved(before: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    # Loshchilov and Hutter, algorithm 2: with one gradient at all steps its moments, bias corrected, are it and its square
    return before - LEARNING_RATE * (gradient / (abs(gradient) + EPSILON) + WEIGHT_DECAY * before)


def _parts(leaf: jax.Array) -> list[slice]:
    return [slice(start, start + PART) for start in range(0, leaf.size, PART)]


def _wide(leaf: jax.Array, part: slice = ALL) -> np.ndarray:
    return np.asarray(leaf).reshape(-1)[part].astype(np.float64)
