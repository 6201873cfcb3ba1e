"""Training with objectives that see more of a row than its log-probability: tokens, distributions, masks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from entangle import losses
from entangle.training.gradients import (
    GradientFn,
    GradientResult,
    PairRule,
    PreferenceExamples,
    refuse_rule_without_geometry,
    ruled,
    updated_reference,
    vjp_apart,
)
from entangle.training.metrics import geometry_metrics
from entangle.training.references import Reference
from entangle.types import PairBatch, Params

RowsFn = Callable[[Params, Params, PairBatch], Any]
"""``(params, reference_params, batch of leaves [B, R, T]) -> pytree of [B, R, ...]``, row by row."""


def row_gradients(
    rows_fn: RowsFn,
    objective: Callable[..., jax.Array],
    reference: Reference,
    *,
    with_geometry: bool = True,
    pair_rule: PairRule | None = None,
) -> GradientFn:
    """The two sides' gradients of an objective of rows, apart, and their exact geometry in every pair.

    The objective's coefficients weigh what is known of each row; the two gradients of a pair are those of its two weighed
    rows, so coefficients are in them already: ``weighed/geometry/...`` and ``weighed/case/...`` are of these, at
    coefficients of 1. For a loss of log-probabilities alone they are ``d_w g_w`` and ``d_l g_l``.

    Args:
      rows_fn: what the objective sees of policy and reference, e.g. ``models.token_statistics``.
      objective: a function of what rows_fn returns to losses ``[B]``, e.g. ``losses.tdpo2``, or one with masks.
      reference: scored inside the step; begin its memory with ``preference_memory(objective, params, reference)``.
      with_geometry: log the geometry; it comes with the same backward.
      pair_rule: per-pair rule on the two weighed rows; it needs the geometry, sees it with coefficients of 1, and
        ``weighed/predicted/...`` and ``weighed/case/...`` are logged after it.

    Returns:
      A GradientFn over PreferenceExamples whose gradients are PairGradients. It costs a forward more than
      ``preference_gradients``: the coefficients have to be known before the weighed rows can be pulled back.

    Raises:
      ValueError: a pair rule without geometry.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from entangle import losses, training
      >>> from entangle.types import PairBatch, PairTokenLogProbs
      >>> def unigram(params, reference, batch):
      ...     policy, ref = (jax.nn.log_softmax(p)[batch.tokens] for p in (params, reference))
      ...     return PairTokenLogProbs(policy, ref, batch.completion_mask, policy, policy)
      >>> pairs = PairBatch(jnp.array([[[0, 1], [0, 2]]]), jnp.array([[[False, True]] * 2]))
      >>> params, reference = jnp.zeros(3), training.frozen_copy()
      >>> memory = training.preference_memory(losses.ld_dpo, params, reference)
      >>> result = training.row_gradients(unigram, losses.ld_dpo, reference)(
      ...     params, training.PreferenceExamples(pairs), jnp.array(0.1), memory)
      >>> f"{result.losses[0]:.4f}", f"{result.gradients.chosen[1]:.4f}"  # log 2; beta / 2 of 1 - 1 / 3
      ('0.6931', '0.0333')
    """
    refuse_rule_without_geometry(pair_rule, with_geometry)

    def gradients(
        params: Params, examples: PreferenceExamples, learning_rate: jax.Array, memory: Any = ()
    ) -> GradientResult:
        memory, frozen = updated_reference(reference, memory, params)
        rows = rows_fn(params, frozen, examples.pairs)
        loss, weights = losses.row_loss_and_coefficients(objective, rows)

        def weighed(params: Params, batch: tuple[PairBatch, Any]) -> jax.Array:
            pairs, weights = batch
            parts = jax.tree.map(_weighed_sum, weights, rows_fn(params, frozen, pairs))
            return functools.reduce(jnp.add, [part for part in jax.tree.leaves(parts) if part is not None])

        _, pull_back = vjp_apart(weighed, params, (examples.pairs, weights), with_geometry=with_geometry)
        ones = jnp.ones_like(loss)
        metrics = {"loss": loss, "learning_rate": learning_rate}
        d = ruled(pair_rule, losses.Coefficients(ones, ones), pull_back)
        pair_gradients, s = pull_back(*d)
        if s is not None:
            found = geometry_metrics(s, d, learning_rate)
            metrics |= {f"weighed/{name}": values for name, values in found.items()}
        return GradientResult(pair_gradients, metrics, loss, memory)

    return gradients


def masked_rows(
    statistics: RowsFn, hidden_states: Callable[[Params, jax.Array], jax.Array]
) -> Callable[[dict[str, Any], dict[str, Any], PairBatch], tuple[Any, jax.Array]]:
    """Rows of a policy and of token masks that are trained with it, for ``losses.masked_dpo``.

    Args:
      statistics: rows of the policy alone, e.g. ``models.token_statistics``.
      hidden_states: the policy's parameters and tokens ``[..., T]`` to ``[..., T, D]``, e.g. ``LanguageModel.hidden_states``.

    Returns:
      A function like ``statistics`` of parameters ``{"policy": ..., "mask": losses.MaskParams}`` to a pair of rows and masks
      ``[B, R, T]``, 0 off the completions.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from entangle import losses, models, training
      >>> model = models.language_model(models.DecoderConfig(vocab_size=9, max_positions=4, width=4, layers=1, heads=1))
      >>> params = {"policy": model.init(jax.random.key(0)), "mask": losses.init_mask(4)}
      >>> rows_fn = training.masked_rows(model.token_statistics, model.hidden_states)
      >>> objective, reference = lambda rows: losses.masked_dpo(*rows), training.frozen_copy()
      >>> gradient_fn = jax.jit(training.row_gradients(rows_fn, objective, reference, with_geometry=False))
      >>> memory = training.preference_memory(objective, params, reference)
      >>> from entangle.types import PairBatch
      >>> pairs = PairBatch(jnp.array([[[0, 1, 5], [0, 2, 5]]]), jnp.array([[[False, True, True]] * 2]))
      >>> gradients = gradient_fn(params, training.PreferenceExamples(pairs), jnp.array(0.1), memory).gradients
      >>> float(gradients.chosen["mask"].bias - gradients.rejected["mask"].bias) < 0  # L1: the masks go down
      True
    """

    def rows(params: dict[str, Any], reference: dict[str, Any], batch: PairBatch) -> tuple[Any, jax.Array]:
        masks = losses.token_masks(params["mask"], hidden_states(params["policy"], batch.tokens))
        masks = jnp.where(batch.completion_mask, masks, 0.0)
        return statistics(params["policy"], reference["policy"], batch), masks

    return rows


def _weighed_sum(weights: jax.Array, values: jax.Array) -> jax.Array | None:
    """Sum over all but pair and side; None for what has no derivative."""
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return None
    weighed = jnp.where(weights == 0, 0, weights * values.astype(weights.dtype))
    return jnp.sum(weighed, axis=tuple(range(2, weighed.ndim)))
