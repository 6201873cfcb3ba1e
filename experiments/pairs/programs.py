"""The programs that stages run: an optimizer and compiled functions, made once for every run of their shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from entangle import models, training
from entangle.losses import Objective
from entangle.models import LanguageModel
from entangle.training import PairChain, PreferenceExamples, StageConfig, TokenBatch, TrainState
from entangle.training.gradients import GradientFn
from entangle.types import LogProbFn, PairBatch, Params
from experiments.pairs.placement import FIRST_DEVICE, Placement


class Program(NamedTuple):
    """One stage's optimizer and compiled functions.

    Attributes:
      stage: how long, how much.
      tx: the optax chain.
      step: jitted step: state, batch and (for preferences) the probe.
      memory: parameters at the start to what the gradients remember, see ``training.preference_memory``.
      place: where everything lies; parameters are handed from stage to stage on the host where that is a mesh.
      draws: whether batches come with a seed for every row, see :func:`row_seeds`.
    """

    stage: StageConfig
    tx: optax.GradientTransformation
    step: Callable[..., Any]
    memory: Callable[[Params], Any] = lambda params: ()
    place: Placement = FIRST_DEVICE
    draws: bool = False

    def begin(self, start: Params) -> TrainState:
        """The state at step 0."""
        return self.place.begin(start, lambda params: training.init_state(params, self.tx, self.memory(params)))


class PreferenceProgram(NamedTuple):
    """A Program with what preference runs need besides.

    Attributes:
      program: optimizer and step.
      score: jitted; params and pairs to ``[N, 2]`` log-probabilities.
      diagnose: jitted; params, held-out examples, training examples, learning rate and memory to mean metrics: everything
        under ``eval/``, and what the log-probabilities alone tell under ``eval_train/``.
    """

    program: Program
    score: Callable[[Params, PairBatch], jax.Array]
    diagnose: Callable[[Params, PreferenceExamples, PreferenceExamples, jax.Array, Any], dict[str, jax.Array]]


def likelihood_program(
    model: LanguageModel, stage: StageConfig, place: Placement = FIRST_DEVICE, frozen: Params | None = None
) -> Program:
    """Optimizer and compiled step of pretraining or SFT, of all parameters or of those on a frozen base."""
    tx = stage.optimizer.build(stage.steps)
    frozen = frozen or {}

    def step(frozen: Params, state: TrainState, batch: TokenBatch) -> Any:
        batch = batch._replace(seeds=_at_step(drops_out(model), batch.seeds, state.step))
        gradients = training.likelihood_gradients(models.on_frozen(model, frozen).token_log_probs)
        return training.make_step(gradients, tx, stage.optimizer.schedule(stage.steps))(state, batch)

    begin = models.on_frozen(model, frozen).init
    compiled = place.jit_step(step, lambda key: training.init_state(begin(key), tx))
    return Program(stage, tx, functools.partial(compiled, frozen), place=place, draws=drops_out(model))


def drops_out(model: LanguageModel) -> bool:
    """Whether training draws dropout: that of adapters.

    Example:
      >>> from entangle import models
      >>> from experiments.pairs.programs import drops_out
      >>> drops_out(models.language_model(models.preset("tiny", 64)))
      False
    """
    return model.config.lora is not None and model.config.lora.dropout > 0


def row_seeds(draws: bool, rows: tuple[int, ...], seed: int) -> Callable[[np.ndarray], Any]:
    """What the rows of a run draw their dropout from: examples' indices to a number for each row, None where nothing is drawn.

    Args:
      draws: whether something is.
      rows: shape of all numbers, examples first.
      seed: of the run.

    Example:
      >>> from experiments.pairs.programs import row_seeds
      >>> row_seeds(True, (5, 2), 0)([3, 1]).shape, row_seeds(False, (5, 2), 0)([3, 1])
      ((2, 2), None)
    """
    if not draws:
        return lambda index: None
    numbers = np.random.default_rng(seed).integers(1 << 32, size=rows, dtype=np.uint32)
    return lambda index: numbers[index]


def _at_step(draws: bool, seeds: jax.Array | None, step: jax.Array) -> jax.Array | None:
    """The rows' seeds at a step: a function of both, so that runs can go on."""
    if not draws:
        return None
    if seeds is None:
        raise ValueError("a batch without seeds for a model that draws dropout: see row_seeds")
    drawn = jax.vmap(lambda seed: jax.random.bits(jax.random.fold_in(jax.random.key(seed), step), (), jnp.uint32))
    return drawn(seeds.reshape(-1)).reshape(seeds.shape)


def preference_program(
    model: LanguageModel,
    stage: StageConfig,
    objective: Objective,
    chain: PairChain,
    *,
    with_geometry: bool = True,
    changes: bool = True,
    eval_batch: int = 8,
    place: Placement = FIRST_DEVICE,
    frozen: Params | None = None,
) -> PreferenceProgram:
    """Optimizer, compiled step and compiled evaluation of preference optimisation.

    Args:
      model: the policy, of all parameters.
      stage: how long, how much.
      objective: margin objective.
      chain: how the two gradients become one, see ``training.pair_chain``.
      with_geometry: log the exact geometry of every step's batch; evaluations always have it.
      changes: log what every step did to its own batch, to first order and in fact.
      eval_batch: pairs at a time in scores and evaluations.
      place: where everything lies.
      frozen: the parameters that are not trained, where everything lies; see ``models.split_params``.
    """
    frozen = frozen or {}

    def functions(frozen: Params) -> PreferenceFunctions:
        return preference_functions(
            models.on_frozen(model, frozen).log_probs,
            stage,
            objective,
            chain,
            with_geometry=with_geometry,
            changes=changes,
            eval_batch=eval_batch,
        )

    def step(frozen: Params, state: TrainState, batch: PreferenceExamples, probe: PairBatch | None = None) -> Any:
        seeds = _at_step(drops_out(model), batch.pairs.seeds, state.step)
        batch = batch._replace(pairs=batch.pairs._replace(seeds=seeds))
        return functions(frozen).step(state, batch, probe)

    tx = functions(frozen).tx
    memory = functools.partial(training.preference_memory, objective)
    init = models.on_frozen(model, frozen).init

    def begin(key: jax.Array) -> TrainState:
        params = init(key)
        return training.init_state(params, tx, memory(params))

    return PreferenceProgram(
        Program(stage, tx, functools.partial(place.jit_step(step, begin), frozen), memory, place, drops_out(model)),
        functools.partial(place.jit(lambda frozen, *rest: functions(frozen).score(*rest)), frozen),
        functools.partial(place.jit(lambda frozen, *rest: functions(frozen).diagnose(*rest)), frozen),
    )


class PreferenceFunctions(NamedTuple):
    """What preference optimisation of one run is made of, not compiled yet.

    Attributes:
      tx: the optax chain.
      step: state, batch and probe to the next state and what the step reports.
      score: params and pairs to ``[N, 2]`` log-probabilities.
      diagnose: as in ``PreferenceProgram``.
    """

    tx: optax.GradientTransformation
    step: Callable[..., Any]
    score: Callable[[Params, PairBatch], jax.Array]
    diagnose: Callable[..., dict[str, jax.Array]]


def preference_functions(
    log_probs: LogProbFn,
    stage: StageConfig,
    objective: Objective,
    chain: PairChain,
    *,
    with_geometry: bool = True,
    changes: bool = True,
    layers: bool = False,
    eval_batch: int = 8,
    learning_rate: jax.Array | None = None,
    reward_beta: jax.Array | None = None,
    gradients: GradientFn | None = None,
) -> PreferenceFunctions:
    """The functions of one run.

    Args:
      log_probs: the policy.
      stage: how long, how much.
      objective: margin objective; its hyperparameters may be traced.
      chain: how the two gradients become one.
      with_geometry: as in ``preference_program``.
      changes: as in ``preference_program``.
      layers: evaluations also tell the geometry of every layer, see ``training.metrics.layer_metrics``.
      eval_batch: as in ``preference_program``.
      learning_rate: peak, in the place of the stage's own; may be traced.
      reward_beta: scale of the logged implicit rewards, in the place of the objective's own beta; may be traced.
      gradients: of another loss than the objective's, which is then the one that evaluations tell the coefficients of.
    """
    tx = chain.around(stage.optimizer.build(stage.steps, chain.head, learning_rate=learning_rate))
    gradients = gradients or training.preference_gradients(
        log_probs,
        objective,
        with_geometry=with_geometry or chain.rule is not None,
        pair_rule=chain.rule,
        reward_beta=reward_beta,
    )
    step = training.make_step(
        gradients,
        tx,
        stage.optimizer.schedule(stage.steps, learning_rate=learning_rate),
        log_probs,
        batch_changes=changes,
    )
    held_out, seen = (
        training.pair_diagnostics(
            log_probs,
            objective,
            with_geometry=full,
            pair_rule=chain.rule,
            batch_size=eval_batch,
            reward_beta=reward_beta,
            layer_of=models.layer_of if layers else None,
        )
        for full in (True, False)
    )

    def diagnose(
        params: Params, eval_: PreferenceExamples, eval_train: PreferenceExamples, rate: jax.Array, memory: Any
    ) -> dict[str, jax.Array]:
        found = {"eval": held_out(params, eval_, rate, memory), "eval_train": seen(params, eval_train, rate, memory)}
        return {f"{split}/{name}": v for split, m in found.items() for name, v in training.means(m).items()}

    def score(params: Params, pairs: PairBatch) -> jax.Array:
        return training.score_pairs(log_probs, params, pairs, eval_batch)

    return PreferenceFunctions(tx, step, score, diagnose)
