"""Rules in pair scope: they act on the coefficients d_w and d_l of every pair, before the mean over pairs."""

from __future__ import annotations

from collections.abc import Callable

from entangle.losses import Coefficients
from entangle.transforms.weightings import RunningWeighting, Weighting, as_running, inverse, nan_unless_finite, norms
from entangle.types import PairGeometry


def normalize_coefficients(coefficients: Coefficients, geometry: PairGeometry) -> Coefficients:
    """The pairwise normalised gradient, exact: ``d_w / |g_w|`` and ``d_l / |g_l|`` per pair, before the mean over pairs.

    For equal coefficients d of one pair the step is ``d (g_w / |g_w| - g_l / |g_l|)``: that pair's chosen log-probability
    does not fall and its rejected one does not rise, to first order, whatever their cosine. Other pairs of the batch and
    an adaptive optimizer can break it.

    Args:
      coefficients: fields ``[B]``.
      geometry: fields ``[B]``, of the same pairs.

    Returns:
      Coefficients of fields ``[B]``; 0 where the gradient is zero, NaN for a pair whose geometry is not finite.

    References:
      Yuan et al., arXiv 2410.13828, section 5.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses, transforms
      >>> from entangle.types import PairGeometry
      >>> d = losses.Coefficients(jnp.array([1.0]), jnp.array([1.0]))
      >>> s = PairGeometry(jnp.array([4.0]), jnp.array([16.0]), jnp.array([7.0]))
      >>> [x.tolist() for x in transforms.normalize_coefficients(d, s)]
      [[0.5], [0.25]]
    """
    chosen, rejected, _ = norms(geometry)
    factors = (nan_unless_finite(geometry, inverse(norm)) for norm in (chosen, rejected))
    return Coefficients(*(d * factor for d, factor in zip(coefficients, factors, strict=True)))


def per_pair(weighting: Weighting) -> Callable[[Coefficients, PairGeometry], Coefficients]:
    """Any weighting as a rule on every pair by itself: it sees the Gram of ``d_w g_w`` and ``d_l g_l`` of the pair.

    What the weighting promises for two batch means it then promises for every pair, to first order, under a plain gradient
    step on that pair alone. The mean over pairs, in which other pairs move this one's log-probabilities too, and an adaptive
    optimizer can break it. The norms of single pairs come with :func:`entangle.geometry.vjp_with_geometry`: one forward,
    pulled back once for the norms and once with the new coefficients.

    Rules of degree 0 (``normalized``, ``nash``) give every pair a step of the same length: the loss's own weighing of the
    pairs is gone. ``normalize_coefficients`` keeps it.

    Args:
      weighting: without memory.

    Returns:
      A function of coefficients and geometry, fields ``[B]``, to coefficients; ``training.PairRule``.

    Raises:
      TypeError: the weighting remembers earlier steps; pairs do not come back.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import geometry, losses, transforms
      >>> d = losses.Coefficients(jnp.ones(2), jnp.ones(2))
      >>> s = geometry.PairGeometry(jnp.array([4.0, 4.0]), jnp.array([16.0, 16.0]), jnp.array([6.0, -1.0]))
      >>> [geometry.Case(c).name for c in geometry.case_of(s, *d).tolist()]
      ['BOTH_FALL', 'IDEAL']
      >>> mended = transforms.per_pair(transforms.pcgrad())(d, s)
      >>> [geometry.Case(c).name for c in geometry.case_of(s, *mended).tolist()], mended.chosen.tolist()
      (['IDEAL', 'IDEAL'], [2.5, 1.0])
    """
    if isinstance(weighting, RunningWeighting):
        raise TypeError("per_pair takes weightings without memory: a pair is not seen at every step")
    checked = as_running(weighting)

    def rule(coefficients: Coefficients, geometry: PairGeometry) -> Coefficients:
        d_w, d_l = coefficients
        gram = PairGeometry(
            d_w * d_w * geometry.chosen_sq_norm,
            d_l * d_l * geometry.rejected_sq_norm,
            d_w * d_l * geometry.inner_product,
        )
        weights, _ = checked.update(gram, ())
        return Coefficients(weights.chosen * d_w, weights.rejected * d_l)

    return rule
