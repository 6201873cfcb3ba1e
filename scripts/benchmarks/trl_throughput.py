"""Training with DPO: this package, exact geometry of every pair included, against TRL's ``DPOTrainer``.

Same weights, batches, order and reference log-probabilities, which both sides have before training begins. A round is one step
of training as each side's user gets it: from the batch on the host to updated parameters and the step's metrics. Both sides
update all parameters with AdamW, without weight decay and clipping.
"""

from __future__ import annotations

import itertools
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

PAIRS = 4
PROMPT = 64
RESPONSE = 64
BATCHES = 12
# So low that random weights are far from a saturated loss after as many steps; it is the default of TRL's trainer.
LEARNING_RATE = 1e-6
BETA = 0.1


def prepare(folder: Path) -> tuple[Contender, Contender]:
    """Make both contenders at GPT-2-small size; see :func:`contenders`."""
    return contenders(folder, preset("gpt2"), PAIRS, PROMPT, RESPONSE, BATCHES)


def contenders(
    folder: Path, config: DecoderConfig, pairs: int, prompt: int, response: int, batches: int
) -> tuple[Contender, Contender]:
    """Make both contenders at any size.

    Args:
      folder: where the weights are handed over.
      config: shapes of the decoder; the last token of the vocabulary ends every response.
      pairs: B, of a step.
      prompt: tokens of every prompt.
      response: tokens of every response.
      batches: how many there are; training begins again with the first after the last.

    Returns:
      This package's training, then TRL's.
    """
    # TRL is in the extra ``peers``, whose absence is reported before this runs.
    from scripts.benchmarks import trl_throughput_trl

    model = language_model(config, completion_length=response)
    policy, reference = (jax.jit(model.init)(jax.random.key(seed)) for seed in (0, 1))
    tokens = draw_tokens(config.vocab_size, batches * pairs, prompt, response)
    save_pretrained(folder / "policy", config, policy)
    # References from other weights: the policy's own would make the first loss log 2 whatever the log-probabilities.
    save_pretrained(folder / "reference", config, reference)
    theirs = trl_throughput_trl.contender(folder, tokens, prompt, pairs, beta=BETA, learning_rate=LEARNING_RATE)
    return _ours(config, policy, reference, tokens.reshape(batches, pairs, 2, -1), prompt), theirs


def draw_tokens(vocabulary: int, pairs: int, prompt: int, response: int) -> np.ndarray:
    """Random pairs ``[N, 2, T]``, int32: two responses to one prompt, both ended by the last token of the vocabulary."""
    draw = np.random.default_rng(2)
    tokens = draw.integers(0, vocabulary - 1, (pairs, 2, prompt + response), dtype=np.int32)
    tokens[:, 1, :prompt] = tokens[:, 0, :prompt]
    tokens[:, :, -1] = vocabulary - 1
    return tokens


def _ours(config: DecoderConfig, params: Params, reference: Params, tokens: np.ndarray, prompt: int) -> Contender:
    model = language_model(config, completion_length=tokens.shape[-1] - prompt)
    score = jax.jit(model.log_probs)
    mask = np.broadcast_to(np.arange(tokens.shape[-1]) >= prompt, tokens.shape[1:])
    examples = [
        PreferenceExamples(pairs, np.asarray(score(reference, pairs)))
        for pairs in (PairBatch(batch, mask) for batch in tokens)
    ]
    schedule = optax.constant_schedule(LEARNING_RATE)
    tx = optax.chain(transforms.combine_pair(transforms.margin()), adamw(schedule, 0.0))
    gradients = preference_gradients(model.log_probs, losses.get_objective("dpo", beta=BETA), with_geometry=True)
    step = jax.jit(make_step(gradients, tx, schedule), donate_argnums=0)
    # a copy, since the step takes the place of its state
    state = init_state(jax.tree.map(jnp.copy, params), tx)
    turns = itertools.cycle(examples)

    def run() -> float:
        nonlocal state
        state, result = jax.block_until_ready(step(state, next(turns)))
        return float(jax.device_get(result.metrics)["loss"])

    return Contender("entangle", run)
