"""All objectives and their coefficients on thousands of pairs in one jitted call, against one pair through a decoder.

The two do different work, so their numbers cannot be held against each other. Each is held against itself, uncompiled: all
of it once, and in every run one number, which is given over that of the uncompiled work and so is 1 on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from entangle import losses
from entangle.models import DecoderConfig, language_model, preset
from entangle.types import PairLogProbs
from scripts.benchmarks.measuring import Contender
from scripts.benchmarks.step import LENGTH, draw_examples

PAIRS = 4096
# Of the largest number of an array. In float32: sums over thousands of numbers, whose order differs.
AGREEMENT = 1e-4


def prepare(folder: Path) -> tuple[Contender, ...]:
    """Make both contenders, the decoder at GPT-2-small size; the folder is not used."""
    return contenders(preset("gpt2", 50257), PAIRS, LENGTH)


def contenders(config: DecoderConfig, pairs: int, length: int) -> tuple[Contender, ...]:
    """Make both contenders at any size.

    Args:
      config: shapes of the decoder, which has one pair.
      pairs: B of the objectives.
      length: T of the decoder's pair, and the most tokens of a response that the objectives see.
    """
    model = language_model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    pair = draw_examples(config.vocab_size, 1, length).pairs
    return (
        contender("objectives", all_objectives, draw_log_probs(pairs, length)),
        contender("forward", model.log_probs, params, pair),
    )


def all_objectives(lp: PairLogProbs) -> Mapping[str, tuple[jax.Array, losses.Coefficients]]:
    """Losses and coefficients of every objective at its default hyperparameters, by name."""
    return {name: losses.loss_and_coefficients(objective, lp) for name, objective in losses.OBJECTIVES.items()}


def draw_log_probs(pairs: int, length: int) -> PairLogProbs:
    """Random responses of many lengths, 1 to 4 nats a token under the reference, from which the policy has moved by a few."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, length + 1, size=(2, pairs))
    reference = -lengths * draw.uniform(1.0, 4.0, size=(2, pairs))
    policy = np.minimum(reference + 8.0 * draw.standard_normal((2, pairs)), -0.01)
    return PairLogProbs(*(jnp.asarray(field, jnp.float32) for field in (*policy, *reference, *lengths)))


def contender(name: str, function: Callable[..., Any], *arguments: Any) -> Contender:
    """Compile a function and check all its numbers against the uncompiled function's.

    Args:
      name: of the contender.
      function: any pytree of arrays comes out, all of it computed in every run.
      *arguments: of the function.
    """
    compiled = jax.jit(function).lower(*arguments).compile()
    right = function(*arguments)
    jax.tree.map(_check_equal, compiled(*arguments), right)
    scale = _number(right)

    def run() -> float:
        return _number(jax.block_until_ready(compiled(*arguments))) / scale

    return Contender(name, run)


def _check_equal(found: jax.Array, right: jax.Array) -> None:
    found, right = np.asarray(found), np.asarray(right)
    assert np.isfinite(right).all()
    np.testing.assert_allclose(found, right, rtol=0, atol=AGREEMENT * abs(right).max())


def _number(result: Any) -> float:
    return float(jax.tree.leaves(result)[0].mean())
