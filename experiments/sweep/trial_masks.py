"""Token masks in trials: training on the tokens that two responses do not share, known or learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from entangle import data, losses, training
from entangle.models import LanguageModel
from entangle.training.gradients import GradientFn, PairRule
from entangle.types import LogProbFn, PairBatch, PairTokenLogProbs, Params

MASKS = ("none", "oracle", "learned")
"""Whether all tokens of a response are trained on, those that the other one does not have there, or those that a mask leaves
which is learned with the policy (the paper's second remedy, ``losses.masked_dpo``)."""


class Learned(NamedTuple):
    """A policy and masks that are trained together; parameters are ``{"policy": ..., "mask": losses.MaskParams}``.

    Attributes:
      init: the policy's parameters to both.
      log_probs: of the policy, without masks.
      gradients: of DPO on masked log-ratios with the L1 term.
      means: parameters and N pairs to the masks' means over the tokens that both responses share, and over the others.
    """

    init: Callable[[Params], Params]
    log_probs: LogProbFn
    gradients: GradientFn
    means: Callable[[Params, PairBatch], dict[str, jax.Array]]


def learned_masks(
    model: LanguageModel,
    beta: Any,
    sparsity: Any,
    pair_rule: PairRule | None = None,
    batch_size: int = 8,
) -> Learned:
    """The paper's second remedy for one run.

    Args:
      model: the policy.
      beta: of DPO, a number that may be traced.
      sparsity: weight of the L1 term, a token; likewise.
      pair_rule: on the two weighed rows of every pair.
      batch_size: pairs at a time in the means.

    References:
      Yuan et al., arXiv 2410.13828, section 5.2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from entangle import models
      >>> from entangle.types import PairBatch
      >>> from experiments.sweep.trial_masks import learned_masks
      >>> model = models.language_model(models.DecoderConfig(vocab_size=9, max_positions=4, width=4, layers=1, heads=1))
      >>> masks = learned_masks(model, 0.1, 1e-3)
      >>> pairs = PairBatch(jnp.array([[[0, 1, 5], [0, 2, 5]]]), jnp.array([[[False, True, True]] * 2]))
      >>> found = masks.means(masks.init(model.init(jax.random.key(0))), pairs)
      >>> {name: f"{value:.2f}" for name, value in found.items()}
      {'mask/shared': '0.88', 'mask/differing': '0.88'}
    """

    def objective(rows: tuple[PairTokenLogProbs, jax.Array]) -> jax.Array:
        return losses.masked_dpo(*rows, beta=beta, sparsity=sparsity)

    rows_fn = training.masked_rows(model.token_statistics, model.hidden_states)

    def init(start: Params) -> Params:
        return {"policy": start, "mask": losses.init_mask(model.config.width)}

    def log_probs(params: Params, batch: PairBatch, /) -> jax.Array:
        return model.log_probs(params["policy"], batch)

    def means(params: Params, pairs: PairBatch) -> dict[str, jax.Array]:
        def masks(pair: PairBatch) -> jax.Array:
            return losses.token_masks(params["mask"], model.hidden_states(params["policy"], pair.tokens))

        found = jax.lax.map(masks, pairs, batch_size=batch_size)
        differing = losses.oracle_masks(pairs)
        shared = pairs.completion_mask.astype(jnp.float32) - differing
        return {
            f"mask/{name}": jnp.sum(found * where) / jnp.maximum(jnp.sum(where), 1.0)
            for name, where in (("shared", shared), ("differing", differing))
        }

    gradients = training.row_gradients(rows_fn, objective, training.frozen_copy(), pair_rule=pair_rule)
    return Learned(init, log_probs, gradients, means)


def differing_tokens(pairs: data.EncodedPairs) -> data.EncodedPairs:
    """Pairs whose responses are the tokens alone that the other response does not have at the same place.

    Example:
      >>> import numpy as np
      >>> from entangle import data
      >>> from experiments.sweep.trial_masks import differing_tokens
      >>> tokens, mask = np.array([[[9, 1, 5], [9, 2, 5]]], np.int32), np.array([[[False, True, True]] * 2])
      >>> differing_tokens(data.EncodedPairs(tokens, mask, ["x"])).completion_mask.tolist()
      [[[False, True, False], [False, True, False]]]
    """
    batch = PairBatch(jnp.asarray(pairs.tokens), jnp.asarray(pairs.completion_mask))
    return pairs._replace(completion_mask=np.asarray(losses.oracle_masks(batch)) > 0)
