"""Cosines between the gradients of one pair's tokens: this package's token Gram against one PyTorch backward a token.

The other side keeps every token's whole gradient, as the analysis of arXiv 2410.13828 does, and multiplies them as one
matrix product. Memory is the peak of a process that does the work once and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from entangle import geometry
from entangle.models import DecoderConfig, language_model, preset, save_gpt2
from scripts.benchmarks.measuring import Contender, peak_memory

PROMPT = 16


def prepare(folder: Path, count: int = 16) -> tuple[Contender, ...]:
    """Make both contenders at GPT-2-small size, with a prompt of 16 tokens and ``count`` tokens a response."""
    return contenders(folder, preset("gpt2", 50257), count)


def contenders(folder: Path, config: DecoderConfig, count: int) -> tuple[Contender, ...]:
    """Make both contenders at any size.

    Args:
      folder: where the weights are handed over.
      config: shapes of the decoder.
      count: response tokens of either side.
    """
    # PyTorch is in the extra ``peers``, whose absence is reported before this runs.
    from scripts.benchmarks import token_heatmap_torch

    save_gpt2(folder / "gpt2", config, jax.jit(language_model(config).init)(jax.random.key(0)))
    tokens = draw_tokens(config, count)
    return (
        Contender("entangle", cosines(config, count), peak_memory(run_once, config, count)),
        Contender(
            "pytorch",
            token_heatmap_torch.cosines(folder / "gpt2", tokens, PROMPT),
            peak_memory(token_heatmap_torch.run_once, folder / "gpt2", tokens, PROMPT),
        ),
    )


def draw_tokens(config: DecoderConfig, count: int) -> np.ndarray:
    """Random tokens ``[2, T]``, one prompt for both sides."""
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(2, PROMPT + count), dtype=np.int32)
    tokens[1, :PROMPT] = tokens[0, :PROMPT]
    return tokens


def cosines(config: DecoderConfig, count: int) -> Callable[[], float]:
    """This package's side: a function that returns the mean over all cosines of chosen and rejected tokens."""
    model = language_model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jnp.asarray(draw_tokens(config, count))
    positions = jnp.tile(jnp.arange(PROMPT, PROMPT + count), (2, 1))
    gram = jax.jit(lambda params: geometry.token_gram(model.token_log_probs, params, tokens, positions))

    def run() -> float:
        products = np.asarray(gram(params), np.float64)
        norms = np.sqrt(np.einsum("inin->in", products))
        return float(np.mean(products[0, :, 1] / np.outer(norms[0], norms[1])))

    return run


def run_once(config: DecoderConfig, count: int) -> None:
    """Do this package's side once."""
    cosines(config, count)()
