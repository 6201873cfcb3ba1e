"""DPO of a model whose parameters are a dictionary, with both gradients normalised. Needs jax and optax.

The chosen response is `a b b b b b`, the rejected one stutters: `b b b b b b`. Five tokens of six are shared, so what pushes
the rejected response down pulls the chosen one down with it, and by more than its own gradient lifts it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from entangle import geometry, losses, transforms
from entangle.types import PairLogProbs

VOCABULARY, WIDTH, PAIRS, LENGTH = 11, 16, 4, 6

# [PAIRS, 2, 1 + LENGTH]: chosen and rejected, each a prompt of one token and a response
rng = np.random.default_rng(0)
prompt, a, b = np.stack([rng.choice(VOCABULARY, 3, replace=False) for _ in range(PAIRS)], axis=1)
tokens = np.stack([np.stack([prompt, first, b, b, b, b, b], axis=1) for first in (a, b)], axis=1)


def parameter(*shape, scale):
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)


params = {
    "embedding": parameter(VOCABULARY, WIDTH, scale=1.0),
    "hidden": {"kernel": parameter(WIDTH, WIDTH, scale=0.25), "bias": jnp.zeros(WIDTH)},
    "head": parameter(WIDTH, VOCABULARY, scale=0.1),
}


@jax.jit
def log_prob_fn(params, tokens):  # [..., 1 + LENGTH] -> [...]
    hidden = params["embedding"][tokens[..., :-1]] @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    log_probs = jax.nn.log_softmax(jnp.tanh(hidden) @ params["head"])
    return jnp.take_along_axis(log_probs, tokens[..., 1:, None], axis=-1).sum((-2, -1))


reference = log_prob_fn(params, tokens)  # DPO's reference is the model at the start


@jax.jit
def loss_and_gradients(params):
    log_probs, pull_back = geometry.pair_vjp(log_prob_fn, params, tokens)
    lp = PairLogProbs(*log_probs.T, *reference.T, *jnp.full((2, PAIRS), LENGTH))
    loss, d = losses.loss_and_coefficients(losses.dpo, lp, beta=0.1)
    return loss.mean(), pull_back(*d)  # PairGradients: the chosen and the rejected responses' gradients, apart


def train(tx, steps):
    trained, opt_state, update, history = params, tx.init(params), jax.jit(tx.update), []
    for _ in range(steps):
        loss, gradients = loss_and_gradients(trained)
        updates, opt_state = update(gradients, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        history.append(float(loss))
    return trained, history


def after_one_step(weighting):
    """How one small step of plain gradient descent changes the sum of log-probabilities of either side of the batch."""
    stepped, _ = train(optax.chain(transforms.combine_pair(weighting), optax.sgd(1e-3)), steps=1)
    return (log_prob_fn(stepped, tokens) - reference).sum(0).tolist()


chosen, rejected = after_one_step(transforms.margin())
assert chosen < 0, f"the loss's own gradient should lower the chosen responses here, they change by {chosen}"
chosen, rejected = after_one_step(transforms.normalized())
assert chosen > 0 > rejected, (chosen, rejected)

# AdamW turns the step, so it promises nothing about either side; the loss has to fall.
_, history = train(optax.chain(transforms.combine_pair(transforms.normalized()), optax.adamw(1e-2)), steps=5)
assert history[-1] < history[0], history
print(f"ok: loss {history[0]:.3f} -> {history[-1]:.3f}")
