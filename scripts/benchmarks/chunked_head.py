"""The head in slices of the vocabulary against the whole head: log-probabilities and both gradients from hidden states.

The model is left out: the value and the gradients, of the hidden states and of the head's matrix, of a weighted sum of the
rows' log-probabilities. The first contender leaves out the prompts, too; the second multiplies every position, as the whole
head does. Memory is what the compiled program needs: arguments, results and temporaries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from entangle.models.head import completion_log_probs
from scripts.benchmarks.measuring import Contender, compiled_contender
from scripts.benchmarks.step import draw_examples

# Llama 3's vocabulary
VOCABULARY = 128_256
LENGTH = 1024
PAIRS = 2
WIDTH = 256
CHUNK = 8192
# Of the norms of gradients, float32: sums over the vocabulary whose order differs.
AGREEMENT = 1e-5


def prepare(folder: Path) -> tuple[Contender, ...]:
    """Make the contenders at the size of Llama 3's vocabulary; the folder is not used."""
    return contenders(VOCABULARY, LENGTH, PAIRS, WIDTH, CHUNK)


def contenders(vocabulary: int, length: int, pairs: int, width: int, chunk: int) -> tuple[Contender, ...]:
    """Make the contenders at any size: in slices on completions, in slices everywhere, and whole.

    Args:
      vocabulary: V.
      length: T; the first quarter of every row is its prompt.
      pairs: B.
      width: D.
      chunk: entries of the vocabulary at a time.
    """
    batch = draw_examples(vocabulary, pairs, length).pairs
    draw = np.random.default_rng(0)
    # of a final norm, and logits of a standard deviation of 2
    hidden = jnp.asarray(draw.standard_normal((pairs, 2, length, width), dtype=np.float32))
    table = jnp.asarray(draw.standard_normal((vocabulary, width), dtype=np.float32) * np.float32(2 / np.sqrt(width)))
    tokens = np.float32(batch.completion_mask.sum())  # the loss is then one of a token, which float32 holds to 1e-6
    weights = jnp.asarray(draw.standard_normal((pairs, 2), dtype=np.float32) / tokens)
    longest = int(batch.completion_mask.sum(-1).max())
    options: dict[str, dict[str, Any]] = {
        "completions": {"completion_length": longest, "chunk": chunk},
        "slices": {"chunk": chunk},
        "whole": {},
    }
    compiled = {name: _compile(given, hidden, table, batch, weights) for name, given in options.items()}
    right = compiled["whole"](hidden, table, batch, weights)
    for name in ("completions", "slices"):
        for one, other in zip(
            jax.tree.leaves(compiled[name](hidden, table, batch, weights)), jax.tree.leaves(right), strict=True
        ):
            np.testing.assert_array_less(jnp.linalg.norm(one - other), AGREEMENT * jnp.linalg.norm(other))
    return tuple(
        compiled_contender(name, program, (hidden, table, batch, weights)) for name, program in compiled.items()
    )


def _compile(given: dict[str, Any], *arguments: Any) -> Any:
    def weighted(hidden: jax.Array, table: jax.Array, batch: Any, weights: jax.Array) -> jax.Array:
        found = completion_log_probs(hidden, table, batch.tokens, batch.completion_mask, **given)
        return jnp.sum(weights * found)

    return jax.jit(jax.value_and_grad(weighted, (0, 1))).lower(*arguments).compile()
