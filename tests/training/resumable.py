"""A small training run as a program, for the tests that kill it: ``python resumable.py FOLDER STEPS [SECONDS A STEP]``."""

import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from entangle import data, training, transforms
from entangle.losses import dpo
from entangle.types import PairBatch

STEPS = 24


def log_probs(params, batch):
    logits = jnp.tanh(params["token_embedding"][batch.tokens]) @ params["head"]
    rows = jax.nn.log_softmax(logits[..., :-1, :])
    taken = jnp.take_along_axis(rows, batch.tokens[..., 1:, None], -1)[..., 0]
    return jnp.sum(jnp.where(batch.completion_mask[..., 1:], taken, 0.0), -1)


def start(width=6):
    keys = jax.random.split(jax.random.key(1))
    return {
        "token_embedding": jax.random.normal(keys[0], (11, width)),
        "head": 0.3 * jax.random.normal(keys[1], (width, 11)),
    }


def encoded():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 11, (30, 2, 9)).astype(np.int32)
    mask = np.broadcast_to(np.arange(9) > 4, tokens.shape)
    return data.EncodedPairs(tokens, mask, [f"pair:{i}" for i in range(len(tokens))])


def main(folder, seconds=0.0, tracker=training.NoTracker, poison=None, stop_at=None, signal_at=None):
    """Train; slow every step down; make one pair's reference log-probability NaN; raise, or get SIGTERM, before a step."""
    stage = training.StageConfig(STEPS, 4, training.OptimizerConfig(learning_rate=0.02), 6, 5, 3)
    tx = stage.optimizer.build(stage.steps, transforms.combine_pair(transforms.margin()))
    gradients = training.preference_gradients(log_probs, dpo)
    schedule = stage.optimizer.schedule(stage.steps)
    jitted = jax.jit(training.make_step(gradients, tx, schedule, log_probs))
    pairs = encoded()
    reference = np.zeros((30, 2), np.float32)
    if poison is not None:
        reference[poison] = np.nan
    probe = PairBatch(jnp.asarray(pairs.tokens[:5]), jnp.asarray(pairs.completion_mask[:5]))
    stream = data.pair_batches(pairs, stage.batch_size, seed=3)
    batches = training.MappedBatches(stream, lambda b, i: training.PreferenceExamples(b, reference[i]))

    def step(state, batch):
        time.sleep(seconds)
        if int(state.step) + 1 == stop_at:
            raise KeyboardInterrupt
        if int(state.step) + 1 == signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return jitted(state, batch, probe)

    def evaluate(state):
        return {"eval/margin": jnp.mean(log_probs(state.params, probe))}

    run = training.RunFolder(folder, {"seed": 3})
    state = training.init_state(start(), tx)
    return training.train(run, state, step, batches, stage, evaluate=evaluate, tracker=tracker, sources=pairs.sources)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
