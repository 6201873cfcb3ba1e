"""DPO of a flax.linen model, with PCGrad in every layer by itself. Needs jax, optax and flax.

The chosen response is `a b b b b b`, the rejected one stutters: `b b b b b b`. Five tokens of six are shared, so what pushes
the rejected response down pulls the chosen one down with it, and by more than its own gradient lifts it.
"""

import flax.linen as nn
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


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embedded = nn.Embed(VOCABULARY, WIDTH, name="embedding")(tokens)
        return nn.Dense(VOCABULARY, name="head")(nn.tanh(nn.Dense(WIDTH, name="hidden")(embedded)))


model = Model()
params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]


@jax.jit
def log_prob_fn(params, tokens):  # [..., 1 + LENGTH] -> [...]
    log_probs = jax.nn.log_softmax(model.apply({"params": params}, tokens[..., :-1]))
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
    return trained, opt_state, history


def change(stepped):
    """How the sum of log-probabilities of either side of the batch has changed."""
    return (log_prob_fn(stepped, tokens) - reference).sum(0).tolist()


# One small step of plain gradient descent: the loss's own gradient lowers the chosen responses.
stepped, _, _ = train(optax.chain(transforms.combine_pair(transforms.margin()), optax.sgd(1e-2)), steps=1)
assert change(stepped)[0] < 0, f"this example shows nothing: {change(stepped)}"

# With a group a layer ("hidden/kernel" and "hidden/bias" are of the layer "hidden") the step keeps PCGrad's promise, and so
# does every layer's part of it.
pcgrad = transforms.combine_pair(transforms.pcgrad(), group=lambda path: path.split("/")[0])
stepped, _, _ = train(optax.chain(pcgrad, optax.sgd(1e-2)), steps=1)
for moved in [stepped, *({**params, layer: stepped[layer]} for layer in params)]:
    chosen, rejected = change(moved)
    assert chosen > 0 > rejected, (chosen, rejected)

# AdamW turns the step, so it promises nothing about either side; the loss has to fall.
_, opt_state, history = train(optax.chain(pcgrad, optax.adamw(1e-2)), steps=5)
assert history[-1] < history[0], history
(seen,) = transforms.combined(opt_state)  # what the head of the chain saw last, by layer: for a log
x, y = seen.weights["head"]
print(f"ok: loss {history[0]:.3f} -> {history[-1]:.3f}, weights of the last layer {x:.2f} and {y:.2f}")
