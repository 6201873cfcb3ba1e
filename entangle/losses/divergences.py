"""f-DPO: other divergences to the reference than the reverse KL, as transforms of PairLogProbs.

With ``u = pi / pi_ref`` DPO's reward ``log u`` becomes ``f'(u)``. A transform puts ``f'(u)`` in place of the log-ratios, so
that any objective of log-ratios takes it: ``lambda lp: losses.hinge(losses.forward_kl(lp))``.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from entangle.losses.hyperparameters import Positive, Real
from entangle.losses.log_ratios import as_float32, log_ratios
from entangle.losses.logistic import dpo
from entangle.losses.reference_free import expm1_over
from entangle.types import PairLogProbs


def forward_kl(lp: PairLogProbs) -> PairLogProbs:
    """Put ``f'(u) = 1 - exp(-r)`` in the place of the log-ratios r; exponents are held at 80.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> losses.forward_kl(PairLogProbs(*(jnp.array([x]) for x in (-4.0, -5.0, -4.0, -5.0, 2.0, 2.0)))).chosen.tolist()
      [0.0]
    """
    return _replaced(lp, lambda r: expm1_over(r, -1.0))


def jensen_shannon(lp: PairLogProbs) -> PairLogProbs:
    """Put ``f'(u) = log 2 + log s(r)`` in the place of the log-ratios r.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> losses.jensen_shannon(PairLogProbs(*(jnp.array([x]) for x in (-4.0, -5.0, -4.0, -5.0, 2.0, 2.0)))).chosen.tolist()
      [0.0]
    """
    return _replaced(lp, lambda r: jnp.log(jnp.asarray(2, r.dtype)) + jax.nn.log_sigmoid(r))


def alpha_divergence(lp: PairLogProbs, alpha: float | jax.Array = 0.5) -> PairLogProbs:
    """Put ``f'(u) = (u^(alpha - 1) - 1) / (alpha - 1)`` in the place of the log-ratios; at ``alpha = 1`` they stay.

    Exponents are held at 80.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -5.0, 2.0, 2.0)))
      >>> losses.alpha_divergence(lp, 1.0).chosen.tolist(), losses.alpha_divergence(lp, 0.0).chosen.round(4).tolist()
      ([1.0], [0.632099986076355])
    """
    return _replaced(lp, lambda r: expm1_over(r, alpha - 1.0))


def _replaced(lp: PairLogProbs, score: Callable[[jax.Array], jax.Array]) -> PairLogProbs:
    r_w, r_l = log_ratios(lp)
    none = jnp.zeros_like(r_w)
    return as_float32(lp)._replace(chosen=score(r_w), rejected=score(r_l), ref_chosen=none, ref_rejected=none)


def f_dpo_forward_kl(lp: PairLogProbs, beta: Positive = 0.1) -> jax.Array:
    """f-DPO with the forward KL divergence.

    Formulas:
      q_w = min(-r_w, 80)
      q_l = min(-r_l, 80)
      x = beta * (expm1(q_l) - expm1(q_w))
      L = -log s(x)
      d_w = beta * s(-x) * exp(q_w) * 1[q_w < 80]
      d_l = beta * s(-x) * exp(q_l) * 1[q_l < 80]

    Exponents are held at 80, where float32 ends; a response beyond it has coefficient 0. Below, the coefficients stand as
    ``pi_l / pi_w`` relative to the reference: the response that fell more is pulled more, so much that norms of gradients
    overflow in float32 long before.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Wang et al., arXiv 2309.16240, table 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -3.0, -5.0, 2.0, 2.0)))
      >>> losses.f_dpo_forward_kl(lp)  # policy = reference: log 2
      Array([0.6931472], dtype=float32)
    """
    return dpo(forward_kl(lp), beta)


def f_dpo_jensen_shannon(lp: PairLogProbs, beta: Positive = 0.1) -> jax.Array:
    """f-DPO with the Jensen-Shannon divergence.

    Formulas:
      x = beta * (log s(r_w) - log s(r_l))
      L = -log s(x)
      d_w = beta * s(-x) * s(-r_w)
      d_l = beta * s(-x) * s(-r_l)
      d_w / d_l = s(-r_w) / s(-r_l)

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Wang et al., arXiv 2309.16240, table 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -3.0, -5.0, 2.0, 2.0)))
      >>> losses.f_dpo_jensen_shannon(lp)  # policy = reference: log 2
      Array([0.6931472], dtype=float32)
    """
    return dpo(jensen_shannon(lp), beta)


def f_dpo_alpha(lp: PairLogProbs, beta: Positive = 0.1, alpha: Real = 0.5) -> jax.Array:
    """f-DPO with an alpha divergence; ``alpha = 1`` is DPO, ``alpha = 0`` the forward KL.

    Formulas:
      q_w = min((alpha - 1) * r_w, 80)
      q_l = min((alpha - 1) * r_l, 80)
      x = beta * (expm1(q_w) - expm1(q_l)) / (alpha - 1)
      L = -log s(x)
      d_w = beta * s(-x) * exp(q_w) * 1[q_w < 80]
      d_l = beta * s(-x) * exp(q_l) * 1[q_l < 80]

    The paper's table, and older code, call ``1 - alpha`` what is alpha here, which is what common libraries take now.
    Exponents are held at 80, where float32 ends; a response beyond it has coefficient 0.

    Args:
      lp: pair log-probabilities, fields ``[B]``.
      beta: inverse temperature.
      alpha: of the divergence.

    Returns:
      Loss per pair, ``[B]``, in nats.

    References:
      Wang et al., arXiv 2309.16240, table 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> bool(losses.f_dpo_alpha(lp, alpha=1.0)[0] == losses.dpo(lp)[0])
      True
    """
    return dpo(alpha_divergence(lp, alpha), beta)
