"""Rules that solve a small optimisation problem; with two gradients each has a closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from entangle.transforms.weightings import Weighting, check, inverse, of_norms, root, rounding


def mgda() -> Weighting:
    """MGDA: the shortest vector between the two gradients, ``t g1 + (1 - t) g2``.

    ``t = clip((b - e)/(a + b - 2e), 0, 1)``. The step is never longer than the shorter gradient, and zero where one of them
    is zero or the two are opposite: then no direction helps both.

    Scope: the two batch means, to first order, under a plain gradient step with positive coefficients.

    References:
      Desideri, Comptes Rendus Mathematique 350 (2012); Sener and Koltun, arXiv 1810.04650, equation 4.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> [float(w) for w in transforms.mgda()(PairGeometry(*(jnp.array(x) for x in (4.0, 16.0, 2.0))))]
      [0.75, 0.25]
    """

    def rule(n1: jax.Array, n2: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        p, q = _relative(n1, n2)
        # The longer one's weight is at most 1/2 and may be far smaller than 1's rounding; as 1 - t it would be lost.
        longer = jnp.clip(_unclipped(jnp.maximum(p, q), jnp.minimum(p, q), k), 0, 0.5)
        return jnp.where(p < q, 1 - longer, longer), jnp.where(p < q, longer, 1 - longer)

    return of_norms(rule)


def cagrad(c: float = 0.5) -> Weighting:
    """CAGrad: within ``c |g0|`` of the mean gradient g0, the step whose smaller gain is largest.

    The dual problem is ``min over t in [0, 1] of <g_t, g0> + c |g0| |g_t|`` with ``g_t = t g1 + (1 - t) g2``. Its derivative
    vanishes at the root of a quadratic, so t has a closed form; the step is ``g0 + c |g0| g_t / |g_t|``. At c = 0 it is the
    mean.

    Scope: the margin of the two batch means does not fall, to first order, under a plain gradient step; neither side
    alone is protected.

    Args:
      c: radius of the ball over ``|g0|``, in [0, 1).

    References:
      Liu et al., arXiv 2110.14048, algorithm 1.

    Raises:
      ValueError: c is outside of [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> [round(float(w), 6) for w in transforms.cagrad(0.4)(PairGeometry(*(jnp.array(x) for x in (4.0, 4.0, 1.0))))]
      [0.7, 0.7]
    """
    check("c", c, 0.0, 1.0, with_low=True)

    def rule(n1: jax.Array, n2: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        p, q = _relative(n1, n2)
        radius = jnp.asarray(c, k.dtype) * _length(p, q, k) / 2  # c |g0|
        # |g_t|^2 = apart (t - centre)^2 + rest, and the derivative of <g_t, g0> is (p^2 - q^2) / 2
        apart = _square(p, q, -k)
        slope = (p - q) * (p + q)
        left = apart * 4 * radius * radius - slope * slope
        rest = p * p * q * q * (1 - k) * (1 + k) * inverse(apart)
        inside = (left > 0) & (apart > 0)
        away = slope * root(jnp.where(inside, rest * inverse(jnp.where(inside, apart * left, 1)), 0))
        # where the linear term wins everywhere, the minimum is at an end
        end = jnp.where(slope > 0, 0.0, jnp.where(slope < 0, 1.0, 0.5)).astype(k.dtype)
        t = jnp.where(inside, jnp.clip(_unclipped(p, q, k) - away, 0, 1), end)
        added = radius * inverse(_length(t * p, (1 - t) * q, k))
        return 0.5 + added * t, 0.5 + added * (1 - t)

    return of_norms(rule)


def aligned_mtl() -> Weighting:
    """Aligned-MTL: the mean of the gradients after their principal components have all been shortened to the smallest one.

    The weights are ``sqrt(lambda_min) G^(-1/2) (1/2, 1/2)``; the square root of a 2 x 2 matrix has a closed form, in which the
    small eigenvalue cancels. Where the gradients are parallel or opposite to rounding, or one is zero, G has rank one and
    the step is their mean, as in the published algorithm. As that case is neared from others the step goes to zero.

    Scope: the margin of the two batch means does not fall, to first order, under a plain gradient step; neither side alone
    is protected.

    References:
      Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023, algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> [float(w) for w in transforms.aligned_mtl()(PairGeometry(*(jnp.array(x) for x in (1.0, 16.0, 0.0))))]
      [0.5, 0.125]
    """

    def rule(n1: jax.Array, n2: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        p, q = _relative(n1, n2)
        rank_one = ((1 - k) * (1 + k) <= rounding(k)) | (p * q == 0)
        safe = jnp.where(rank_one, 0, k)
        sine = jnp.sqrt((1 - safe) * (1 + safe))
        trace, volume = p * p + q * q, p * q * sine  # the volume is the root of the determinant
        gap = root((p - q) ** 2 * (p + q) ** 2 + (2 * safe * p * q) ** 2)  # between the eigenvalues
        scale = root(2 * inverse(trace + gap)) * root(inverse(trace + 2 * volume)) / 2
        # b + volume - e, with the small norm outside of the brackets
        x, y = scale * q * (q + p * (sine - safe)), scale * p * (p + q * (sine - safe))
        return jnp.where(rank_one, 0.5, x), jnp.where(rank_one, 0.5, y)

    return of_norms(rule)


def _relative(n1: jax.Array, n2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both norms over the larger one: what depends on their ratio alone can be squared without overflow."""
    larger = inverse(jnp.maximum(n1, n2))
    return n1 * larger, n2 * larger


def _square(p: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
    """Squared length of the sum of two vectors of norms p, q and cosine k, without cancellation at k = -1."""
    return (p - q) * (p - q) + 2 * p * q * (1 + k)


def _length(p: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
    """Length of the sum of two vectors of norms p, q and cosine k, whatever their scale."""
    larger = jnp.maximum(p, q)
    return larger * root(_square(p * inverse(larger), q * inverse(larger), k))


def _unclipped(p: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
    """The t of the shortest vector on the line through both gradients; 1/2 where they are equal."""
    apart = _square(p, q, -k)
    return jnp.where(apart == 0, 0.5, q * (q - k * p) * inverse(apart))
