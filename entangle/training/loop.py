"""The only training loop: batches in, steps, evaluations, metrics and checkpoints out; resumable at any moment."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from entangle.errors import NonFiniteError, UserError
from entangle.training.checkpoints import Checkpoints
from entangle.training.run_folder import RunFolder
from entangle.training.stage import StageConfig
from entangle.training.step import StepFn, StepResult, TrainState
from entangle.training.streams import Batches
from entangle.training.tracking import NoTracker, Tracker
from entangle.types import Params


@dataclasses.dataclass
class _Pending:
    step: int
    index: np.ndarray
    result: StepResult


def _scalars(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _check_finite(pending: _Pending, checkpoints: Checkpoints, sources: Sequence[str] | None) -> None:
    metrics = _scalars(pending.result.metrics)
    bad = [name for name in ("loss", "update_norm") if not math.isfinite(metrics.get(name, 0.0))]
    if not bad:
        return
    rows = np.flatnonzero(~np.isfinite(np.asarray(pending.result.losses)))
    index = np.asarray(pending.index)
    culprits = ", ".join(f"{i} ({sources[i]})" if sources else str(i) for i in (index[rows] if rows.size else index))
    whose = "examples" if rows.size else "no single loss is to blame; examples of the batch:"
    names = " and ".join(bad)
    raise NonFiniteError(f"step {pending.step}: {names} not finite; {whose} {culprits}; {_last_good(checkpoints)}")


def _last_good(checkpoints: Checkpoints) -> str:
    last = checkpoints.latest
    return f"last good checkpoint: {checkpoints.folder / str(last)}" if last is not None else "no checkpoint yet"


class _Recorder:
    """Holds the steps' results on the device until they are written together, so that steps do not wait for the host."""

    def __init__(
        self, run: RunFolder, checkpoints: Checkpoints, tracker: Tracker, sources: Sequence[str] | None = None
    ):
        self.sources = sources
        self.run, self.checkpoints, self.tracker = run, checkpoints, tracker
        self.pending: list[_Pending] = []
        self.last: dict[str, float] = {}
        self.since = time.perf_counter()

    def flush(self) -> None:
        records = []
        jax.block_until_ready([p.result for p in self.pending])
        seconds = (time.perf_counter() - self.since) / max(1, len(self.pending))
        try:
            for pending in self.pending:
                _check_finite(pending, self.checkpoints, self.sources)
                self.last = _scalars(pending.result.metrics)
                records.append({"step": pending.step, **self.last, "seconds": round(seconds, 6)})
        finally:
            self.write(records)
            self.pending = []

    def write(self, records: list[dict[str, Any]]) -> None:
        if records:
            self.run.append(records)
        for record in records:
            self.tracker.log(record["step"], {k: v for k, v in record.items() if k != "step"})
        self.since = time.perf_counter()


def train(
    run: RunFolder,
    state: TrainState,
    step_fn: StepFn,
    batches: Batches,
    stage: StageConfig,
    *,
    evaluate: Callable[[TrainState], Mapping[str, jax.Array]] | None = None,
    tracker: Callable[[], Tracker] = NoTracker,
    label: str = "",
    sources: Sequence[str] | None = None,
) -> TrainState:
    """Train to the last step, from the latest checkpoint of the run folder if it has one.

    Killed at any moment and started again, the run goes on as if it had never stopped: on one machine the parameters
    and metrics are bitwise the same.

    Args:
      run: the run folder.
      state: state at step 0.
      step_fn: the jitted step.
      batches: stream of (batch, example indices), as it is before the first step: a new one for every call.
      stage: how long, how often.
      evaluate: state to metrics (scalars); logged as they are named, ``eval/...`` by custom.
      tracker: makes the mirror of the metrics, once the folder is this process's own; closed at the end.
      label: what the progress bar says.
      sources: where each example came from, by index, e.g. "train.jsonl:17"; errors then say so.

    Returns:
      The final state.

    Raises:
      UserError: another process is training in this folder, or the run is done and its last checkpoint is missing or of
        another number of steps.
      NonFiniteError: a loss, an update or an evaluation is not finite; the step, the examples and the last good
        checkpoint are named.

    Example:
      >>> import tempfile, jax.numpy as jnp, numpy as np
      >>> from entangle import data, training
      >>> stage = training.StageConfig(steps=3, batch_size=2, optimizer=training.OptimizerConfig("sgd", 1.0))
      >>> tx = stage.optimizer.build(stage.steps)
      >>> unigram = lambda params, tokens: jax.nn.log_softmax(params)[tokens]
      >>> step = training.make_step(training.likelihood_gradients(unigram), tx, stage.optimizer.schedule(stage.steps))
      >>> stream = data.text_batches(np.array([0, 1] * 8, np.int32), stage.batch_size, length=2, seed=0)
      >>> batches = training.MappedBatches(stream, lambda t, _: training.TokenBatch(jnp.asarray(t), jnp.asarray(t) > 0))
      >>> run = training.RunFolder(tempfile.mkdtemp(), {"seed": 0})
      >>> state = training.train(run, training.init_state(jnp.zeros(2), tx), step, batches, stage)
      >>> int(state.step), [record["step"] for record in run.metrics()], run.done
      (3, [1, 2, 3], True)
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.locked())
        checkpoints = Checkpoints(run.path / "checkpoints")
        stack.callback(checkpoints.close)
        if run.done:
            state, _ = checkpoints.restore(state)
            if int(state.step) != stage.steps:
                raise UserError(f"{run.path}: the run is done after {int(state.step)} steps, not {stage.steps}")
            return state
        recorder = _Recorder(run, checkpoints, tracker(), sources)
        stack.callback(recorder.tracker.close)
        if checkpoints.latest is not None:
            state, position = checkpoints.restore(state)
            batches.set_state(position)
        run.rewind(int(state.step) or -1)  # step 0 has an evaluation, which is made again too
        state = _steps(state, step_fn, batches, stage, evaluate, recorder, label)
        run.mark_done({"step": stage.steps, "metrics": recorder.last or _last_metrics(run)})
    return state


def _steps(
    state: TrainState,
    step_fn: StepFn,
    batches: Batches,
    stage: StageConfig,
    evaluate: Callable[[TrainState], Mapping[str, jax.Array]] | None,
    recorder: _Recorder,
    label: str,
) -> TrainState:
    start = int(state.step)

    def due(step: int, every: int) -> bool:
        return bool(every) and (step % every == 0 or step == stage.steps)

    def look(step: int) -> None:
        if evaluate is not None and due(step, stage.eval_every):
            found = _scalars(evaluate(state))
            if bad := [name for name, value in found.items() if not math.isfinite(value)]:
                good = _last_good(recorder.checkpoints)
                raise NonFiniteError(f"step {step}: {', '.join(bad[:3])} not finite in the evaluation; {good}")
            recorder.write([{"step": step, **found}])

    if start == 0:
        look(0)
    with tqdm(total=stage.steps, initial=start, desc=label, dynamic_ncols=True, mininterval=0.5) as bar:
        for step in range(start + 1, stage.steps + 1):
            batch, index = next(batches)
            state, result = step_fn(state, batch)
            recorder.pending.append(_Pending(step, index, result))
            if any(due(step, every) for every in (stage.log_every, stage.eval_every, stage.checkpoint_every)):
                recorder.flush()
                bar.set_postfix(loss=f"{recorder.last.get('loss', math.nan):.3f}")
                look(step)
            if due(step, stage.checkpoint_every):
                recorder.checkpoints.save(step, state, batches.get_state())
            bar.update()
    return state


def _last_metrics(run: RunFolder) -> dict[str, float]:
    records = [r for r in run.metrics() if "loss" in r]
    return {k: v for k, v in records[-1].items() if k not in ("step", "seconds")} if records else {}


def final_params(folder: Path, like: TrainState) -> Params:
    """Parameters of a run's latest checkpoint.

    Args:
      folder: the run folder.
      like: a state (arrays or shapes) of the same structure.

    Raises:
      UserError: there is no checkpoint, or it does not fit.
    """
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        return checkpoints.restore(like)[0].params
    finally:
        checkpoints.close()
