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
from jax.sharding import Mesh, Sharding

from entangle import data, losses, models, training
from entangle.errors import NonFiniteError
from entangle.losses import Objective
from entangle.models import LanguageModel
from entangle.training import PairChain, PreferenceExamples, RunFolder, StageConfig, TokenBatch, TrainState
from entangle.types import PairBatch, Params

TrackerFactory = Callable[[Path, Mapping[str, Any]], training.Tracker]


class Program(NamedTuple):
    """One stage's optimizer and compiled functions.

    Attributes:
      stage: how long, how much.
      tx: the optax chain.
      step: jitted step: state, batch and (for preferences) the probe.
      memory: parameters at the start to what the gradients remember, see ``training.preference_memory``.
    """

    stage: StageConfig
    tx: optax.GradientTransformation
    step: Callable[..., Any]
    memory: Callable[[Params], Any] = lambda params: ()


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
      >>> from experiments.stages import digest
      >>> digest(np.zeros(2)) == digest(np.zeros((2, 1)))
      False
    """
    total = hashlib.sha256()
    for array in map(np.asarray, arrays):
        total.update(f"{array.dtype}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def likelihood_program(model: LanguageModel, stage: StageConfig) -> Program:
    """Optimizer and compiled step of pretraining or SFT."""
    tx = stage.optimizer.build(stage.steps)
    gradients = training.likelihood_gradients(model.token_log_probs)
    return Program(stage, tx, jax.jit(training.make_step(gradients, tx, stage.optimizer.schedule(stage.steps))))


def preference_program(
    model: LanguageModel,
    stage: StageConfig,
    objective: Objective,
    chain: PairChain,
    *,
    with_geometry: bool = True,
    changes: bool = True,
    eval_batch: int = 8,
) -> PreferenceProgram:
    """Optimizer, compiled step and compiled evaluation of preference optimisation.

    Args:
      model: the policy.
      stage: how long, how much.
      objective: margin objective.
      chain: how the two gradients become one, see ``training.pair_chain``.
      with_geometry: log the exact geometry of every step's batch; evaluations always have it.
      changes: log what every step did to its own batch, to first order and in fact.
      eval_batch: pairs at a time in scores and evaluations.
    """
    functions = _preference_functions(
        model, stage, objective, chain, with_geometry=with_geometry, changes=changes, eval_batch=eval_batch
    )
    return PreferenceProgram(
        Program(stage, functions.tx, jax.jit(functions.step), functools.partial(training.preference_memory, objective)),
        jax.jit(functions.score),
        jax.jit(functions.diagnose),
    )


class Numbers(NamedTuple):
    """What trials of one program differ in; stacked along a leading axis.

    Attributes:
      choice: of the program's objectives.
      learning_rate: peak of the preference stage.
      reward_beta: scale of the logged implicit rewards.
    """

    choice: losses.Choice
    learning_rate: jax.Array
    reward_beta: jax.Array


class TrialsProgram(NamedTuple):
    """Preference optimisation of many trials in one program; functions of one trial's ``Numbers`` are mapped over them.

    Attributes:
      stage: how long, how much; the learning rate is a number of each trial.
      tx: an optax chain whose state is that of every trial.
      memories: parameters at the start to what the gradients remember, one a trial.
      numbers: of the trials.
      step: jitted; probe, numbers, stacked state and batch to the same as a single step's, stacked.
      score: as in ``PreferenceProgram``, of one trial.
      diagnose: jitted; held-out and training pairs, then stacked: numbers, params, both splits' references, memory.
      mesh: whose devices share the trials; None for one device.
    """

    stage: StageConfig
    tx: optax.GradientTransformation
    memories: list[Callable[[Params], Any]]
    numbers: Numbers
    step: Any
    score: Callable[[Params, PairBatch], jax.Array]
    diagnose: Callable[..., dict[str, jax.Array]]
    mesh: Mesh | None = None

    @property
    def devices(self) -> int:
        """That share the trials."""
        return 1 if self.mesh is None else self.mesh.shape[training.TRIAL_AXIS]


def trials_program(
    model: LanguageModel,
    stage: StageConfig,
    objectives: Sequence[tuple[str, Mapping[str, float]]],
    learning_rates: Sequence[float],
    chain: PairChain,
    *,
    changes: bool = True,
    layers: bool = False,
    eval_batch: int = 8,
    mesh: Mesh | None = None,
    side_by_side: int | None = None,
) -> TrialsProgram:
    """One compiled program for trials that differ in objective, its hyperparameters, learning rate, seed and start.

    Args:
      model: the policy.
      stage: of all trials but for the learning rate.
      objectives: name and hyperparameters, one a trial.
      learning_rates: one a trial.
      chain: how the two gradients become one.
      changes: as in ``preference_program``.
      layers: evaluations also tell the geometry of every layer, see ``training.metrics.layer_metrics``.
      eval_batch: as in ``preference_program``.
      mesh: with an axis ``trial``, whose devices share the trials; None for one device.
      side_by_side: trials at once on a device, see ``training.map_trials``. Evaluations are one trial at a time.
    """
    selection = losses.Selection(objectives)
    fixed = [losses.get_objective(name, **given) for name, given in objectives]
    numbers = Numbers(
        selection.choices,
        jnp.asarray(learning_rates, jnp.float32),
        jnp.asarray([training.reward_scale(objective) for objective in fixed], jnp.float32),
    )

    def functions(own: Numbers) -> _PreferenceFunctions:
        return _preference_functions(
            model,
            stage,
            selection.objective(own.choice),
            chain,
            changes=changes,
            layers=layers,
            eval_batch=eval_batch,
            learning_rate=own.learning_rate,
            reward_beta=own.reward_beta,
        )

    def step(probe: Any, own: Numbers, state: TrainState, batch: PreferenceExamples) -> Any:
        return functions(own).step(state, batch, probe)

    def diagnose(
        pairs: tuple[PairBatch, PairBatch], own: Numbers, params: Params, references: Any, memory: Any
    ) -> dict[str, jax.Array]:
        eval_, eval_train = (PreferenceExamples(p, r) for p, r in zip(pairs, references, strict=True))
        return functions(own).diagnose(params, eval_, eval_train, own.learning_rate, memory)

    one = functions(training.trials.trial(numbers, 0))
    return TrialsProgram(
        stage,
        one.tx,
        [functools.partial(training.preference_memory, objective) for objective in fixed],
        numbers,
        jax.jit(training.map_trials(step, mesh=mesh, side_by_side=side_by_side)),
        jax.jit(one.score),
        jax.jit(training.map_trials(diagnose, mesh=mesh, side_by_side=1)),
        mesh,
    )


class _PreferenceFunctions(NamedTuple):
    tx: optax.GradientTransformation
    step: Callable[..., Any]
    score: Callable[[Params, PairBatch], jax.Array]
    diagnose: Callable[..., dict[str, jax.Array]]


def _preference_functions(
    model: LanguageModel,
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
) -> _PreferenceFunctions:
    """Of one run; learning rate and objective may be traced."""
    tx = chain.around(stage.optimizer.build(stage.steps, chain.head, learning_rate=learning_rate))
    gradients = training.preference_gradients(
        model.log_probs,
        objective,
        with_geometry=with_geometry or chain.rule is not None,
        pair_rule=chain.rule,
        reward_beta=reward_beta,
    )
    step = training.make_step(
        gradients,
        tx,
        stage.optimizer.schedule(stage.steps, learning_rate=learning_rate),
        model.log_probs,
        batch_changes=changes,
    )
    held_out, seen = (
        training.pair_diagnostics(
            model.log_probs,
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
        return training.score_pairs(model.log_probs, params, pairs, eval_batch)

    return _PreferenceFunctions(tx, step, score, diagnose)


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
    state = training.init_state(start, program.tx, program.memory(start))
    label = " ".join(str(identity[name]) for name in ("kind", "pair_set", "seed") if name in identity)
    return training.train(
        run,
        state,
        step,
        batches,
        program.stage,
        evaluate=evaluate,
        tracker=lambda: tracker(folder, config),
        label=label,
        sources=sources,
    ).params


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
    stream = data.pair_batches(train, program.stage.batch_size, int(identity["seed"]))
    batches = training.MappedBatches(
        stream, lambda pairs, _: TokenBatch(pairs.tokens[:, 0], pairs.completion_mask[:, 0])
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
    train, held_out = (PairBatch(jnp.asarray(s.tokens), jnp.asarray(s.completion_mask)) for s in pairs)
    reference = _reference(program, start, {"train": train, "held_out": held_out}, cache)
    by_index = reference["train"]
    count = min(len(held_out.tokens), len(train.tokens))
    eval_ = PreferenceExamples(held_out, jnp.asarray(reference["held_out"]))
    eval_train = jax.tree.map(lambda leaf: leaf[:count], PreferenceExamples(train, jnp.asarray(by_index)))
    probe = jax.tree.map(lambda leaf: leaf[:probe_pairs], held_out) if probe_pairs else None
    stage = program.program.stage
    rate = jnp.asarray(stage.optimizer.learning_rate, jnp.float32)

    def evaluate(state: TrainState) -> dict[str, jax.Array]:
        return program.diagnose(state.params, eval_, eval_train, rate, state.memory)

    stream = data.pair_batches(pairs.train, stage.batch_size, int(identity["seed"]))
    batches = training.MappedBatches(stream, lambda batch, index: PreferenceExamples(batch, by_index[index]))

    def step(state: TrainState, batch: Any) -> Any:
        return program.program.step(state, batch, probe)

    identity = {"kind": "preference", **identity}
    return _finish(folder, identity, program.program, start, batches, step, tracker, evaluate, pairs.train.sources)


class TrialRun(NamedTuple):
    """One trial as its program takes it.

    Attributes:
      folder: its run folder.
      start: the SFT model, which is its reference; the same object where trials share one.
      seed: of the order of the batches.
      tracker: makes the mirror of the run.
    """

    folder: RunFolder
    start: Params
    seed: int
    tracker: Callable[[], training.Tracker] = training.NoTracker


def prefer_trials(
    runs: Sequence[TrialRun], program: TrialsProgram, pairs: PreferenceData, *, probe_pairs: int
) -> list[TrainState | NonFiniteError]:
    """Preference optimisation of many trials in one program, each in a run folder of its own; see ``prefer``.

    Args:
      runs: as many as the program has numbers for, in their order.
      program: see trials_program.
      pairs: both splits.
      probe_pairs: as in ``prefer``.

    Returns:
      Final states, or what stopped a trial.

    Raises:
      UserError: another process trains in one of the folders.
    """
    train, held_out = (PairBatch(jnp.asarray(s.tokens), jnp.asarray(s.completion_mask)) for s in pairs)
    count, stage = min(len(held_out.tokens), len(train.tokens)), program.stage
    sharding = training.trials.trial_sharding(program.mesh)
    starts = {id(run.start): run.start for run in runs}
    scored = {
        key: [np.asarray(program.score(start, split)) for split in (train, held_out)] for key, start in starts.items()
    }
    of_train, of_held_out = zip(*(scored[id(run.start)] for run in runs), strict=True)

    def stack(parts: Sequence[Any]) -> Any:
        return jax.device_put(training.trials.stacked(parts, program.devices), sharding)

    references = (stack(of_held_out), stack([reference[:count] for reference in of_train]))
    numbers = stack([training.trials.trial(program.numbers, place) for place in range(len(runs))])
    probe = jax.tree.map(lambda leaf: leaf[:probe_pairs], held_out) if probe_pairs else None
    seen = jax.tree.map(lambda leaf: leaf[:count], train)

    def step(state: TrainState, batch: Any) -> Any:
        return program.step(probe, numbers, state, batch)

    def evaluate(state: TrainState) -> dict[str, jax.Array]:
        return program.diagnose((held_out, seen), numbers, state.params, references, state.memory)

    def batches(seed: int, reference: np.ndarray) -> training.Batches:
        stream = data.pair_batches(pairs.train, stage.batch_size, seed)
        return training.MappedBatches(stream, lambda batch, index: PreferenceExamples(batch, reference[index]))

    return training.train_trials(
        [run.folder for run in runs],
        [
            training.init_state(run.start, program.tx, memory(run.start))
            for run, memory in zip(runs, program.memories, strict=True)
        ],
        step,
        [batches(run.seed, reference) for run, reference in zip(runs, of_train, strict=True)],
        stage,
        evaluate=evaluate,
        trackers=[run.tracker for run in runs],
        label=f"preference, {len(runs)} {'trial' if len(runs) == 1 else 'trials'}",
        sources=pairs.train.sources,
        mesh=program.mesh,
    )


def memory_of_step(program: TrialsProgram, start: Params, pairs: PreferenceData, count: int, probe_pairs: int) -> int:
    """Bytes that a step of so many trials takes on each device: its arguments, its results and what lies between.

    Args:
      program: of as many trials.
      start: parameters of one.
      pairs: both splits.
      count: number of trials.
      probe_pairs: as in ``prefer``.
    """
    count += -count % program.devices

    def many(leaf: Any, sharding: Sharding | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *jnp.shape(leaf)), jnp.result_type(leaf), sharding=sharding)

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        return many(leaf, training.trials.trial_sharding(program.mesh))

    def rows(number: int) -> PairBatch:
        tokens, mask = (jax.ShapeDtypeStruct((number, *x.shape[1:]), x.dtype) for x in pairs.train[:2])
        return PairBatch(tokens, mask)  # type: ignore[arg-type]

    state = jax.eval_shape(lambda start: training.init_state(start, program.tx, program.memories[0](start)), start)
    size = program.stage.batch_size
    examples = PreferenceExamples(rows(size), jax.ShapeDtypeStruct((size, 2), jnp.float32))  # type: ignore[arg-type]
    probe = rows(probe_pairs) if probe_pairs else None
    numbers = training.trials.trial(program.numbers, 0)
    numbers, state = jax.tree.map(placed, (numbers, state))
    lowered = program.step.lower(probe, numbers, state, jax.tree.map(many, examples))  # as prefer_trials will call it
    found = lowered.compile().memory_analysis()
    return int(found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes)


def _reference(
    program: PreferenceProgram, start: Params, splits: Mapping[str, PairBatch], cache: ReferenceFile | None
) -> dict[str, np.ndarray]:
    """Split -> ``[N, 2]`` log-probabilities under the reference, out of the cache where they are there."""
    done = "read from"

    def compute() -> dict[str, np.ndarray]:
        nonlocal done
        done = "computed and written to"
        return {name: np.asarray(program.score(start, pairs)) for name, pairs in splits.items()}

    if cache is None:
        return compute()
    counts = {name: len(pairs.tokens) for name, pairs in splits.items()}
    found = training.reference_log_probs(cache.path, cache.fingerprint, counts, compute)
    print(f"reference log-probabilities {done} {cache.path}")
    return found
