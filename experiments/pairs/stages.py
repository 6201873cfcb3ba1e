"""The stages that experiments are made of: pretraining, SFT, preference optimisation; each stage is one run folder.

A program (optimizer, compiled step) is made once and serves every run of its shape: sets and seeds differ in arguments.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from entangle import data, distributed, training
from entangle.models import LanguageModel
from entangle.training import PreferenceExamples, RunFolder, TokenBatch, TrainState
from entangle.types import PairBatch, Params
from experiments.pairs.programs import PreferenceProgram, Program, row_seeds

TrackerFactory = Callable[[Path, Mapping[str, Any]], training.Tracker]


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
    seed = int(identity["seed"])
    stream = data.pair_batches(train, size, seed, place.rows(size))
    seeds = row_seeds(program.draws, (len(train.tokens),), seed)

    def chosen(pairs: PairBatch, index: np.ndarray) -> TokenBatch:
        return place.joined(TokenBatch(pairs.tokens[:, 0], pairs.completion_mask[:, 0], seeds(index)), size)

    batches = training.MappedBatches(stream, chosen)
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

    size, seed = stage.batch_size, int(identity["seed"])
    stream = data.pair_batches(pairs.train, size, seed, place.rows(size))
    seeds = row_seeds(program.program.draws, pairs.train.tokens.shape[:2], seed)

    def examples(batch: PairBatch, index: np.ndarray) -> PreferenceExamples:
        return place.joined(PreferenceExamples(batch._replace(seeds=seeds(index)), by_index[index]), size)

    batches = training.MappedBatches(stream, examples)

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
