"""Figure 4b's numbers: cosines between the gradients of a pair's token log-probabilities, written into the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from entangle import data, geometry, training
from entangle.models import LanguageModel
from entangle.types import Params

FILE = "token_cosines.json"


def token_cosines(model: LanguageModel, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Cosines between the gradients of one pair's completion tokens, chosen ones by rejected ones.

    Args:
      model: the model.
      params: its parameters.
      tokens: ``[2, T]`` int32.
      mask: ``[2, T]`` bool, a concrete array: it decides the result's shape.

    Returns:
      ``[N, M]`` with N and M the numbers of completion tokens of the chosen and of the rejected side.
    """
    chosen, rejected = (np.flatnonzero(side) for side in np.asarray(mask))
    count = max(len(chosen), len(rejected))
    positions = np.stack([np.pad(side, (0, count - len(side)), constant_values=-1) for side in (chosen, rejected)])
    gram = geometry.token_gram(model.token_log_probs, params, tokens, jnp.asarray(positions))
    sq_norms = jnp.einsum("inin->in", gram)
    scale = jnp.sqrt(sq_norms[0, :, None] * sq_norms[1, None, :])
    cosines = jnp.where(scale > 0, gram[0, :, 1] / jnp.where(scale > 0, scale, 1.0), 0.0)
    return cosines[: len(chosen), : len(rejected)]


def write(
    folder: Path,
    model: LanguageModel,
    tokenizer: data.Tokenizer,
    pairs: data.EncodedPairs,
    checkpoints: Mapping[str, Params],
) -> None:
    """Write the token cosines of the first held-out pair, at several checkpoints, as JSON.

    Args:
      folder: where the file goes; an existing one stays.
      model: the model.
      tokenizer: for readable labels.
      pairs: the held-out pairs.
      checkpoints: name -> parameters.
    """
    if (folder / FILE).exists():
        return
    tokens, mask = pairs.tokens[0], pairs.completion_mask[0]
    labels = [tokenizer.token_labels(tokens[side][mask[side]].tolist()) for side in (0, 1)]
    cosines = jax.jit(lambda params: token_cosines(model, params, jnp.asarray(tokens), mask))
    blocks = {name: np.asarray(cosines(params)).tolist() for name, params in checkpoints.items()}
    record = {"source": pairs.sources[0], "chosen": labels[0], "rejected": labels[1], "cosines": blocks}
    training.write_json(folder / FILE, record)
