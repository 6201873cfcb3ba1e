"""The stages that experiments are made of: pretraining, SFT, preference optimisation; each stage is one run folder.

A program (optimizer, compiled step) is made once and serves every run of its shape: sets and seeds differ in arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from entangle import data, distributed, models, training
from entangle.losses import Objective
from entangle.models import LanguageModel
from entangle.training import PairChain, PreferenceExamples, RunFolder, StageConfig, TokenBatch, TrainState
from entangle.training.gradients import GradientFn
from entangle.types import LogProbFn, PairBatch, Params
from experiments.pairs.placement import FIRST_DEVICE, Placement

TrackerFactory = Callable[[Path, Mapping[str, Any]], training.Tracker]


class Program(NamedTuple):
    """One stage's optimizer and compiled functions.

    Attributes:
      stage: how long, how much.
      tx: the optax chain.
      step: jitted step: state, batch and (for preferences) the probe.
      memory: parameters at the start to what the gradients remember, see ``training.preference_memory``.
      place: where everything lies; parameters are handed from stage to stage on the host where that is a mesh.
    """

    stage: StageConfig
    tx: optax.GradientTransformation
    step: Callable[..., Any]
    memory: Callable[[Params], Any] = lambda params: ()
    place: Placement = FIRST_DEVICE

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


class PreferenceData(NamedTuple):
    """The two splits of a pair set, encoded.

    Attributes:
      train: training pairs.
      held_out: pairs that are only looked at.
    """

    train: data.EncodedPairs
    held_out: data.EncodedPairs


class ReferenceFile(NamedTuple):
    """Where one reference's log-probabilities are kept.

    Attributes:
      path: the file.
      fingerprint: of what they come from.
    """

    path: Path
    fingerprint: training.ReferenceFingerprint


def digest(*arrays: np.ndarray | jax.Array) -> str:
    """Hexadecimal SHA-256 of arrays, shapes and dtypes, for a run's identity.

    Example:
      >>> import numpy as np
      >>> from experiments.pairs.stages import digest
      >>> digest(np.zeros(2)) == digest(np.zeros((2, 1)))
      False
    """
    total = hashlib.sha256()
    for array in map(np.asarray, arrays):
        total.update(f"{array.dtype}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def likelihood_program(
    model: LanguageModel, stage: StageConfig, place: Placement = FIRST_DEVICE, frozen: Params | None = None
) -> Program:
    """Optimizer and compiled step of pretraining or SFT, of all parameters or of those on a frozen base."""
    tx = stage.optimizer.build(stage.steps)
    frozen = frozen or {}

    def step(frozen: Params, state: TrainState, batch: TokenBatch) -> Any:
        if drops_out(model):
            batch = batch._replace(seeds=_seeds(state.step, batch.tokens.shape[:1]))
        gradients = training.likelihood_gradients(models.on_frozen(model, frozen).token_log_probs)
        return training.make_step(gradients, tx, stage.optimizer.schedule(stage.steps))(state, batch)

    begin = models.on_frozen(model, frozen).init
    compiled = place.jit_step(step, lambda key: training.init_state(begin(key), tx))
    return Program(stage, tx, functools.partial(compiled, frozen), place=place)


def drops_out(model: LanguageModel) -> bool:
    """Whether training draws dropout: that of adapters.

    Example:
      >>> from entangle import models
      >>> from experiments.pairs.stages import drops_out
      >>> drops_out(models.language_model(models.preset("tiny", 64)))
      False
    """
    return model.config.lora is not None and model.config.lora.dropout > 0


def _seeds(step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What the rows of a step's batch draw their dropout from: a function of the step, so that runs can go on."""
    return jax.random.bits(jax.random.fold_in(jax.random.key(0), step), shape, jnp.uint32)


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
        if drops_out(model):
            seeds = _seeds(state.step, batch.pairs.tokens.shape[:2])
            batch = batch._replace(pairs=batch.pairs._replace(seeds=seeds))
        return functions(frozen).step(state, batch, probe)

    tx = functions(frozen).tx
    memory = functools.partial(training.preference_memory, objective)
    init = models.on_frozen(model, frozen).init

    def begin(key: jax.Array) -> TrainState:
        params = init(key)
        return training.init_state(params, tx, memory(params))

    return PreferenceProgram(
        Program(stage, tx, functools.partial(place.jit_step(step, begin), frozen), memory, place),
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


def _finish(
    folder: Path,
    identity: Mapping[str, Any],
    program: Program,
    start: Params,
    batches: training.Batches,
    step: Callable[[TrainState, Any], Any],
    tracker: TrackerFactory,
    evaluate: Callable[[TrainState], Mapping[str, jax.Array]] | None = None,
    sources: Sequence[str] | None = None,
) -> Params:
    config = {**identity, "start": digest(*jax.tree.leaves(start)), "stage": dataclasses.asdict(program.stage)}
    run = RunFolder(folder, config)
    label = " ".join(str(identity[name]) for name in ("kind", "pair_set", "seed") if name in identity)
    end = training.train(
        run,
        program.begin(start),
        step,
        batches,
        program.stage,
        evaluate=evaluate,
        tracker=lambda: tracker(folder, config),
        label=label,
        sources=sources,
    ).params
    return program.place.host(end)


def pretrain(
    folder: Path,
    model: LanguageModel,
    program: Program,
    token_ids: np.ndarray,
    length: int,
    seed: int,
    tracker: TrackerFactory,
) -> Params:
    """Train a language model from scratch on packed windows of text; returns the final parameters.

    Args:
      folder: the run folder.
      model: the model.
      program: see likelihood_program.
      token_ids: the text, one stream of int32 tokens.
      length: tokens of a window.
      seed: of the initialisation and the order.
      tracker: makes the mirror of a run.
    """
    stream = data.text_batches(token_ids, program.stage.batch_size, length, seed)
    mask = jnp.broadcast_to(jnp.arange(length) > 0, (program.stage.batch_size, length))
    batches = training.MappedBatches(stream, lambda tokens, _: TokenBatch(jnp.asarray(tokens), mask))
    identity = {"kind": "base", "model": dataclasses.asdict(model.config), "data": digest(token_ids), "seed": seed}
    start = jax.jit(model.init)(jax.random.key(seed))
    return _finish(folder, identity, program, start, batches, program.step, tracker)


def supervise(
    folder: Path,
    model: LanguageModel,
    program: Program,
    start: Params,
    train: data.EncodedPairs,
    identity: Mapping[str, Any],
    tracker: TrackerFactory,
) -> Params:
    """Supervised fine-tuning on the chosen completions; returns the final parameters.

    Args:
      folder: the run folder.
      model: the model.
      program: see likelihood_program.
      start: parameters to start from.
      train: training pairs.
      identity: what tells this run from others; ``seed`` is the seed of the order.
      tracker: makes the mirror of a run.
    """
    place, size = program.place, program.stage.batch_size
    stream = data.pair_batches(train, size, int(identity["seed"]), place.rows(size))
    batches = training.MappedBatches(
        stream, lambda pairs, _: place.joined(TokenBatch(pairs.tokens[:, 0], pairs.completion_mask[:, 0]), size)
    )
    identity = {"kind": "sft", **identity}
    return _finish(folder, identity, program, start, batches, program.step, tracker, sources=train.sources)


def prefer(
    folder: Path,
    program: PreferenceProgram,
    start: Params,
    pairs: PreferenceData,
    identity: Mapping[str, Any],
    tracker: TrackerFactory,
    *,
    probe_pairs: int,
    cache: ReferenceFile | None = None,
) -> Params:
    """Preference optimisation from an SFT model, which is also the reference; returns the final parameters.

    Evaluates the whole held-out split (``eval/...``) and as many training pairs (``eval_train/...``).

    Args:
      folder: the run folder.
      program: see preference_program.
      start: the SFT model's parameters.
      pairs: both splits.
      identity: what tells this run from others; ``seed`` is the seed of the order.
      tracker: makes the mirror of a run.
      probe_pairs: size of the fixed probe set, the first held-out pairs; 0 for none.
      cache: where the reference's log-probabilities are kept and found again; None computes them.

    Raises:
      UserError: the folder holds another run, or the cache another reference's log-probabilities.
      NonFiniteError: see ``training.train`` and ``training.reference_log_probs``.
    """
    place, stage = program.program.place, program.program.stage
    train, held_out = (PairBatch(*place.same((s.tokens, s.completion_mask))) for s in pairs)
    reference = _reference(program, start, {"train": train, "held_out": held_out}, cache)
    by_index = reference["train"]
    count = min(len(held_out.tokens), len(train.tokens))
    eval_ = PreferenceExamples(held_out, place.same(reference["held_out"]))
    eval_train = jax.tree.map(lambda leaf: leaf[:count], PreferenceExamples(train, place.same(by_index)))
    probe = jax.tree.map(lambda leaf: leaf[:probe_pairs], held_out) if probe_pairs else None
    rate = place.same(np.float32(stage.optimizer.learning_rate))

    def evaluate(state: TrainState) -> dict[str, jax.Array]:
        return program.diagnose(state.params, eval_, eval_train, rate, state.memory)

    size = stage.batch_size
    stream = data.pair_batches(pairs.train, size, int(identity["seed"]), place.rows(size))
    batches = training.MappedBatches(
        stream, lambda batch, index: place.joined(PreferenceExamples(batch, by_index[index]), size)
    )

    def step(state: TrainState, batch: Any) -> Any:
        return program.program.step(state, batch, probe)

    identity = {"kind": "preference", **identity}
    return _finish(folder, identity, program.program, start, batches, step, tracker, evaluate, pairs.train.sources)


def _reference(
    program: PreferenceProgram, start: Params, splits: Mapping[str, PairBatch], cache: ReferenceFile | None
) -> dict[str, np.ndarray]:
    """Split -> ``[N, 2]`` log-probabilities under the reference, out of the cache where they are there."""
    done = "read from"

    def compute() -> dict[str, np.ndarray]:
        nonlocal done
        done = "computed and written to"
        placed = program.program.place.params(start)
        return {name: np.asarray(program.score(placed, pairs)) for name, pairs in splits.items()}

    if cache is None:
        return compute()
    counts = {name: len(pairs.tokens) for name, pairs in splits.items()}
    found = training.reference_log_probs(cache.path, cache.fingerprint, counts, compute)
    if distributed.is_writer():
        print(f"reference log-probabilities {done} {cache.path}")
    return found
