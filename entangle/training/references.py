"""References that are scored inside the step: a frozen copy, one that follows the policy, or the policy without its adapter.

What is scored inside the step needs no pass over the data before, and no file; it costs a forward at every step. Where the
reference never changes, ``reference_log_probs`` scores it once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from entangle.types import Params


class Reference(NamedTuple):
    """A reference as pure functions; its memory is part of the training state and is saved with it.

    Attributes:
      init: the policy's parameters at the start to the memory.
      update: memory and the policy's parameters, before the step, to the memory.
      params: memory and the policy's parameters to the reference's parameters.
    """

    init: Callable[[Params], Any]
    update: Callable[[Any, Params], Any]
    params: Callable[[Any, Params], Params]


def frozen_copy() -> Reference:
    """The policy as it was at the start.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import training
      >>> reference = training.frozen_copy()
      >>> reference.params(reference.init(jnp.array([1.0])), jnp.array([3.0])).tolist()
      [1.0]
    """
    return Reference(
        init=lambda params: jax.tree.map(jnp.copy, params),  # a copy, since a step may donate its state
        update=lambda memory, params: memory,
        params=lambda memory, params: memory,
    )


class Following(NamedTuple):
    """What a moving reference remembers.

    Attributes:
      params: of the reference.
      step: int32 scalar, steps taken.
    """

    params: Params
    step: jax.Array


def moving_reference(rate: float = 0.6, every: int = 512) -> Reference:
    """Trust-region DPO: after every so many steps the reference moves towards the policy.

    Args:
      rate: alpha: the reference becomes ``alpha policy + (1 - alpha) reference``; 1 is a hard update.
      every: tau, optimizer steps between updates.

    Raises:
      ValueError: the rate is outside of (0, 1], or every is below 1.

    References:
      Gorbatovski et al., arXiv 2404.09656; values of its experiments.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import training
      >>> reference, policy = training.moving_reference(rate=0.5, every=2), jnp.array([4.0])
      >>> memory = reference.init(jnp.array([0.0]))
      >>> for _ in range(3):  # before the first, second and third step
      ...     memory = reference.update(memory, policy)
      >>> reference.params(memory, policy).tolist()
      [2.0]
    """
    if not 0.0 < rate <= 1.0 or every < 1:
        raise ValueError(f"rate {rate}, every {every}: a rate in (0, 1] and at least one step are needed")

    def update(memory: Following, params: Params) -> Following:
        due = (memory.step > 0) & (memory.step % every == 0)
        nearer = optax.incremental_update(params, memory.params, rate)
        moved = jax.tree.map(lambda new, old: jnp.where(due, new.astype(old.dtype), old), nearer, memory.params)
        return Following(moved, memory.step + 1)

    return Reference(
        init=lambda params: Following(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32)),
        update=update,
        params=lambda memory, params: memory.params,
    )


def adapter_off() -> Reference:
    """The base model under a low-rank adapter: all trainable parameters at zero, nothing to remember.

    For policies whose only trainable parameters are adapters that add ``x A B`` (``models.log_prob_function`` with
    ``wrt=nnx.LoRAParam``): with A and B at zero the base model is left.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import training
      >>> reference = training.adapter_off()
      >>> reference.params(reference.init(jnp.ones(2)), jnp.ones(2)).tolist()
      [0.0, 0.0]
    """
    return Reference(
        init=lambda params: (),
        update=lambda memory, params: memory,
        params=lambda memory, params: jax.tree.map(jnp.zeros_like, params),
    )
