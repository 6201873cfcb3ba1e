"""A DPO training step: this package against the same step in plain PyTorch, same weights, same batch, same references.

Both sides are given the reference log-probabilities, run forward and backward through the policy and update all
parameters with AdamW. The loss of the second round has seen one update, so agreement covers gradients and optimizer.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from entangle import losses, transforms
from entangle.models import DecoderConfig, language_model, preset, save_pretrained
from entangle.training import PreferenceExamples, init_state, make_step, preference_gradients
from entangle.training.optimizers import adamw
from entangle.types import PairBatch, Params
from scripts.benchmarks.measuring import Contender

# Small enough that random weights do not reach a saturated, insensitive loss within the checked rounds.
LEARNING_RATE = 1e-6
BETA = 0.1
PAIRS = 4
LENGTH = 128


def prepare(folder: Path) -> tuple[Contender, Contender]:
    """Make both contenders at GPT-2-small size.

    Args:
      folder: where the weights are handed over.

    Returns:
      This package's step, then PyTorch's.
    """
    return contenders(folder, preset("gpt2", 50257), PAIRS, LENGTH)


def contenders(folder: Path, config: DecoderConfig, pairs: int, length: int) -> tuple[Contender, Contender]:
    """Make both contenders at any size.

    Args:
      folder: where the weights are handed over.
      config: shapes of the decoder.
      pairs: B.
      length: T; the first quarter is the prompt.

    Returns:
      This package's step, then PyTorch's.
    """
    # PyTorch is in the extra ``peers``, whose absence is reported before this runs.
    from scripts.benchmarks import step_torch

    model = language_model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    examples = draw_examples(config.vocab_size, pairs, length)
    # References from other weights: the policy's own would make the first loss log 2 whatever the log-probabilities.
    reference = jax.jit(model.log_probs)(jax.jit(model.init)(jax.random.key(1)), examples.pairs)
    examples = examples._replace(reference=reference)
    save_pretrained(folder / "gpt2", config, params)
    batch = [np.array(leaf) for leaf in (examples.pairs.tokens, examples.pairs.completion_mask, examples.reference)]
    theirs = step_torch.contender(folder / "gpt2", *batch, beta=BETA, learning_rate=LEARNING_RATE)
    return _ours(config, params, examples), theirs


def draw_examples(vocabulary: int, pairs: int, length: int) -> PreferenceExamples:
    """Random pairs of many lengths, the first quarter of every row its prompt, and references of zero."""
    tokens = jax.random.randint(jax.random.key(2), (pairs, 2, length), 0, vocabulary, dtype=jnp.int32)
    # Rows end one after the other, so that both sides must agree about padding.
    stop = length - jnp.arange(2 * pairs).reshape(pairs, 2, 1)
    position = jnp.arange(length)[None, None]
    mask = (position >= length // 4) & (position < stop)
    return PreferenceExamples(PairBatch(tokens, mask), jnp.zeros((pairs, 2)))


def _ours(config: DecoderConfig, params: Params, examples: PreferenceExamples) -> Contender:
    schedule = optax.constant_schedule(LEARNING_RATE)
    tx = optax.chain(transforms.combine_pair(transforms.margin()), adamw(schedule, 0.0))
    objective = losses.get_objective("dpo", beta=BETA)
    gradients = preference_gradients(language_model(config).log_probs, objective, with_geometry=False)
    step = jax.jit(make_step(gradients, tx, schedule), donate_argnums=0)
    state = init_state(params, tx)

    def run() -> float:
        nonlocal state
        state, result = jax.block_until_ready(step(state, examples))
        return float(result.losses.mean())

    return Contender("entangle", run)
