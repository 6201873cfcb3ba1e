"""What the objectives are made of: log-ratios, length averages, the two sides exchanged; float32 inside."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from entangle.types import PairLogProbs


def as_float32(lp: PairLogProbs) -> PairLogProbs:
    """Give every field one floating dtype: float32, or float64 where the log-probabilities already are.

    Sums of log-probabilities are never held in half precision: at 256 nats one bfloat16 unit is 2 nats.

    Args:
      lp: pair log-probabilities, fields ``[B]``, any floating or integer dtype.

    Returns:
      The same values, all fields of one dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.losses.log_ratios import as_float32
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.ones(1, jnp.bfloat16) for _ in range(4)), jnp.ones(1, jnp.int32), jnp.ones(1, jnp.int32))
      >>> as_float32(lp).chosen_length.dtype
      dtype('float32')
    """
    dtype = jnp.float64 if jnp.asarray(lp.chosen).dtype == jnp.float64 else jnp.float32
    return PairLogProbs(*(jnp.asarray(field).astype(dtype) for field in lp))


def at_least_float32(x: jax.Array) -> jax.Array:
    """A floating array in float32, or in float64 where it is that already; any other as it is.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.losses.log_ratios import at_least_float32
      >>> at_least_float32(jnp.ones(1, jnp.bfloat16)).dtype, at_least_float32(jnp.ones(1, bool)).dtype
      (dtype('float32'), dtype('bool'))
    """
    x = jnp.asarray(x)
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != jnp.float64
    return x.astype(jnp.float32) if narrow else x


def log_ratios(lp: PairLogProbs) -> tuple[jax.Array, jax.Array]:
    """Log-ratios of policy to reference, ``r_w`` and ``r_l``, each ``[B]`` in nats; the implicit reward is beta times these.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.losses.log_ratios import log_ratios
      >>> from entangle.types import PairLogProbs
      >>> r_w, r_l = log_ratios(PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0))))
      >>> float(r_w[0]), float(r_l[0])
      (1.0, -1.0)
    """
    lp = as_float32(lp)
    return lp.chosen - lp.ref_chosen, lp.rejected - lp.ref_rejected


def length_averages(lp: PairLogProbs) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities per completion token, each ``[B]``; an empty completion counts as one token, so that it stays finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.losses.log_ratios import length_averages
      >>> from entangle.types import PairLogProbs
      >>> w, l = length_averages(PairLogProbs(*(jnp.array([x]) for x in (-3.0, 0.0, 0.0, 0.0, 2.0, 0.0))))
      >>> float(w[0]), float(l[0])
      (-1.5, 0.0)
    """
    lp = as_float32(lp)
    return lp.chosen / jnp.maximum(lp.chosen_length, 1.0), lp.rejected / jnp.maximum(lp.rejected_length, 1.0)


def per_token(lp: PairLogProbs) -> PairLogProbs:
    """Average every log-probability over its response's tokens: a transform that makes any objective length-averaged.

    What comes out are responses of one token, so that averaging twice is averaging once.

    Args:
      lp: pair log-probabilities, fields ``[B]``.

    Returns:
      The same pairs with all four log-probabilities in nats a token, and lengths of 1; an empty completion is divided by 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 4.0)))
      >>> def averaged_hinge(lp, beta=5.0):
      ...     return losses.hinge(losses.per_token(lp), beta=beta)
      >>> averaged_hinge(lp).tolist()  # 1 - 5 (1 / 2 + 1 / 4)
      [0.0]
    """
    lp = as_float32(lp)
    n_w, n_l = jnp.maximum(lp.chosen_length, 1.0), jnp.maximum(lp.rejected_length, 1.0)
    ones = jnp.ones_like(n_w), jnp.ones_like(n_l)
    return PairLogProbs(lp.chosen / n_w, lp.rejected / n_l, lp.ref_chosen / n_w, lp.ref_rejected / n_l, *ones)


def exchanged(lp: PairLogProbs) -> PairLogProbs:
    """The same pairs with the other response as the chosen one.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.losses.log_ratios import exchanged
      >>> from entangle.types import PairLogProbs
      >>> exchanged(PairLogProbs(*(jnp.array([x]) for x in (-1.0, -2.0, -3.0, -4.0, 5.0, 6.0)))).chosen.tolist()
      [-2.0]
    """
    return PairLogProbs(lp.rejected, lp.chosen, lp.ref_rejected, lp.ref_chosen, lp.rejected_length, lp.chosen_length)


def clipped(x: jax.Array, highest: float) -> jax.Array:
    """``min(x, highest)`` whose derivative at ``x = highest`` is 0, where ``jnp.minimum`` would have one half.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from entangle.losses.log_ratios import clipped
      >>> jax.vmap(jax.grad(lambda x: clipped(x, 1.0)))(jnp.array([0.0, 1.0, 2.0])).tolist()
      [1.0, 0.0, 0.0]
    """
    return jnp.where(x < highest, x, jnp.asarray(highest, x.dtype))
