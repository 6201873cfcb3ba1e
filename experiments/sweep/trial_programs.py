"""Preference optimisation of many trials in one program; what they differ in are numbers that the program is given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from entangle import data, losses, training
from entangle.errors import NonFiniteError
from entangle.models import LanguageModel
from entangle.training import PairChain, PreferenceExamples, RunFolder, StageConfig, TrainState
from entangle.types import PairBatch, Params
from experiments.pairs.programs import PreferenceFunctions, preference_functions
from experiments.pairs.stages import PreferenceData
from experiments.sweep import trial_masks


class Numbers(NamedTuple):
    """What trials of one program differ in; stacked along a leading axis.

    Attributes:
      choice: of the program's objectives.
      learning_rate: peak of the preference stage.
      reward_beta: scale of the logged implicit rewards.
      sparsity: weight of the L1 term on learned token masks; without these it changes nothing.
    """

    choice: losses.Choice
    learning_rate: jax.Array
    reward_beta: jax.Array
    sparsity: jax.Array


class TrialsProgram(NamedTuple):
    """Preference optimisation of many trials in one program; functions of one trial's ``Numbers`` are mapped over them.

    Attributes:
      stage: how long, how much; the learning rate is a number of each trial.
      begin: place of a trial and parameters at its start to its state.
      numbers: of the trials.
      step: jitted; probe, numbers, stacked state and batch to the same as a single step's, stacked.
      score: as in ``PreferenceProgram``, of one trial's policy.
      diagnose: jitted; held-out and training pairs, then stacked: numbers, params, both splits' references, memory.
      mesh: whose devices share the trials; None for one device.
      masks: of ``trial_masks.MASKS``.
    """

    stage: StageConfig
    begin: Callable[[int, Params], TrainState]
    numbers: Numbers
    step: Any
    score: Callable[[Params, PairBatch], jax.Array]
    diagnose: Callable[..., dict[str, jax.Array]]
    mesh: Mesh | None = None
    masks: str = "none"

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
    masks: str = "none",
    sparsities: Sequence[float] | None = None,
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
      masks: of ``trial_masks.MASKS``: the tokens that are trained on; evaluations are of all tokens. Learned ones are trained
        by DPO at the objective's beta.
      sparsities: weights of the L1 term on learned masks, one a trial.
    """
    selection = losses.Selection(objectives)
    fixed = [losses.get_objective(name, **given) for name, given in objectives]
    numbers = Numbers(
        selection.choices,
        jnp.asarray(learning_rates, jnp.float32),
        jnp.asarray([training.reward_scale(objective) for objective in fixed], jnp.float32),
        jnp.asarray(sparsities or [0.0] * len(fixed), jnp.float32),
    )

    def learned_masks(own: Numbers) -> trial_masks.Learned | None:
        if masks != "learned":
            return None
        return trial_masks.learned_masks(model, own.reward_beta, own.sparsity, chain.rule, eval_batch)

    def functions(own: Numbers) -> PreferenceFunctions:
        learned = learned_masks(own)
        return preference_functions(
            model.log_probs if learned is None else learned.log_probs,
            stage,
            selection.objective(own.choice),
            chain,
            changes=changes,
            layers=layers,
            eval_batch=eval_batch,
            learning_rate=own.learning_rate,
            reward_beta=own.reward_beta,
            gradients=None if learned is None else learned.gradients,
        )

    def step(probe: Any, own: Numbers, state: TrainState, batch: PreferenceExamples) -> Any:
        return functions(own).step(state, batch, probe)

    def diagnose(
        pairs: tuple[PairBatch, PairBatch], own: Numbers, params: Params, references: Any, memory: Any
    ) -> dict[str, jax.Array]:
        eval_, eval_train = (PreferenceExamples(p, r) for p, r in zip(pairs, references, strict=True))
        found = functions(own).diagnose(params, eval_, eval_train, own.learning_rate, memory)
        learned = learned_masks(own)
        more = {} if learned is None else learned.means(params, pairs[0])
        return found | {f"eval/{name}": value for name, value in more.items()}

    first = training.trials.trial(numbers, 0)
    tx = functions(first).tx

    def begin(place: int, start: Params) -> TrainState:
        learned = learned_masks(first)
        if learned is None:
            return training.init_state(start, tx, training.preference_memory(fixed[place], start))
        both = learned.init(start)
        return training.init_state(both, tx, training.preference_memory(fixed[place], both, training.frozen_copy()))

    def score(params: Params, pairs: PairBatch) -> jax.Array:
        return training.score_pairs(model.log_probs, params, pairs, eval_batch)

    return TrialsProgram(
        stage,
        begin,
        numbers,
        jax.jit(training.map_trials(step, mesh=mesh, side_by_side=side_by_side)),
        jax.jit(score),
        jax.jit(training.map_trials(diagnose, mesh=mesh, side_by_side=1)),
        mesh,
        masks,
    )


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
    learned_from = trial_masks.differing_tokens(pairs.train) if program.masks == "oracle" else pairs.train
    train, held_out, trained_on = (
        PairBatch(jnp.asarray(s.tokens), jnp.asarray(s.completion_mask)) for s in (*pairs, learned_from)
    )
    count, stage = min(len(held_out.tokens), len(train.tokens)), program.stage
    sharding = training.trials.trial_sharding(program.mesh)
    starts = {id(run.start): run.start for run in runs}
    seen = jax.tree.map(lambda leaf: leaf[:count], train)
    scored = {
        key: [np.asarray(program.score(start, split)) for split in (trained_on, held_out, seen)]
        for key, start in starts.items()
    }
    of_train, of_held_out, of_seen = zip(*(scored[id(run.start)] for run in runs), strict=True)

    def stack(parts: Sequence[Any]) -> Any:
        return jax.device_put(training.trials.stacked(parts, program.devices), sharding)

    references = (stack(of_held_out), stack(of_seen))
    numbers = stack([training.trials.trial(program.numbers, place) for place in range(len(runs))])
    probe = jax.tree.map(lambda leaf: leaf[:probe_pairs], held_out) if probe_pairs else None

    def step(state: TrainState, batch: Any) -> Any:
        return program.step(probe, numbers, state, batch)

    def evaluate(state: TrainState) -> dict[str, jax.Array]:
        return program.diagnose((held_out, seen), numbers, state.params, references, state.memory)

    def batches(seed: int, reference: np.ndarray) -> training.Batches:
        stream = data.pair_batches(learned_from, stage.batch_size, seed)
        return training.MappedBatches(stream, lambda batch, index: PreferenceExamples(batch, reference[index]))

    return training.train_trials(
        [run.folder for run in runs],
        [jax.device_get(program.begin(place, run.start)) for place, run in enumerate(runs)],
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

    state = jax.eval_shape(functools.partial(program.begin, 0), start)
    size = program.stage.batch_size
    examples = PreferenceExamples(rows(size), jax.ShapeDtypeStruct((size, 2), jnp.float32))  # type: ignore[arg-type]
    probe = rows(probe_pairs) if probe_pairs else None
    numbers = training.trials.trial(program.numbers, 0)
    numbers, state = jax.tree.map(placed, (numbers, state))
    lowered = program.step.lower(probe, numbers, state, jax.tree.map(many, examples))  # as prefer_trials will call it
    found = lowered.compile().memory_analysis()
    return int(found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes)
