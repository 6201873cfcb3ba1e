"""Five published rules that, for two gradients, share one direction: the sum of the two unit vectors.

``u1 + u2``, with ``u1 = chosen / |chosen|`` and ``u2 = -rejected / |rejected|``, has the same cosine with both gradients, and
``<g1, u1 + u2> = |g1| (1 + k) >= 0`` for their cosine k: to first order neither side moves the wrong way, whatever k. The
rules differ in the length that they give to it:

=====================  ==================================  ======================================
rule                   step                                 the step's degree in the gradients
=====================  ==================================  ======================================
normalized             ``u1 + u2``                          0
nash                   ``(u1 + u2) / sqrt(1 + k)``          0, of length sqrt(2) always
scale_preserving       ``sqrt(|g1| |g2|) (u1 + u2)``        1
imtl_g                 ``|g1| |g2| / (|g1| + |g2|) ...``    1, half the harmonic mean
config                 ``(|g1| + |g2|) / 2 ...``            1
=====================  ==================================  ======================================

Scope of all of them: the guarantee is for the two batch means, to first order, under a plain gradient step with positive
coefficients. :func:`entangle.transforms.per_pair` lifts each to single pairs. An adaptive optimizer can break both.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from entangle.transforms.weightings import Weighting, inverse, of_norms, root, rounding


def normalized() -> Weighting:
    """Each gradient made a unit vector: ``(1 / |chosen|, 1 / |rejected|)``; the weight of a zero gradient is 0.

    With rho the cosine of chosen and rejected, the step along ``u_w - u_l`` changes the batch's chosen and rejected sums in
    the ideal direction for every rho: ``<chosen, step> = |chosen| (1 - rho) >= 0``,
    ``<rejected, step> = -|rejected| (1 - rho) <= 0``.

    Scope: the two batch means. For the paper's guarantee pair by pair normalise the coefficients with
    :func:`entangle.transforms.normalize_coefficients`. The step's length no longer follows the loss (it is between 0 and 2
    times the learning rate), so plain SGD needs a learning rate of its own.

    References:
      Yuan et al., arXiv 2410.13828, section 5.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> [float(w) for w in transforms.normalized()(PairGeometry(*(jnp.array(x) for x in (4.0, 16.0, 1.0))))]
      [0.5, 0.25]
    """
    return of_norms(lambda n1, n2, k: (inverse(n1), inverse(n2)))


def scale_preserving() -> Weighting:
    """Both gradients brought to the geometric mean of their lengths: ``(sqrt(|rejected| / |chosen|), its inverse)``.

    The normalised direction at the loss's own scale: the step vanishes with the gradients, so learning rates of the plain
    objective carry over. Where one gradient is zero the step is zero, which is the limit.

    Scope: the two batch means. It is the centre of the disentanglement band and what reward calibration aims at
    (:func:`entangle.transforms.reward_calibrated` is its average over steps).

    References:
      Yuan et al., arXiv 2410.13828, section 5 (the direction); Chen et al., arXiv 2604.18239 (the ratio of weights).

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> [float(w) for w in transforms.scale_preserving()(PairGeometry(*(jnp.array(x) for x in (4.0, 64.0, 1.0))))]
      [2.0, 0.5]
    """

    def rule(n1: jax.Array, n2: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        return root(n2 * inverse(n1)), root(n1 * inverse(n2))

    return of_norms(rule)


def imtl_g() -> Weighting:
    """IMTL-G: weights of sum 1 for which the step has the same projection on both unit vectors.

    The general formula is ``G^-1 (|g1|, |g2|)``, normalised; for two gradients the cosine cancels, and the weights are
    ``(|g2|, |g1|) / (|g1| + |g2|)``. Where one gradient is zero the step is zero, which is the limit.

    Scope: the two batch means.

    References:
      Liu et al., Towards Impartial Multi-task Learning, ICLR 2021.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> [float(w) for w in transforms.imtl_g()(PairGeometry(*(jnp.array(x) for x in (1.0, 9.0, 1.0))))]
      [0.75, 0.25]
    """
    return of_norms(lambda n1, n2, k: (n2 * inverse(n1 + n2), n1 * inverse(n1 + n2)))


def config() -> Weighting:
    """ConFIG: along ``u1 + u2``, as long as the sum of both gradients' projections on it.

    ``((|g1| + |g2|) / (2 |g1|), (|g1| + |g2|) / (2 |g2|))``. A zero gradient has no direction: the other one is then taken as
    it is.

    Scope: the two batch means.

    References:
      Liu et al., arXiv 2408.11104, equation 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> [float(w) for w in transforms.config()(PairGeometry(*(jnp.array(x) for x in (1.0, 9.0, 1.0))))]
      [2.0, 0.6666666865348816]
    """

    def rule(n1: jax.Array, n2: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = (n1 + n2) / 2
        return jnp.where(n2 == 0, 1, mean * inverse(n1)), jnp.where(n1 == 0, 1, mean * inverse(n2))

    return of_norms(rule)


def nash() -> Weighting:
    """The Nash bargaining solution: the weights with ``G w = 1 / w``, so that both log-gains add up to the most.

    For two gradients ``w = 1 / (|g| sqrt(1 + k))``. The step has length sqrt(2) whatever their norms and cosine, so it needs a
    learning rate of its own. Where the gradients are opposite, to rounding, no direction helps both: the weights are 0.
    Where one is zero the step is the other's unit vector.

    Scope: the two batch means.

    References:
      Navon et al., Multi-Task Learning as a Bargaining Game, arXiv 2202.01017.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> [float(w) for w in transforms.nash()(PairGeometry(*(jnp.array(x) for x in (4.0, 16.0, 6.0))))]
      [1.0, 0.5]
    """

    def rule(n1: jax.Array, n2: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        opposite = 1 + k <= rounding(k)
        scale = jnp.where(opposite, 0, jax.lax.rsqrt(jnp.where(opposite, 1, 1 + k)))
        return scale * inverse(n1), scale * inverse(n2)

    return of_norms(rule)
