"""The disentanglement band: the ratios of weights for which chosen rises and rejected falls."""

from __future__ import annotations

from typing import NamedTuple

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
)
from entangle.types import PairGeometry


def band(inset: float = 0.0) -> Weighting:
    """Leaves what is ideal alone, and moves the ratio of the two lengths to the nearest edge of the band else.

    With rho the cosine of chosen and rejected, the step is ideal iff ``rho <= |chosen| / |rejected| <= 1 / rho`` (for rho <= 0
    always). Outside, the weights ``(alpha, 1 / alpha)`` bring the ratio to the edge, where the protected side stays put to
    first order: the smallest change of the ratio that mends the pair.

    Scope: the two batch means, to first order, under a plain gradient step with positive coefficients. At the edge the
    protected side's change is 0 up to rounding; an inset leaves room.

    Args:
      inset: how far the band is narrowed, as a share of its half width in logarithms: 0 is the band itself, 1 its centre
        (then wherever rho > 0 it is :func:`entangle.transforms.scale_preserving`).

    References:
      Chen et al., arXiv 2604.18239 (the disentanglement band). The authors' code aims at the centre, averaged over steps:
      :func:`reward_calibrated`; the clamp on the band is commented out in it.

    Raises:
      ValueError: the inset is outside of [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> [float(w) for w in transforms.band()(PairGeometry(*(jnp.array(x) for x in (1.0, 64.0, 4.0))))]
      [2.0, 0.5]
    """
    check("inset", inset, 0.0, 1.0, with_low=True, with_high=True)

    def rule(n1: jax.Array, n2: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        entangled = k < 0
        ratio = n1 * inverse(n2)
        edge = jnp.where(entangled, -k, 1) ** (1 - jnp.asarray(inset, k.dtype))
        wanted = jnp.clip(ratio, edge, inverse(edge))
        alpha = jnp.where(entangled, jnp.sqrt(jnp.where(entangled, wanted * inverse(ratio), 1)), 1)
        return alpha, inverse(alpha)

    return of_norms(rule)


class CalibrationMemory(NamedTuple):
    """What reward calibration remembers.

    Attributes:
      log_ratio: moving average of ``log(|rejected| / |chosen|)``, of the Gram's shape.
      begun: whether there has been a step yet, of the Gram's shape.
    """

    log_ratio: jax.Array
    begun: jax.Array


def reward_calibrated(decay: float = 0.98) -> RunningWeighting:
    """Reward calibration: ``(alpha, 1 / alpha)``, alpha the square root of ``|rejected| / |chosen|``, averaged over steps.

    The average is of logarithms. The published alpha is ``exp((log r* - log r) / 2)`` with
    ``r* = |grad mean log pi_l| / |grad mean log pi_w|`` and ``r = mean d_w / mean d_l``. PairGradients hold the coefficients
    already, so ``r* / r`` is ``|rejected| / |chosen|``; the two are the same where the coefficients are equal over the batch.
    The first step begins the average; a step with a zero gradient leaves it as it is.

    Scope: nothing is promised at a single step, since the average lags; without it (decay 0) the promises are those of
    :func:`entangle.transforms.scale_preserving`, which it then is wherever no gradient is zero.

    Args:
      decay: share of the old average that is kept at every step, in [0, 1).

    References:
      Chen et al., arXiv 2604.18239, and the authors' code for the average in logarithms (0.98).

    Raises:
      ValueError: the decay is outside of [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> weighting = transforms.reward_calibrated()
      >>> gram = PairGeometry(*(jnp.array(x) for x in (1.0, 16.0, 2.0)))
      >>> (x, y), memory = weighting.update(gram, weighting.init(gram))
      >>> float(x), float(y)
      (2.0, 0.5)
    """
    check("decay", decay, 0.0, 1.0, with_low=True)

    def init(gram: PairGeometry) -> CalibrationMemory:
        zero = jnp.zeros_like(gram.inner_product)
        return CalibrationMemory(zero, jnp.zeros_like(zero, jnp.bool_))

    def update(gram: PairGeometry, memory: CalibrationMemory) -> tuple[PairWeights, CalibrationMemory]:
        n1, n2, _ = norms(gram)
        usable = jnp.isfinite(n1) & jnp.isfinite(n2) & (n1 > 0) & (n2 > 0)
        now = jnp.log(jnp.where(usable, n2, 1)) - jnp.log(jnp.where(usable, n1, 1))
        share = jnp.asarray(decay, now.dtype)
        average = jnp.where(memory.begun, share * memory.log_ratio + (1 - share) * now, now)
        log_ratio = jnp.where(usable, average, memory.log_ratio)
        alpha = nan_unless_finite(gram, jnp.exp(log_ratio / 2))
        return PairWeights(alpha, 1 / alpha), CalibrationMemory(log_ratio, memory.begun | usable)

    return RunningWeighting(init, update)
