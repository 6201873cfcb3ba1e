"""Projections of one gradient off the other: PCGrad and its relatives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from entangle.transforms.weightings import (
    PairWeights,
    RunningWeighting,
    Weighting,
    check,
    inverse,
    nan_unless_finite,
    norms,
    of_norms,
    root,
    rounding,
)
from entangle.types import PairGeometry


def pcgrad() -> Weighting:
    """PCGrad: where the two conflict, each loses its component along the other; then they are added.

    ``(1, 1)`` without conflict, else ``(1 - e/a, 1 - e/b)`` with a, b the squared norms and e the inner product of
    ``g1 = chosen`` and ``g2 = -rejected``. Then ``<g1, step> = a (1 - k^2) >= 0``, likewise for g2. With two gradients there
    is no order to draw.

    Scope: the two batch means, to first order, under a plain gradient step with positive coefficients.

    References:
      Yu et al., arXiv 2001.06782, algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> [float(w) for w in transforms.pcgrad()(PairGeometry(*(jnp.array(x) for x in (4.0, 16.0, 2.0))))]
      [1.5, 1.125]
    """
    return of_norms(lambda n1, n2, k: _both_towards(n1, n2, jnp.maximum(-k, 0)))


def upgrad() -> Weighting:
    """UPGrad: each gradient projected on the cone of directions that harm neither; then the mean.

    For two gradients exactly half of :func:`pcgrad`.

    Scope: as for :func:`pcgrad`.

    References:
      Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, arXiv 2406.16232.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> [float(w) for w in transforms.upgrad()(PairGeometry(*(jnp.array(x) for x in (4.0, 16.0, 2.0))))]
      [0.75, 0.5625]
    """

    def rule(n1: jax.Array, n2: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, y = _both_towards(n1, n2, jnp.maximum(-k, 0))
        return x / 2, y / 2

    return of_norms(rule)


def one_sided() -> Weighting:
    """Protects the chosen side: where the two conflict, the rejected gradient loses what would lower the chosen one.

    ``(1, 1)`` without conflict, else ``(1 - e/a, 1)``. Then ``<g1, step> = a``: the chosen sum rises by exactly what its own
    gradient alone would raise it, as in geometric-disentanglement unlearning with one retained gradient
    (:func:`entangle.transforms.project_retain` keeps more of them).

    Scope: the chosen batch mean, to first order, under a plain gradient step with positive coefficients. Nothing is promised
    for the rejected one: where ``|rejected|`` is much larger and nearly parallel to chosen it may rise, and even the margin
    may fall.

    References:
      Zhou et al., arXiv 2511.17100 (retain = chosen, forget = rejected).

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> [float(w) for w in transforms.one_sided()(PairGeometry(*(jnp.array(x) for x in (4.0, 16.0, 2.0))))]
      [1.5, 1.0]
    """

    def rule(n1: jax.Array, n2: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, _ = _both_towards(n1, n2, jnp.maximum(-k, 0))
        return x, jnp.ones_like(x)

    return of_norms(rule)


def dual_projection() -> Weighting:
    """DualProj: the mean of the two gradients, projected on the cone of directions that harm neither.

    ``(-e/(2a), 1/2)`` where the mean would lower the chosen side (``a + e < 0``), ``(1/2, -e/(2b))`` where it would raise the
    rejected one, else ``(1/2, 1/2)``: the ideal case is left alone, and outside of it the harmed side stays put.

    Scope: the two batch means, to first order, under a plain gradient step with positive coefficients.

    References:
      Lopez-Paz and Ranzato, Gradient Episodic Memory, arXiv 1706.08840, equation 11.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> [float(w) for w in transforms.dual_projection()(PairGeometry(*(jnp.array(x) for x in (4.0, 64.0, 8.0))))]
      [1.0, 0.5]
    """

    def rule(n1: jax.Array, n2: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        half = jnp.full_like(k, 0.5)
        x = jnp.where(n1 + k * n2 < 0, -k * n2 * inverse(n1) / 2, half)
        y = jnp.where(n2 + k * n1 < 0, -k * n1 * inverse(n2) / 2, half)
        return x, y

    return of_norms(rule)


def gradvac(target: float = 0.0) -> Weighting:
    """Gradient vaccine with a fixed target: below it, each gradient is turned towards the other until their cosine is it.

    With k the cosine of ``g1 = chosen`` and ``g2 = -rejected`` and ``f = p sqrt((1 - k^2) / (1 - p^2)) - k`` where ``k < p``,
    else 0: ``(1 + f |g2|/|g1|, 1 + f |g1|/|g2|)``. At target 0 it is :func:`pcgrad`.

    Scope: at target 0 as :func:`pcgrad`; at other targets nothing is promised for either side alone.

    Args:
      target: p, in (-1, 1).

    References:
      Wang et al., arXiv 2010.05874, equation 2; :func:`gradvac_ema` is the paper's whole rule.

    Raises:
      ValueError: the target is outside of (-1, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> [float(w) for w in transforms.gradvac(0.0)(PairGeometry(*(jnp.array(x) for x in (4.0, 16.0, 2.0))))]
      [1.5, 1.125]
    """
    check("target", target, -1.0, 1.0)
    return of_norms(lambda n1, n2, k: _both_towards(n1, n2, _vaccine(k, jnp.asarray(target, k.dtype))))


def gradvac_ema(decay: float = 0.99) -> RunningWeighting:
    """Gradient vaccine as published: the target is the moving average of the cosine, from 0.

    Scope: nothing is promised for either side alone.

    Args:
      decay: share of the old target that is kept at every step, in [0, 1]; the paper's beta is 1 - decay.

    References:
      Wang et al., arXiv 2010.05874, algorithm 1.

    Raises:
      ValueError: the decay is outside of [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> weighting = transforms.gradvac_ema(decay=0.5)
      >>> gram = PairGeometry(*(jnp.array(x) for x in (4.0, 16.0, -4.0)))
      >>> (x, y), target = weighting.update(gram, weighting.init(gram))
      >>> float(x), float(y), float(target)  # the cosine is 0.5: no conflict, and the target goes half of the way to it
      (1.0, 1.0, 0.25)
    """
    check("decay", decay, 0.0, 1.0, with_low=True, with_high=True)

    def update(gram: PairGeometry, target: Any) -> tuple[PairWeights, Any]:
        n1, n2, k = norms(gram)
        x, y = _both_towards(n1, n2, _vaccine(k, target))
        share = jnp.asarray(decay, k.dtype)
        # a step that is not finite is refused by its weights; the memory outlives it, as one without a cosine
        usable = jnp.isfinite(nan_unless_finite(gram, k)) & (n1 > 0) & (n2 > 0)
        following = jnp.where(usable, share * target + (1 - share) * k, target)
        return PairWeights(nan_unless_finite(gram, x), nan_unless_finite(gram, y)), following

    return RunningWeighting(lambda gram: jnp.zeros_like(gram.inner_product), update)


def _both_towards(n1: jax.Array, n2: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum of both gradients, each with ``share`` of its own length added along the other's unit vector."""
    return 1 + share * n2 * inverse(n1), 1 + share * n1 * inverse(n2)


def _vaccine(k: jax.Array, target: jax.Array) -> jax.Array:
    # a target of 1, to which the average may round, is out of reach: the share stays finite
    sine = jnp.maximum(1 - k * k, 0) / jnp.maximum(1 - target * target, rounding(k))
    return jnp.where(k < target, target * root(sine) - k, 0)
