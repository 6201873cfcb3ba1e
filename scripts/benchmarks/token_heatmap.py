"""Cosines between the gradients of one pair's tokens: this package's token Gram against one PyTorch backward a token.

The other side keeps every token's whole gradient, as the analysis of arXiv 2410.13828 does, and multiplies them as one
matrix product. Both read the same checkpoint. Memory is the peak of a process that does the work once and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from entangle import geometry
from entangle.models import DecoderConfig, language_model, load_pretrained, preset, save_pretrained
from entangle.types import PairBatch
from scripts.benchmarks.measuring import Contender, peak_memory

PROMPT = 16
TOKENS = 16
# The gradients of so many tokens would take PyTorch 59 GiB.
LONG = 64
# Sums over 124 million products in float32, whose order differs.
AGREEMENT = 1e-4


def prepare(folder: Path) -> tuple[Contender, ...]:
    """Make both contenders at GPT-2-small size, with a prompt of 16 tokens and 16 tokens a response."""
    return contenders(folder, preset("gpt2", 50257), TOKENS)


def prepare_long(folder: Path) -> tuple[Contender, ...]:
    """Make this package's contender alone at GPT-2-small size, with 64 tokens a response."""
    return (alone(folder, preset("gpt2", 50257), LONG),)


def contenders(folder: Path, config: DecoderConfig, count: int) -> tuple[Contender, ...]:
    """Make both contenders at any size.

    Args:
      folder: where the weights are handed over.
      config: shapes of the decoder.
      count: response tokens of either side.
    """
    # PyTorch is in the extra ``peers``, whose absence is reported before this runs.
    from scripts.benchmarks import token_heatmap_torch

    checkpoint = _write_checkpoint(folder, config)
    tokens = draw_tokens(config, count)
    sides = {"entangle": (cosines, run_once), "pytorch": (token_heatmap_torch.cosines, token_heatmap_torch.run_once)}
    runs = {name: side(checkpoint, tokens, PROMPT) for name, (side, _) in sides.items()}
    np.testing.assert_allclose(*(run() for run in runs.values()), rtol=0, atol=AGREEMENT)
    return tuple(
        Contender(name, _rms(runs[name]), peak_memory(once, checkpoint, tokens, PROMPT))
        for name, (_, once) in sides.items()
    )


def alone(folder: Path, config: DecoderConfig, count: int) -> Contender:
    """Make this package's contender, checked against the geometry of the whole pair.

    Args:
      folder: where the weights are put.
      config: shapes of the decoder.
      count: response tokens of either side.
    """
    checkpoint, tokens = _write_checkpoint(folder, config), draw_tokens(config, count)
    # The gradient of a response is the sum of its tokens' gradients.
    sums = gram(checkpoint, tokens, PROMPT)().sum((1, 3))
    _, params = load_pretrained(checkpoint)
    pair = PairBatch(jnp.asarray(tokens)[None], jnp.tile(jnp.arange(tokens.shape[1]) >= PROMPT, (1, 2, 1)))
    whole = jnp.stack(jax.jit(geometry.scan_geometry, static_argnums=0)(language_model(config).log_probs, params, pair))
    found = np.asarray([sums[0, 0], sums[1, 1], sums[0, 1]])
    np.testing.assert_allclose(found, whole[:, 0], rtol=0, atol=AGREEMENT * found[:2].max())
    run = _rms(cosines(checkpoint, tokens, PROMPT))
    return Contender("entangle", run, peak_memory(run_once, checkpoint, tokens, PROMPT))


def draw_tokens(config: DecoderConfig, count: int) -> np.ndarray:
    """Random tokens ``[2, T]``, one prompt for both sides."""
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(2, PROMPT + count), dtype=np.int32)
    tokens[1, :PROMPT] = tokens[0, :PROMPT]
    return tokens


def gram(checkpoint: Path, tokens: np.ndarray, prompt: int) -> Callable[[], np.ndarray]:
    """This package's side: a function that returns the inner products ``[2, N, 2, N]``.

    Args:
      checkpoint: of GPT-2.
      tokens: ``[2, T]``.
      prompt: tokens of the prompt; the gradients of all N later ones are multiplied.
    """
    config, params = load_pretrained(checkpoint)
    model = language_model(config)
    positions = jnp.tile(jnp.arange(prompt, tokens.shape[1]), (2, 1))
    exact = jax.jit(lambda params: geometry.token_gram(model.token_log_probs, params, jnp.asarray(tokens), positions))
    return lambda: np.asarray(exact(params), np.float64)


def cosines(checkpoint: Path, tokens: np.ndarray, prompt: int) -> Callable[[], np.ndarray]:
    """This package's side: a function that returns all cosines of chosen and rejected tokens, ``[N, N]``.

    Args:
      checkpoint: of GPT-2.
      tokens: ``[2, T]``.
      prompt: tokens of the prompt.
    """
    products = gram(checkpoint, tokens, prompt)

    def run() -> np.ndarray:
        found = products()
        norms = np.sqrt(np.einsum("inin->in", found))
        return found[0, :, 1] / np.outer(norms[0], norms[1])

    return run


def run_once(checkpoint: Path, tokens: np.ndarray, prompt: int) -> None:
    """Do this package's side once."""
    cosines(checkpoint, tokens, prompt)()


def _write_checkpoint(folder: Path, config: DecoderConfig) -> Path:
    save_pretrained(folder / "gpt2", config, jax.jit(language_model(config).init)(jax.random.key(0)))
    return folder / "gpt2"


def _rms(run: Callable[[], np.ndarray]) -> Callable[[], float]:
    return lambda: float(np.sqrt(np.mean(np.square(run()))))
