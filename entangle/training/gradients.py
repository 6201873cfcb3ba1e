"""From a batch to what the optimizer is given: a plain gradient for likelihood, PairGradients for preferences.

Both are functions of (params, batch), so that one step and one loop serve pretraining, SFT and preference optimisation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from entangle import geometry, losses, sharding
from entangle.losses import Coefficients, Objective, RunningObjective
from entangle.losses.objective import as_objective
from entangle.training.metrics import Metrics, geometry_metrics, likelihood_metrics
from entangle.training.references import Reference
from entangle.types import LogProbFn, PairBatch, PairGeometry, PairGradients, PairLogProbs, Params

PairRule = Callable[[Coefficients, PairGeometry], Coefficients]
"""A per-pair rule on the coefficients, applied before the mean over pairs, e.g. ``transforms.normalize_coefficients``."""


class GradientResult(NamedTuple):
    """What one batch gives.

    Attributes:
      gradients: the updates that the optax chain takes: a tree like the parameters, or PairGradients.
      metrics: name to ``[B]``, one number an example, or to a scalar of the whole batch; the step takes the means.
      losses: per example, to name the culprit when one is not finite: ``[B]``.
      memory: what the next batch is to know of those before.
    """

    gradients: Any
    metrics: Metrics
    losses: jax.Array
    memory: Any = ()


class GradientFn(Protocol):
    """``(params, batch, learning_rate, memory) -> GradientResult``; the learning rate is for predictions only.

    The memory is ``()`` for what needs none, see :func:`preference_memory`.
    """

    def __call__(self, params: Params, batch: Any, learning_rate: jax.Array, memory: Any = (), /) -> GradientResult:
        """Return what one batch gives."""
        ...


class TokenBatch(NamedTuple):
    """Rows for likelihood training.

    Attributes:
      tokens: ``[B, T]`` int32.
      mask: ``[B, T]`` bool, true at the positions whose token is predicted.
      seeds: ``[B]`` uint32, what each row draws its dropout from; None where nothing is dropped.
    """

    tokens: jax.Array
    mask: jax.Array
    seeds: jax.Array | None = None


class PreferenceExamples(NamedTuple):
    """Pairs with the log-probabilities that the reference model gives them.

    Attributes:
      pairs: PairBatch of B pairs.
      reference: ``[B, 2]`` reference log-probabilities, nats; None where the step itself scores the reference.
    """

    pairs: PairBatch
    reference: jax.Array | None = None


class PreferenceMemory(NamedTuple):
    """What a preference step remembers.

    Attributes:
      objective: memory of a ``losses.RunningObjective``, else ``()``.
      reference: memory of a reference scored inside the step, see ``training.references``, else ``()``.
    """

    objective: Any = ()
    reference: Any = ()


def preference_memory(
    objective: Callable[..., jax.Array], params: Params, reference: Reference | None = None
) -> PreferenceMemory:
    """The memory before the first step, for ``init_state``.

    Args:
      objective: the objective that is trained with.
      params: the policy's parameters at the start.
      reference: the reference that is scored inside the step, if there is one.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses, training
      >>> training.preference_memory(losses.beta_dpo, jnp.zeros(2)).objective.mean.tolist()
      0.0
    """
    objective = as_objective(objective)
    return PreferenceMemory(
        objective.init() if isinstance(objective, RunningObjective) else (),
        () if reference is None else reference.init(params),
    )


def begun(memory: Any) -> PreferenceMemory:
    """The memory of a step that needs one.

    Raises:
      ValueError: it was not begun.

    Example:
      >>> from entangle.training.gradients import begun
      >>> begun(())
      Traceback (most recent call last):
      ValueError: this step remembers: begin with init_state(params, tx, preference_memory(objective, params, reference))
    """
    if not isinstance(memory, PreferenceMemory):
        raise ValueError(
            "this step remembers: begin with init_state(params, tx, preference_memory(objective, params, reference))"
        )
    return memory


def updated_reference(reference: Reference, memory: Any, params: Params) -> tuple[PreferenceMemory, Params]:
    """The memory after a step's look at its reference, and the reference's parameters, which get no gradient.

    Raises:
      ValueError: the memory was not begun.
    """
    memory = begun(memory)
    memory = memory._replace(reference=reference.update(memory.reference, params))
    return memory, jax.lax.stop_gradient(reference.params(memory.reference, params))


def pair_log_probs(log_probs: jax.Array, examples: PreferenceExamples) -> PairLogProbs:
    """Name the columns of ``[B, 2]`` log-probabilities.

    Raises:
      ValueError: the reference's are not there.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.training.gradients import PreferenceExamples, pair_log_probs
      >>> from entangle.types import PairBatch
      >>> pairs = PairBatch(jnp.zeros((1, 2, 3), jnp.int32), jnp.array([[[False, True, True], [False, False, True]]]))
      >>> pair_log_probs(jnp.array([[-1.0, -2.0]]), PreferenceExamples(pairs, jnp.zeros((1, 2)))).chosen_length
      Array([2], dtype=int32)
    """
    lengths = jnp.sum(examples.pairs.completion_mask, axis=-1, dtype=jnp.int32)
    if examples.reference is None:
        raise ValueError(
            "no reference log-probabilities: give PreferenceExamples.reference (zeros, if the objective needs none), or "
            "preference_gradients(..., reference=training.frozen_copy())"
        )
    reference = examples.reference
    return PairLogProbs(
        log_probs[:, 0],
        log_probs[:, 1],
        reference[:, 0],
        reference[:, 1],
        lengths[:, 0],
        lengths[:, 1],
    )


def reward_scale(objective: Objective) -> float:
    """The beta that turns log-ratios into implicit rewards: the objective's own, or 1 where it has none.

    Example:
      >>> from entangle import losses
      >>> from entangle.training.gradients import reward_scale
      >>> reward_scale(losses.get_objective("dpo", beta=0.3)), reward_scale(losses.rrhf)
      (0.3, 1.0)
    """
    parameter = inspect.signature(objective).parameters.get("beta")
    return float(parameter.default) if parameter and isinstance(parameter.default, (int, float)) else 1.0


def likelihood_gradients(token_log_probs_fn: Callable[..., jax.Array]) -> GradientFn:
    """Maximum likelihood: mean negative log-probability over all masked tokens of the batch (pretraining and SFT).

    Args:
      token_log_probs_fn: params, tokens ``[B, T]`` and, where the batch has some, seeds ``[B]`` to log-probabilities
        ``[B, T]``.

    Returns:
      A GradientFn over TokenBatch; metrics are ``loss`` (nats a token) and ``perplexity``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from entangle.training.gradients import TokenBatch, likelihood_gradients
      >>> unigram = lambda params, tokens: jax.nn.log_softmax(params)[tokens]
      >>> batch = TokenBatch(jnp.array([[0, 1]]), jnp.array([[False, True]]))
      >>> float(likelihood_gradients(unigram)(jnp.zeros(2), batch, jnp.array(0.1)).metrics["perplexity"])
      2.0
    """

    def loss_fn(params: Params, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        seeds = () if batch.seeds is None else (batch.seeds,)
        log_probs = jnp.where(batch.mask, token_log_probs_fn(params, batch.tokens, *seeds), 0.0)
        count = jnp.sum(batch.mask, dtype=log_probs.dtype)
        return -jnp.sum(log_probs) / jnp.maximum(count, 1.0), -jnp.sum(log_probs, axis=-1)

    def gradients(params: Params, batch: TokenBatch, learning_rate: jax.Array, memory: Any = ()) -> GradientResult:
        (loss, rows), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        return GradientResult(
            grads, {"loss": loss, "perplexity": jnp.exp(loss), "learning_rate": learning_rate}, rows, memory
        )

    return gradients


def ruled(pair_rule: PairRule | None, d: Coefficients, pull_back: Callable[..., Any]) -> Coefficients:
    """The coefficients that a per-pair rule makes of others, with the geometry from a pull-back of its own.

    Args:
      pair_rule: None leaves them as they are.
      d: fields ``[B]``.
      pull_back: of :func:`vjp_apart`, with geometry.
    """
    # the geometry does not depend on the coefficients
    return d if pair_rule is None else pair_rule(d, pull_back(*d)[1])


def vjp_apart(
    log_prob_fn: LogProbFn, params: Params, batch: Any, *, with_geometry: bool
) -> tuple[jax.Array, Callable[..., tuple[PairGradients, PairGeometry | None]]]:
    """Log-probabilities ``[B, 2]``, and the pull-back to the two gradients apart and, if wanted, every pair's geometry.

    While a mesh is set, pairs stay divided over it and gradients lie as their parameters do, see ``entangle.sharding``.
    """
    if with_geometry:
        axes = sharding.pair_axes()
        log_probs, pull = geometry.vjp_with_geometry(log_prob_fn, params, batch, apart=True, spmd_axis_name=axes)
    else:
        log_probs, plain = geometry.pair_vjp(log_prob_fn, params, batch)
        pull = lambda d_w, d_l: (plain(d_w, d_l), None)  # noqa: E731

    def pull_back(d_w: jax.Array, d_l: jax.Array) -> tuple[PairGradients, PairGeometry | None]:
        gradients, s = pull(d_w, d_l)
        return sharding.constrain_like_parameters(gradients), s

    return log_probs, pull_back


def refuse_rule_without_geometry(pair_rule: PairRule | None, with_geometry: bool) -> None:
    """Raise a ValueError for a rule that would not get what it needs."""
    if pair_rule is not None and not with_geometry:
        raise ValueError("a per-pair rule needs the geometry of every pair: set with_geometry=True")


def preference_gradients(
    log_prob_fn: LogProbFn,
    objective: Objective,
    *,
    with_geometry: bool = True,
    pair_rule: PairRule | None = None,
    reference: Reference | None = None,
    reward_beta: float | jax.Array | None = None,
) -> GradientFn:
    """Any margin objective: its two gradients apart, and the exact geometry of every pair of the batch.

    Args:
      log_prob_fn: the policy, see types.LogProbFn.
      objective: pure function of PairLogProbs to ``[B]`` losses.
      with_geometry: log the exact geometry of every pair; it comes with the same backward.
      pair_rule: per-pair rule on the coefficients; it needs the geometry. ``coefficient/...`` are logged before it,
        ``predicted/...`` and ``case/...`` after it.
      reference: scored inside the step, in the place of the examples' numbers; see ``training.references``.
      reward_beta: scale of the logged implicit rewards; None takes the objective's own beta.

    Returns:
      A GradientFn over PreferenceExamples whose gradients are PairGradients and whose metrics are per pair. With a
      ``RunningObjective`` or a reference it needs the memory that :func:`preference_memory` begins.

    Raises:
      ValueError: a pair rule without geometry.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import losses
      >>> from entangle.training.gradients import PreferenceExamples, preference_gradients
      >>> from entangle.types import PairBatch
      >>> pairs = PairBatch(jnp.array([[[0, 1], [0, 2]]]), jnp.array([[[False, True]] * 2]))
      >>> unigram = lambda p, b: jnp.sum(jnp.where(b.completion_mask, p[b.tokens], 0.0), -1)
      >>> result = preference_gradients(unigram, losses.dpo)(
      ...     jnp.zeros(3), PreferenceExamples(pairs, jnp.zeros((1, 2))), jnp.array(0.1))
      >>> result.metrics["geometry/cosine"].tolist(), result.metrics["case/ideal"].tolist()
      ([0.0], [1.0])
    """
    refuse_rule_without_geometry(pair_rule, with_geometry)
    objective = as_objective(objective)
    scale = reward_scale(objective) if reward_beta is None else reward_beta

    def gradients(
        params: Params, examples: PreferenceExamples, learning_rate: jax.Array, memory: Any = ()
    ) -> GradientResult:
        if reference is not None:
            memory, frozen = updated_reference(reference, memory, params)
            examples = examples._replace(reference=log_prob_fn(frozen, examples.pairs))
        log_probs, pull_back = vjp_apart(log_prob_fn, params, examples.pairs, with_geometry=with_geometry)
        lp = pair_log_probs(log_probs, examples)
        now = objective
        if isinstance(objective, RunningObjective):
            memory = begun(memory)
            memory = memory._replace(objective=objective.update(memory.objective, lp))
            now = objective.given(memory.objective)
        with losses.memory_needed():
            loss, d = losses.loss_and_coefficients(now, lp)
        metrics = likelihood_metrics(lp, loss, d, scale)
        d = ruled(pair_rule, d, pull_back)
        pair_gradients, s = pull_back(*d)
        if s is not None:
            metrics |= geometry_metrics(s, d, learning_rate)
        return GradientResult(pair_gradients, metrics | {"learning_rate": learning_rate}, loss, memory)

    return gradients
