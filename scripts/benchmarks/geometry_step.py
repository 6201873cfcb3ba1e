"""What the exact geometry of every pair costs in a training step: one backward with it, without it, and with a scan.

The plain contender is the value and gradient of the mean loss, as one writes it without this package's geometry. The third
has the geometry and both sides' gradients apart, as pair transforms take them. The scan is the plain one, and then every
pair's two gradients in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from entangle import geometry, losses
from entangle.models import DecoderConfig, language_model, preset
from entangle.training import PreferenceExamples
from entangle.training.gradients import pair_log_probs
from entangle.types import Params
from scripts.benchmarks.measuring import Contender
from scripts.benchmarks.step import BETA, LENGTH, PAIRS, draw_examples

# Geometry in float32 against float32: sums over 124 million products, whose order differs.
AGREEMENT = 1e-3


def prepare(folder: Path) -> tuple[Contender, ...]:
    """Make the contenders at GPT-2-small size; the folder is not used."""
    return contenders(preset("gpt2", 50257), PAIRS, LENGTH)


def contenders(config: DecoderConfig, pairs: int, length: int) -> tuple[Contender, ...]:
    """Make the contenders at any size: with geometry, plain, with geometry and both gradients, and plain with a scan.

    Args:
      config: shapes of the decoder.
      pairs: B.
      length: T.
    """
    model = language_model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    examples = draw_examples(config, pairs, length)
    reference = jax.jit(model.log_probs)(jax.jit(model.init)(jax.random.key(1)), examples.pairs)
    examples = examples._replace(reference=reference)
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
    for name in ("geometry", "apart"):
        for one, other in zip(compiled[name](params, examples)[2], exact, strict=True):
            np.testing.assert_allclose(one, other, rtol=AGREEMENT, atol=AGREEMENT * float(np.max(exact.chosen_sq_norm)))
    return tuple(_contender(name, function, (params, examples)) for name, function in compiled.items())


def _contender(name: str, compiled: Any, arguments: tuple[Any, ...]) -> Contender:
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    run: Callable[[], float] = lambda: float(jax.block_until_ready(compiled(*arguments))[0])  # noqa: E731
    return Contender(name, run, peak - memory.alias_size_in_bytes)
