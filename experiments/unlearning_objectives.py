"""What the unlearning experiment descends along: forget the rejected response, keep the chosen one.

Both have the retain side's coefficient d_w = 1, so that ``PairGradients.chosen`` is the mean gradient of the chosen
log-probabilities. A head that leaves that side out (``transforms.fixed(chosen=0)``) forgets alone.
"""

from __future__ import annotations

import jax

from entangle import losses
from entangle.losses.hyperparameters import Positive
from entangle.types import PairLogProbs


def npo(lp: PairLogProbs, beta: Positive = 0.1) -> jax.Array:
    """Negative preference optimisation on the rejected response, likelihood on the chosen one.

    ``(2 / beta) log(1 + (pi_l / ref_l)^beta) - log pi_w``, so that d_l = 2 s(beta r_l), r_l the rejected log-ratio: 1 where
    the policy is its reference, and less the more is forgotten.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature; towards 0 it is gradient ascent.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Zhang et al., Negative Preference Optimization, arXiv 2404.05868, equation 3.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> from experiments.unlearning_objectives import npo
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -5.0, 2.0, 2.0)))
      >>> [float(d[0]) for d in losses.coefficients(npo, lp, beta=0.5)]
      [1.0, 1.0]
    """
    return 2.0 / beta * jax.nn.softplus(beta * (lp.rejected - lp.ref_rejected)) + losses.nll(lp)


def ascent(lp: PairLogProbs) -> jax.Array:
    """Gradient ascent on the rejected response, likelihood on the chosen one: ``log pi_l - log pi_w``.

    Args:
      lp: pair log-probabilities, fields ``[B]``.

    Returns:
      Loss per pair, ``[B]``, in nats.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.types import PairLogProbs
      >>> from experiments.unlearning_objectives import ascent
      >>> float(ascent(PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -5.0, 2.0, 2.0))))[0])
      -2.0
    """
    return lp.rejected - lp.chosen
