"""The exact geometry of a set of pairs, off line: this package's against PyTorch, a pair at a time, two backward passes each.

Rows have the lengths of tweets. PyTorch's are not padded; this package's are, to the longest row of every group of pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from entangle import geometry
from entangle.models import DecoderConfig, language_model, preset, save_pretrained
from entangle.types import PairBatch, Params
from scripts.benchmarks.measuring import Contender

PAIRS = 64
# Prompt and either completion: rows of 15 to 45 tokens, as the tweets of arXiv 2410.13828 have them.
PROMPT = (8, 25)
COMPLETION = (7, 21)
GROUP = 8
# Sums over 124 million products in float32, whose order differs.
AGREEMENT = 1e-4


def prepare(folder: Path) -> tuple[Contender, ...]:
    """Make both contenders at GPT-2-small size."""
    return contenders(folder, preset("gpt2", 50257), PAIRS)


def contenders(folder: Path, config: DecoderConfig, pairs: int) -> tuple[Contender, ...]:
    """Make both contenders at any size.

    Args:
      folder: where the weights are handed over.
      config: shapes of the decoder.
      pairs: B.
    """
    # PyTorch is in the extra ``peers``, whose absence is reported before this runs.
    from scripts.benchmarks import geometry_offline_torch

    params = jax.jit(language_model(config).init)(jax.random.key(0))
    save_pretrained(folder / "gpt2", config, params)
    batch = draw_pairs(config.vocab_size, pairs)
    theirs = geometry_offline_torch.geometry(
        folder / "gpt2", np.asarray(batch.tokens), np.asarray(batch.completion_mask)
    )
    sides = {"entangle": ours(config, params, batch), "pytorch": theirs}
    found = [side() for side in sides.values()]
    scale = np.sqrt(found[1][:, :1] * found[1][:, 1:2])  # of a product: that of the norms
    np.testing.assert_array_less(abs(found[0] - found[1]) / scale, AGREEMENT)
    return tuple(Contender(name, _mean_cosine(side)) for name, side in sides.items())


def draw_pairs(vocabulary: int, pairs: int) -> PairBatch:
    """Random pairs with one prompt for both sides and completions of many lengths."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(vocabulary, size=(pairs, 2, PROMPT[1] + COMPLETION[1] - 2), dtype=np.int32)
    prompt = draw.integers(*PROMPT, size=(pairs, 1, 1))
    position = np.arange(tokens.shape[-1])
    tokens[:, 1] = np.where(position < prompt[:, 0], tokens[:, 0], tokens[:, 1])
    stop = prompt + draw.integers(*COMPLETION, size=(pairs, 2, 1))
    return PairBatch(tokens, (position >= prompt) & (position < stop))


def ours(config: DecoderConfig, params: Params, pairs: PairBatch) -> Callable[[], np.ndarray]:
    """This package's side: groups of pairs of like length, each group at once.

    Args:
      config: shapes of the decoder.
      params: its parameters.
      pairs: B pairs.

    Returns:
      A function that returns ``|g_w|^2, |g_l|^2, <g_w, g_l>`` of every pair, ``[B, 3]``.
    """
    log_prob_fn = language_model(config).log_probs
    lengths = np.max(np.where(pairs.completion_mask, np.arange(1, pairs.tokens.shape[-1] + 1), 0), axis=(1, 2))
    order = np.argsort(lengths, kind="stable")
    groups = [order[start : start + GROUP] for start in range(0, len(order), GROUP)]
    batches = [jax.tree.map(lambda leaf, g=g: jnp.asarray(leaf[g, :, : lengths[g].max()]), pairs) for g in groups]
    exact = jax.jit(lambda params, batch: jnp.stack(geometry.pair_geometry(log_prob_fn, params, batch), -1))

    def run() -> np.ndarray:
        found = np.empty((len(order), 3))
        for group, batch in zip(groups, batches, strict=True):
            found[group] = exact(params, batch)
        return found

    return run


def _mean_cosine(side: Callable[[], np.ndarray]) -> Callable[[], float]:
    def run() -> float:
        chosen, rejected, inner = side().T
        return float(np.mean(inner / np.sqrt(chosen * rejected)))

    return run
