"""DPO of an equinox model, with PCGrad in every pair by itself. Needs jax, optax and equinox.

The chosen response is `a b b b b b`, the rejected one stutters: `b b b b b b`. Five tokens of six are shared, so what pushes
the rejected response down pulls the chosen one down with it, and by more than its own gradient lifts it.
"""

from collections.abc import Callable

import equinox as eqx
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


class Model(eqx.Module):
    embedding: eqx.nn.Embedding
    hidden: eqx.nn.Linear
    head: eqx.nn.Linear
    activation: Callable

    def __init__(self, key):
        embedding, hidden, head = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(VOCABULARY, WIDTH, key=embedding)
        self.hidden = eqx.nn.Linear(WIDTH, WIDTH, key=hidden)
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=head)
        self.activation = jnp.tanh

    def __call__(self, tokens):  # [T] -> [T, VOCABULARY]
        hidden = self.activation(jax.vmap(self.hidden)(jax.vmap(self.embedding)(tokens)))
        return jax.vmap(self.head)(hidden)


# The activation is a leaf, too, and no array: it goes to `static`, and `params` has None in its place.
params, static = eqx.partition(Model(jax.random.key(0)), eqx.is_inexact_array)
assert params.activation is None


@jax.jit
def log_prob_fn(params, tokens):  # [B, 2, 1 + LENGTH] -> [B, 2]
    log_probs = jax.nn.log_softmax(jax.vmap(jax.vmap(eqx.combine(params, static)))(tokens[..., :-1]))
    return jnp.take_along_axis(log_probs, tokens[..., 1:, None], axis=-1).sum((-2, -1))


reference = log_prob_fn(params, tokens)  # DPO's reference is the model at the start
rule = transforms.per_pair(transforms.pcgrad())


@jax.jit
def loss_and_gradients(params, share):
    """The losses, and the gradients of both sides apart: as the loss has them, and mended pair by pair.

    What a pair counts for in the mean is its share, [PAIRS].
    """
    log_probs, pull_back = geometry.vjp_with_geometry(log_prob_fn, params, tokens, apart=True)
    lp = PairLogProbs(*log_probs.T, *reference.T, *jnp.full((2, PAIRS), LENGTH))
    loss, d = losses.loss_and_coefficients(losses.dpo, lp, beta=0.1)
    d = losses.Coefficients(share * d.chosen, share * d.rejected)
    plain, s = pull_back(*d)  # s: |g_w|^2, |g_l|^2 and <g_w, g_l> of every pair
    mended, _ = pull_back(*rule(d, s))  # the same forward, pulled back once more
    return loss, plain, mended


@eqx.filter_jit
def step(tx, gradients, opt_state, params):
    updates, opt_state = tx.update(gradients, opt_state, params)
    return eqx.apply_updates(params, updates), opt_state


# The coefficients are mended before the mean over pairs, so the head of the chain has nothing left to do: margin.
head = transforms.combine_pair(transforms.margin())
descent, adamw = optax.chain(head, optax.sgd(1e-2)), optax.chain(head, optax.adamw(1e-2))

# The rule's promise is for a pair alone: one small step of plain gradient descent on each.
fallen = 0
for pair, alone in enumerate(np.eye(PAIRS, dtype=np.float32)):
    _, plain, mended = loss_and_gradients(params, alone)
    stepped, _ = step(descent, plain, descent.init(params), params)
    fallen += float(log_prob_fn(stepped, tokens)[pair, 0]) < float(reference[pair, 0])
    stepped, _ = step(descent, mended, descent.init(params), params)
    chosen, rejected = (log_prob_fn(stepped, tokens) - reference)[pair].tolist()
    assert chosen > 0 > rejected, (chosen, rejected)
assert fallen, "this example shows nothing: the loss's own gradient lowers no chosen response"

# Other pairs of the batch and AdamW may turn the step; the loss has to fall.
trained, opt_state, history = params, adamw.init(params), []
for _ in range(5):
    loss, _, mended = loss_and_gradients(trained, np.ones(PAIRS, np.float32))
    trained, opt_state = step(adamw, mended, opt_state, trained)
    history.append(float(loss.mean()))
assert history[-1] < history[0], history
assert eqx.combine(trained, static).activation is jnp.tanh  # a whole model again
print(f"ok: loss {history[0]:.3f} -> {history[-1]:.3f}")
