"""Per-pair diagnostics of a batch, by name; a run logs their means.

Names are grouped by a slash, as trackers show them: ``log_prob/``, ``reward/``, ``coefficient/``, ``geometry/``, ``layer/``,
``case/``, ``predicted/``, ``predicted_batch/``, ``first_order/``, ``realised/``, ``agreement/``, ``weight/``, ``combined/``,
``retain/``, ``protect/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from entangle import geometry, transforms
from entangle.geometry import PairChanges
from entangle.losses import Coefficients, log_ratios
from entangle.losses.log_ratios import as_float32
from entangle.paths import nodes_of
from entangle.types import PairGeometry, PairLogProbs

Metrics = dict[str, jax.Array]


def likelihood_metrics(
    lp: PairLogProbs, loss: jax.Array, coefficients: Coefficients, reward_scale: float | jax.Array
) -> Metrics:
    """What the log-probabilities alone tell, per pair.

    Args:
      lp: fields ``[B]``, nats.
      loss: ``[B]``.
      coefficients: d_w and d_l, fields ``[B]``.
      reward_scale: beta of the implicit reward ``beta (log pi - log pi_ref)``.

    Returns:
      Name to ``[B]`` array. ``reward/...`` is DPO's implicit reward against the reference, also for objectives that
      use none (SimPO and CPO have rewards of their own);
      ``accuracy`` is the share of pairs whose chosen response has the larger implicit reward.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.losses import Coefficients
      >>> from entangle.training.metrics import likelihood_metrics
      >>> from entangle.types import PairLogProbs
      >>> lp = PairLogProbs(*(jnp.array([x]) for x in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)))
      >>> m = likelihood_metrics(lp, jnp.zeros(1), Coefficients(jnp.ones(1), jnp.ones(1)), 0.5)
      >>> float(m["margin"][0]), float(m["reward/chosen"][0]), float(m["accuracy"][0])
      (2.0, 0.5, 1.0)
    """
    lp = as_float32(lp)
    r_w, r_l = log_ratios(lp)
    return {
        "loss": loss,
        "log_prob/chosen": lp.chosen,
        "log_prob/rejected": lp.rejected,
        "log_ratio/chosen": r_w,
        "log_ratio/rejected": r_l,
        "margin": lp.chosen - lp.rejected,
        "reward/chosen": reward_scale * r_w,
        "reward/rejected": reward_scale * r_l,
        "reward/margin": reward_scale * (r_w - r_l),
        "accuracy": (r_w > r_l).astype(loss.dtype),
        "coefficient/chosen": coefficients.chosen,
        "coefficient/rejected": coefficients.rejected,
    }


def geometry_metrics(s: PairGeometry, coefficients: Coefficients, learning_rate: float | jax.Array) -> Metrics:
    """What the gradient geometry tells, per pair: norms, cosine, condition ratio, case shares, predicted changes.

    Args:
      s: exact per-pair geometry, fields ``[B]``.
      coefficients: d_w and d_l, fields ``[B]``.
      learning_rate: step size that the plain-gradient prediction is made for.

    Returns:
      Name to ``[B]`` array. ``case/...`` are indicators, so that their means are shares of pairs; ``predicted/...`` are
      the changes (nats) under one plain gradient step on the pair alone, see ``geometry.predicted_changes``.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.losses import Coefficients
      >>> from entangle.training.metrics import geometry_metrics
      >>> from entangle.types import PairGeometry
      >>> s = PairGeometry(jnp.array([1.0]), jnp.array([4.0]), jnp.array([1.5]))
      >>> m = geometry_metrics(s, Coefficients(jnp.ones(1), jnp.ones(1)), 0.1)
      >>> float(m["geometry/cosine"][0]), float(m["case/both_fall"][0])
      (0.75, 1.0)
    """
    change = geometry.predicted_changes(s, coefficients.chosen, coefficients.rejected, learning_rate)
    case = geometry.case_of(s, coefficients.chosen, coefficients.rejected)
    return {
        "geometry/chosen_norm": jnp.sqrt(s.chosen_sq_norm),
        "geometry/rejected_norm": jnp.sqrt(s.rejected_sq_norm),
        "geometry/inner_product": s.inner_product,
        "geometry/cosine": geometry.cosine(s),
        "geometry/condition_ratio": geometry.condition_ratio(s),
        **{f"case/{c.name.lower()}": (case == c).astype(s.inner_product.dtype) for c in geometry.Case},
        "predicted/chosen": change.chosen,
        "predicted/rejected": change.rejected,
    }


def layer_metrics(layers: Mapping[str, PairGeometry]) -> Metrics:
    """Where in the model the gradients' geometry comes from, per pair.

    Args:
      layers: name to the geometry of that part of the parameters, fields ``[B]``; all of them are all parameters.

    Returns:
      Name to ``[B]`` array, for every layer: ``layer/NAME/cosine``, of its parts of the two gradients; its shares of
      ``|g_w|^2`` and ``|g_l|^2``, ``layer/NAME/chosen_share`` and ``rejected_share``; and ``layer/NAME/cosine_part``, its
      inner product over ``|g_w| |g_l|``: over the layers the parts add up to the cosine of the whole gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.training.metrics import layer_metrics
      >>> from entangle.types import PairGeometry
      >>> head, body = (PairGeometry(*(jnp.array([x]) for x in s)) for s in ((3.0, 3.0, -1.5), (1.0, 1.0, 1.0)))
      >>> m = layer_metrics({"head": head, "body": body})
      >>> [float(m[f"layer/head/{what}"][0]) for what in ("cosine", "chosen_share", "cosine_part")]
      [-0.5, 0.75, -0.375]
    """
    whole = geometry.total(dict(layers))
    size = jnp.sqrt(whole.chosen_sq_norm) * jnp.sqrt(whole.rejected_sq_norm)
    metrics: Metrics = {}
    for name, s in layers.items():
        metrics |= {
            f"layer/{name}/cosine": geometry.cosine(s),
            f"layer/{name}/chosen_share": _share(s.chosen_sq_norm, whole.chosen_sq_norm),
            f"layer/{name}/rejected_share": _share(s.rejected_sq_norm, whole.rejected_sq_norm),
            f"layer/{name}/cosine_part": _share(s.inner_product, size),
        }
    return metrics


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    """0 of nothing; the operand is made safe, so that derivatives are."""
    some = whole > 0
    return jnp.where(some, part / jnp.where(some, whole, 1.0), 0.0)


def change_metrics(realised: PairChanges, predictions: dict[str, PairChanges]) -> Metrics:
    """What a step did to both log-probabilities of every pair, and which predictions have its sign.

    Args:
      realised: log-probabilities after minus before, fields ``[B]``.
      predictions: name to what was predicted.

    Returns:
      Name to ``[B]`` array: ``realised/...`` and ``NAME/...`` in nats; ``agreement/NAME``, the share of the pair's two
      rows whose predicted change has the sign of the realised one. Zero has a sign of its own: a pair whose coefficients
      are zero predicts no change, and is wrong where others move it.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.geometry import PairChanges
      >>> from entangle.training.metrics import change_metrics
      >>> realised = PairChanges(jnp.array([-2.0]), jnp.array([-3.0]))
      >>> m = change_metrics(realised, {"predicted": PairChanges(jnp.array([1.0]), jnp.array([-1.0]))})
      >>> float(m["predicted/chosen"][0]), float(m["agreement/predicted"][0])
      (1.0, 0.5)
    """
    metrics: Metrics = {}
    for name, change in (predictions | {"realised": realised}).items():
        metrics |= {f"{name}/{side}": values for side, values in change._asdict().items()}
    for name, change in predictions.items():
        right = [jnp.sign(a) == jnp.sign(b) for a, b in zip(change, realised, strict=True)]
        metrics[f"agreement/{name}"] = jnp.mean(jnp.stack(right), axis=0, dtype=realised.chosen.dtype)
    return metrics


def combination_metrics(opt_state: Any) -> Metrics:
    """What the heads of an optax chain saw of the batch's two gradients and what they made of it.

    Args:
      opt_state: of a chain with ``transforms.combine_pair`` in it; other chains give nothing.

    Returns:
      Name to scalar: ``weight/chosen`` and ``weight/rejected``, and of the two weighed means ``combined/chosen_norm``,
      ``combined/rejected_norm`` and ``combined/cosine``; with groups ``weight/chosen/GROUP`` and so on, means over the layers
      of stacked ones. Of a projection ``retain/removed``, the share of the step's squared length that it took, and of
      ``protect_chosen`` ``protect/removed``.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.training.metrics import combination_metrics
      >>> from entangle.types import PairGradients
      >>> tx = transforms.combine_pair(transforms.normalized())
      >>> _, state = tx.update(PairGradients(jnp.array([2.0]), jnp.array([4.0])), tx.init(jnp.zeros(1)))
      >>> {name: float(value) for name, value in combination_metrics(state).items() if "chosen" in name}
      {'weight/chosen': 0.5, 'combined/chosen_norm': 2.0}
    """
    metrics: Metrics = {}
    for state in transforms.combined(opt_state):
        groups = state.gram if isinstance(state.gram, dict) else {"": state.gram}
        weights = state.weights if isinstance(state.weights, dict) else {"": state.weights}
        for group, s in groups.items():
            found = {f"weight/{side}": value for side, value in weights[group]._asdict().items()}
            found |= {
                "combined/chosen_norm": jnp.sqrt(s.chosen_sq_norm),
                "combined/rejected_norm": jnp.sqrt(s.rejected_sq_norm),
                "combined/cosine": geometry.cosine(s),
            }
            metrics |= {name + (f"/{group}" if group else ""): jnp.mean(value) for name, value in found.items()}
    for kept in transforms.retained(opt_state):
        metrics["retain/removed"] = kept.removed
    for done in nodes_of(opt_state, transforms.ProtectChosenState):
        metrics["protect/removed"] = done.removed
    return metrics


def means(metrics: Metrics) -> Metrics:
    """Mean of every metric over the pairs; a scalar is its own.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.training.metrics import means
      >>> float(means({"loss": jnp.array([1.0, 3.0])})["loss"])
      2.0
    """
    return {name: jnp.mean(values) for name, values in metrics.items()}
