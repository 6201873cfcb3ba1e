"""State and the one step function: gradients, optimizer, new parameters, and what the step did to log-probabilities."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from entangle.geometry import PairChanges, first_order_changes, inner_product, step_changes
from entangle.training.gradients import GradientFn
from entangle.training.metrics import Metrics, change_metrics, combination_metrics, means
from entangle.transforms.chains import naming_the_fix, require_combined
from entangle.types import LogProbFn, PairGradients, Params


class TrainState(NamedTuple):
    """All that changes during training; a checkpoint holds this and the data position.

    Attributes:
      step: int32 scalar, optimizer steps taken.
      params: trainable parameters.
      opt_state: state of the optax chain.
      memory: what the objective and a reference scored inside the step remember, see ``preference_memory``; else ``()``.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    memory: Any = ()


class StepResult(NamedTuple):
    """What one step reports.

    Attributes:
      metrics: name to scalar.
      losses: ``[B]``, to name the culprit when one is not finite.
    """

    metrics: Metrics
    losses: jax.Array


StepFn = Callable[[TrainState, Any], tuple[TrainState, StepResult]]


def init_state(params: Params, tx: optax.GradientTransformation, memory: Any = ()) -> TrainState:
    """State before the first step.

    Args:
      params: trainable parameters.
      tx: the optax chain.
      memory: of the gradient function, where it has one: ``preference_memory``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from entangle.training.step import init_state
      >>> int(init_state(jnp.zeros(2), optax.sgd(0.1)).step)
      0
    """
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), memory)


def make_step(
    gradient_fn: GradientFn,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    log_prob_fn: LogProbFn | None = None,
    *,
    batch_changes: bool = True,
) -> Callable[..., tuple[TrainState, StepResult]]:
    """The one training step: pure, to be jitted by the caller.

    Args:
      gradient_fn: likelihood_gradients, preference_gradients or row_gradients.
      tx: the optax chain; for preferences its head is ``transforms.combine_pair``.
      schedule: step -> learning rate, the one inside tx; logged, and used for predictions.
      log_prob_fn: the policy of a preference step. With it the step says what it did to log-probabilities: of its
        batch, and of a probe where it is given one, see ``metrics.change_metrics``.
      batch_changes: whether it says so of its batch, at the cost of two forward-mode derivatives and a
          forward.

    Returns:
      A function of state, batch and optionally a PairBatch to probe, to the next state and a StepResult. The probe is an
      argument, so that one compiled step serves runs with different probes. The new state does not depend on what is said.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from entangle.training.gradients import TokenBatch, likelihood_gradients
      >>> from entangle.training.step import init_state, make_step
      >>> unigram = lambda params, tokens: jax.nn.log_softmax(params)[tokens]
      >>> tx = optax.sgd(1.0)
      >>> step = jax.jit(make_step(likelihood_gradients(unigram), tx, optax.constant_schedule(1.0)))
      >>> batch = TokenBatch(jnp.array([[0, 1]]), jnp.array([[False, True]]))
      >>> state, result = step(init_state(jnp.zeros(2), tx), batch)
      >>> int(state.step), state.params.tolist()
      (1, [-0.5, 0.5])
    """

    def step(state: TrainState, batch: Any, probe: Any = None) -> tuple[TrainState, StepResult]:
        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        result = gradient_fn(state.params, batch, learning_rate, state.memory)
        with naming_the_fix("a transform of the optax chain"):
            updates, opt_state = tx.update(result.gradients, state.opt_state, state.params)
        require_combined(updates)
        params = optax.apply_updates(state.params, updates)
        metrics = dict(result.metrics)
        if log_prob_fn is not None:
            changes = functools.partial(step_changes, log_prob_fn, state.params, updates, params)
            if batch_changes:
                first_order, realised = changes(batch.pairs)
                plain = _plain_step(result.gradients, learning_rate)
                whole_batch = first_order_changes(log_prob_fn, state.params, plain, batch.pairs)
                predictions = _predicted(metrics) | {"predicted_batch": whole_batch, "first_order": first_order}
                metrics |= change_metrics(realised, predictions)
            if probe is not None:
                first_order, realised = changes(probe)
                found = change_metrics(realised, {"first_order": first_order})
                metrics |= {f"probe/{name}": values for name, values in found.items()}
        metrics = (
            means(metrics) | combination_metrics(opt_state) | {"update_norm": jnp.sqrt(inner_product(updates, updates))}
        )
        return TrainState(state.step + 1, params, opt_state, result.memory), StepResult(metrics, result.losses)

    return step


def _plain_step(gradients: PairGradients, learning_rate: jax.Array) -> Params:
    """The update of one plain gradient step on the batch's mean loss."""
    return jax.tree.map(lambda w, l: learning_rate.astype(w.dtype) * (w - l), gradients.chosen, gradients.rejected)


def _predicted(metrics: Metrics) -> dict[str, PairChanges]:
    """What geometry_metrics, if they were taken, say that every pair alone would do."""
    if "predicted/chosen" not in metrics:
        return {}
    return {"predicted": PairChanges(metrics["predicted/chosen"], metrics["predicted/rejected"])}
