"""Log-probabilities and diagnostics of a whole set of pairs, a few pairs at a time, in one compiled call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from entangle import geometry, losses
from entangle.losses import Objective, RunningObjective
from entangle.losses.objective import as_objective
from entangle.training.gradients import PairRule, PreferenceExamples, begun, pair_log_probs, reward_scale
from entangle.training.metrics import Metrics, geometry_metrics, layer_metrics, likelihood_metrics
from entangle.types import LogProbFn, PairBatch, Params


def score_pairs(log_prob_fn: LogProbFn, params: Params, pairs: PairBatch, batch_size: int = 8) -> jax.Array:
    """Log-probabilities of any number of pairs; memory follows batch_size.

    Args:
      log_prob_fn: see types.LogProbFn.
      params: parameters of the policy or of the reference.
      pairs: N pairs.
      batch_size: pairs at a time.

    Returns:
      ``[N, 2]`` summed completion log-probabilities, nats.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.training.evaluation import score_pairs
      >>> from entangle.types import PairBatch
      >>> pairs = PairBatch(jnp.array([[[0, 1], [0, 2]]]), jnp.array([[[False, True]] * 2]))
      >>> unigram = lambda p, b: jnp.sum(jnp.where(b.completion_mask, p[b.tokens], 0.0), -1)
      >>> score_pairs(unigram, jnp.array([0.0, -1.0, -2.0]), pairs).tolist()
      [[-1.0, -2.0]]
    """

    def one(pair: PairBatch) -> jax.Array:
        return log_prob_fn(params, jax.tree.map(lambda leaf: leaf[None], pair))[0]

    return jax.lax.map(one, pairs, batch_size=batch_size)


def pair_diagnostics(
    log_prob_fn: LogProbFn,
    objective: Objective,
    *,
    with_geometry: bool = True,
    pair_rule: PairRule | None = None,
    batch_size: int = 8,
    reward_beta: float | jax.Array | None = None,
    layer_of: Callable[[str], str] | None = None,
) -> Callable[..., Metrics]:
    """Everything that is logged about a batch, for every pair of a set: log-probabilities, rewards, geometry, cases.

    Args:
      log_prob_fn: the policy.
      objective: whose coefficients are taken; one that looks at the whole batch sees all N pairs.
      with_geometry: look at the gradients too: one backward, without any gradient of the parameters' size.
      pair_rule: per-pair rule on the coefficients, as in ``preference_gradients``: ``coefficient/...`` are before it,
        ``predicted/...`` and ``case/...`` after it.
      batch_size: pairs at a time. Scores from ``score_pairs`` at the same size are bitwise the same, so a
        policy that is its own reference has log-ratios of exactly 0.
      reward_beta: as in ``preference_gradients``.
      layer_of: a parameter's path to the name of its layer, as ``geometry.by_group`` takes it: the geometry is also told
        layer by layer, see ``metrics.layer_metrics``.

    Returns:
      A function of params, N examples, the learning rate of the predictions and, for an objective that remembers, the
      state's memory, to name -> ``[N]`` arrays, under the names of ``training.metrics``. The memory is not updated.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.training.evaluation import pair_diagnostics
      >>> from entangle.training.gradients import PreferenceExamples
      >>> from entangle.types import PairBatch
      >>> pairs = PairBatch(jnp.array([[[0, 1], [0, 2]]]), jnp.array([[[False, True]] * 2]))
      >>> unigram = lambda p, b: jnp.sum(jnp.where(b.completion_mask, p[b.tokens], 0.0), -1)
      >>> examples = PreferenceExamples(pairs, jnp.zeros((1, 2)))
      >>> pair_diagnostics(unigram, losses.dpo)(jnp.array([0.0, -1.0, -2.0]), examples, jnp.array(0.1))["margin"].tolist()
      [1.0]
    """
    objective = as_objective(objective)
    scale = reward_scale(objective) if reward_beta is None else reward_beta

    def diagnostics(
        params: Params, examples: PreferenceExamples, learning_rate: jax.Array, memory: Any = ()
    ) -> Metrics:
        lp = pair_log_probs(score_pairs(log_prob_fn, params, examples.pairs, batch_size), examples)
        now = objective.given(begun(memory).objective) if isinstance(objective, RunningObjective) else objective
        with losses.memory_needed():
            loss, d = losses.loss_and_coefficients(now, lp)
        metrics = likelihood_metrics(lp, loss, d, scale)
        if with_geometry:
            look = functools.partial(geometry.pair_geometry, log_prob_fn, params, examples.pairs, batch_size=batch_size)
            if layer_of is None:
                s = look()
            else:
                layers = geometry.by_group(look(per_parameter=True), layer_of)
                s = geometry.total(layers)
                metrics |= layer_metrics(layers)
            metrics |= geometry_metrics(s, d if pair_rule is None else pair_rule(d, s), learning_rate)
        return metrics

    return diagnostics
