"""What the exact geometry of every pair costs in a training step: one backward with it, without it, and with a scan.

The plain contender is the value and gradient of the mean loss, as one writes it without this package's geometry. The third
has the geometry and both sides' gradients apart, as pair transforms take them. The scan is the plain one, and then every
pair's two gradients in turn. In bfloat16, and at greater lengths, it is meant for an accelerator.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from entangle import geometry, losses
from entangle.models import DecoderConfig, language_model, preset
from entangle.training import PreferenceExamples
from entangle.training.gradients import pair_log_probs
from entangle.types import LogProbFn, Params
from scripts.benchmarks.measuring import Contender, compiled_contender
from scripts.benchmarks.step import BETA, LENGTH, PAIRS, draw_examples

# Of norms. In float32: sums over 124 million products, whose order differs. In bfloat16 a cotangent has 8 bits, and the two
# ways round others of them.
AGREEMENT = {"float32": 1e-3, "bfloat16": 5e-2}


class Model(NamedTuple):
    """What the contenders need of a model.

    Attributes:
      vocabulary: V.
      init: PRNG key to float32 parameters.
      log_probs: see types.LogProbFn.
    """

    vocabulary: int
    init: Callable[[jax.Array], Params]
    log_probs: LogProbFn


def decoder(config: DecoderConfig) -> Model:
    """This package's decoder."""
    model = language_model(config)
    return Model(model.config.vocab_size, model.init, model.log_probs)


def gpt2() -> Model:
    """Of the size of GPT-2 small."""
    return decoder(preset("gpt2"))


def qwen() -> Model:
    """Of the size of Qwen2.5-0.5B; nothing is computed again."""
    return decoder(dataclasses.replace(preset("qwen2_5_0_5b"), remat="none"))


def prepare(folder: Path) -> tuple[Contender, ...]:
    """Make the contenders at GPT-2-small size; the folder is not used."""
    return contenders(gpt2(), PAIRS, LENGTH)


def preparation(make: Callable[[], Model], length: int) -> Callable[[Path], tuple[Contender, ...]]:
    """What makes the contenders of a model and length in bfloat16."""
    return lambda folder: contenders(make(), PAIRS, length, "bfloat16")


def contenders(model: Model, pairs: int, length: int, dtype: str = "float32") -> tuple[Contender, ...]:
    """Make the contenders at any size: with geometry, plain, with geometry and both gradients, and plain with a scan.

    Args:
      model: its initial parameters are random.
      pairs: B.
      length: T.
      dtype: of the parameters; the geometry is float32.
    """
    init = jax.jit(lambda key: jax.tree.map(lambda leaf: leaf.astype(dtype), model.init(key)))
    params = init(jax.random.key(0))
    examples = draw_examples(model.vocabulary, pairs, length)
    reference = jax.jit(model.log_probs)(init(jax.random.key(1)), examples.pairs)
    examples = examples._replace(reference=jnp.asarray(reference, jnp.float32))
    objective = losses.get_objective("dpo", beta=BETA)

    def with_geometry(params: Params, examples: PreferenceExamples, *, apart: bool = False) -> Any:
        log_probs, pull_back = geometry.vjp_with_geometry(model.log_probs, params, examples.pairs, apart=apart)
        loss, d = losses.loss_and_coefficients(objective, pair_log_probs(log_probs, examples))
        gradient, s = pull_back(d.chosen, d.rejected)
        return loss.mean(), gradient, s

    def plain(params: Params, examples: PreferenceExamples) -> Any:
        def loss(params: Params) -> jax.Array:
            return objective(pair_log_probs(model.log_probs(params, examples.pairs), examples)).mean()

        return jax.value_and_grad(loss)(params)

    def scan(params: Params, examples: PreferenceExamples) -> Any:
        return *plain(params, examples), geometry.scan_geometry(model.log_probs, params, examples.pairs)

    apart = functools.partial(with_geometry, apart=True)
    functions = {"geometry": with_geometry, "plain": plain, "apart": apart, "scan": scan}
    compiled = {name: jax.jit(f).lower(params, examples).compile() for name, f in functions.items()}
    exact = compiled["scan"](params, examples)[2]
    norms = np.sqrt(exact.chosen_sq_norm * exact.rejected_sq_norm)
    for name in ("geometry", "apart"):
        for one, other in zip(compiled[name](params, examples)[2], exact, strict=True):
            np.testing.assert_array_less(abs(one - other) / norms, AGREEMENT[dtype])
    return tuple(compiled_contender(name, function, (params, examples)) for name, function in compiled.items())
