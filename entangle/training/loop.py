"""The only training loop: batches in, steps, evaluations, metrics and checkpoints out; resumable at any moment."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from tqdm import tqdm

from entangle import distributed
from entangle.errors import NonFiniteError, PreemptedError, UserError
from entangle.training import trials
from entangle.training.checkpoints import Checkpoints
from entangle.training.preemption import Preemption
from entangle.training.run_folder import RunFolder
from entangle.training.stage import StageConfig
from entangle.training.step import StepFn, StepResult, TrainState
from entangle.training.streams import Batches
from entangle.training.tracking import NoTracker, Tracker


class _Layout(NamedTuple):
    """How the runs' trees become what the step takes, and how one run's part is taken out of what it returns."""

    join: Callable[[Sequence[Any]], Any]
    part: Callable[[Any, int], Any]
    sharding: Sharding | None = None

    def placed(self, state: TrainState) -> TrainState:
        """The state where it will lie after the first step, too: else the second step would be compiled again."""
        return jax.device_put(state, self.sharding or jax.tree.map(lambda leaf: jnp.asarray(leaf).sharding, state))


_ALONE = _Layout(lambda trees: trees[0], lambda tree, place: tree)


@dataclasses.dataclass
class _Run:
    """One run: its folder, its stream, and how it stands."""

    folder: RunFolder
    checkpoints: Checkpoints
    tracker: Tracker
    batches: Batches
    last: dict[str, float] = dataclasses.field(default_factory=dict)
    error: NonFiniteError | None = None

    def write(self, records: list[dict[str, Any]]) -> None:
        if records:
            self.folder.append(records)
        for record in records:
            self.tracker.log(record["step"], {k: v for k, v in record.items() if k != "step"})

    def last_good(self) -> str:
        last = self.checkpoints.latest
        return (
            f"last good checkpoint: {self.checkpoints.folder / str(last)}" if last is not None else "no checkpoint yet"
        )

    def mark_done(self, steps: int) -> None:
        if not distributed.is_writer():
            return
        evaluations = [r for r in self.folder.metrics() if "loss" not in r]
        summary = {"step": steps, "metrics": self.last or _last_metrics(self.folder)}
        if evaluations:
            summary |= {"first": evaluations[0], "last": evaluations[-1]}
        self.folder.mark_done(summary)


class _Pending(NamedTuple):
    step: int
    examples: list[np.ndarray]
    result: StepResult


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _refuse_not_finite(
    step: int, found: StepResult, index: np.ndarray, run: _Run, sources: Sequence[str] | None
) -> dict[str, float]:
    metrics = _scalars(found.metrics)
    bad = [name for name in ("loss", "update_norm") if not math.isfinite(metrics.get(name, 0.0))]
    if not bad:
        return metrics
    rows = np.flatnonzero(~np.isfinite(np.asarray(found.losses)))
    # of the whole batch; processes that hold the same rows name them twice
    index = np.asarray(list(dict.fromkeys(i for part in distributed.gathered(index.tolist()) for i in part)))
    culprits = ", ".join(f"{i} ({sources[i]})" if sources else str(i) for i in (index[rows] if rows.size else index))
    whose = "examples" if rows.size else "no single loss is to blame; examples of the batch:"
    raise NonFiniteError(f"step {step}: {' and '.join(bad)} not finite; {whose} {culprits}; {run.last_good()}")


class _Recorder:
    """Holds the steps' results on the device until they are written together, so that steps do not wait for the host."""

    def __init__(self, runs: Sequence[_Run], layout: _Layout, sources: Sequence[str] | None = None):
        self.runs, self.layout, self.sources = runs, layout, sources
        self.pending: list[_Pending] = []
        self.since = time.perf_counter()

    def flush(self) -> None:
        jax.block_until_ready([p.result for p in self.pending])
        seconds = (time.perf_counter() - self.since) / max(1, len(self.pending))
        pending = [p._replace(result=distributed.to_host(p.result)) for p in self.pending]
        self.pending = []
        for place, run in self.alive():
            records: list[dict[str, Any]] = []
            with self.stopping(run):
                try:
                    for p in pending:
                        result = self.layout.part(p.result, place)
                        run.last = _refuse_not_finite(p.step, result, np.asarray(p.examples[place]), run, self.sources)
                        records.append({"step": p.step, **run.last, "seconds": round(seconds, 6)})
                finally:
                    run.write(records)
        self.since = time.perf_counter()

    def evaluation(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        every = distributed.to_host(dict(metrics))
        for place, run in self.alive():
            with self.stopping(run):
                found = _scalars(self.layout.part(every, place))
                if bad := [name for name, value in found.items() if not math.isfinite(value)]:
                    names = ", ".join(bad[:3])
                    raise NonFiniteError(f"step {step}: {names} not finite in the evaluation; {run.last_good()}")
                run.write([{"step": step, **found}])
        self.since = time.perf_counter()

    def save(self, step: int, state: TrainState) -> None:
        # taken to the host once: one array after another would be cut on the device for every run
        every = state if self.layout is _ALONE else jax.device_get(state)
        for place, run in self.alive():
            run.checkpoints.save(step, self.layout.part(every, place), run.batches.get_state())

    def alive(self) -> list[tuple[int, _Run]]:
        return [(place, run) for place, run in enumerate(self.runs) if run.error is None]

    @contextlib.contextmanager
    def stopping(self, run: _Run) -> Iterator[None]:
        """A run alone ends in its error; one of several leaves the others to go on."""
        try:
            yield
        except NonFiniteError as error:
            if self.layout is _ALONE:
                raise
            run.error = error


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
    and metrics are bitwise the same. SIGTERM, with which clusters announce that they take a machine away, ends it at the
    next step with a checkpoint.

    Of several processes (see ``distributed.initialize``) all call this with the same run; their states and batches are
    global arrays (``sharding.born_sharded``, ``global_rows``).

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
      UserError: another process is training in this folder, the run has gone more steps than are wanted, or it is done and
        its last checkpoint is missing or of another number of steps.
      NonFiniteError: a loss, an update or an evaluation is not finite; the step, the examples and the last good
        checkpoint are named.
      PreemptedError: SIGTERM came.

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
    (end,) = _train([run], [state], [batches], [tracker], step_fn, stage, evaluate, label, sources, _ALONE)
    assert not isinstance(end, NonFiniteError)
    return end


def train_trials(
    runs: Sequence[RunFolder],
    states: Sequence[TrainState],
    step_fn: StepFn,
    batches: Sequence[Batches],
    stage: StageConfig,
    *,
    evaluate: Callable[[TrainState], Mapping[str, jax.Array]] | None = None,
    trackers: Sequence[Callable[[], Tracker]] | None = None,
    label: str = "",
    sources: Sequence[str] | None = None,
    mesh: Mesh | None = None,
) -> list[TrainState | NonFiniteError]:
    """Train several runs in one program, each as ``train`` would: with a folder, metrics and checkpoints of its own.

    A run that is not finite stops, and the others go on. Killed at any moment, every run goes on from its own latest
    checkpoint, with these or other runs or alone.

    Args:
      runs: K run folders.
      states: their states at step 0.
      step_fn: the jitted step of stacked states and batches, leaves ``[K, ...]``: see ``map_trials``.
      batches: one stream a run, as in ``train``.
      stage: how long, how often.
      evaluate: stacked state to stacked metrics, ``[K]`` each.
      trackers: make the mirrors of the metrics.
      label: what the progress bar says.
      sources: where each example came from, by index.
      mesh: the one that the step's ``map_trials`` has; the last trial is repeated until its devices have as many each.

    Returns:
      Final states, on the host, or what stopped a run.

    Raises:
      UserError: as in ``train``.
      ValueError: the runs' latest checkpoints are of different steps.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, numpy as np
      >>> from entangle import data, training
      >>> stage = training.StageConfig(steps=3, batch_size=2, optimizer=training.OptimizerConfig("sgd", 1.0))
      >>> unigram = lambda params, tokens: jax.nn.log_softmax(params)[tokens]
      >>> def step(rate, state, batch):
      ...     tx = stage.optimizer.build(stage.steps, learning_rate=rate)
      ...     schedule = stage.optimizer.schedule(stage.steps, learning_rate=rate)
      ...     return training.make_step(training.likelihood_gradients(unigram), tx, schedule)(state, batch)
      >>> rates, mapped = jnp.array([0.1, 1.0]), training.map_trials(lambda _, *own: step(*own))
      >>> stacked_step = jax.jit(lambda states, batches: mapped((), rates, states, batches))
      >>> def stream():
      ...     text = data.text_batches(np.array([0, 1] * 8, np.int32), stage.batch_size, length=2, seed=0)
      ...     return training.MappedBatches(text, lambda t, _: training.TokenBatch(t, t > 0))
      >>> runs = [training.RunFolder(tempfile.mkdtemp(), {"trial": trial}) for trial in range(2)]
      >>> start = training.init_state(jnp.zeros(2), stage.optimizer.build(stage.steps))
      >>> slow, fast = training.train_trials(runs, [start] * 2, stacked_step, [stream(), stream()], stage)
      >>> bool(fast.params[1] > slow.params[1]), [run.done for run in runs]
      (True, [True, True])
    """
    devices = 1 if mesh is None else mesh.shape[trials.AXIS]
    layout = _Layout(functools.partial(trials.stacked, multiple=devices), trials.trial, trials.trial_sharding(mesh))
    mirrors = trackers or [NoTracker] * len(runs)
    return _train(runs, states, batches, mirrors, step_fn, stage, evaluate, label, sources, layout)


def _train(
    folders: Sequence[RunFolder],
    states: Sequence[TrainState],
    batches: Sequence[Batches],
    trackers: Sequence[Callable[[], Tracker]],
    step_fn: StepFn,
    stage: StageConfig,
    evaluate: Callable[[TrainState], Mapping[str, jax.Array]] | None,
    label: str,
    sources: Sequence[str] | None,
    layout: _Layout,
) -> list[TrainState | NonFiniteError]:
    ends: list[TrainState | NonFiniteError] = list(states)
    with contextlib.ExitStack() as stack:
        runs: dict[int, _Run] = {}
        for place, folder in enumerate(folders):
            stack.enter_context(folder.locked())
            checkpoints = Checkpoints(folder.path / "checkpoints")
            stack.callback(checkpoints.close)
            checkpoints.tidy()
            if distributed.from_writer(lambda folder=folder: folder.done):  # type: ignore[misc]
                ends[place] = _end_of_done(folder, checkpoints, states[place], stage)
                continue
            tracker = trackers[place]() if distributed.is_writer() else NoTracker()
            stack.callback(tracker.close)
            run = runs[place] = _Run(folder, checkpoints, tracker, batches[place])
            if checkpoints.latest is not None:
                ends[place], position = checkpoints.restore(states[place])
                _refuse_longer(folder, ends[place], stage)
                run.batches.set_state(position)
            if layout is not _ALONE:  # of many only the stacked states are on the devices
                ends[place] = jax.device_get(ends[place])
        begun = [ends[place] for place in runs]
        if not begun:
            return ends
        if len({int(state.step) for state in begun}) > 1:  # type: ignore[union-attr]
            raise ValueError("runs of one program begin at one step")
        state = layout.placed(layout.join(begun))
        recorder = _Recorder(list(runs.values()), layout, sources)
        for run in recorder.runs:
            # step 0 has an evaluation, which is made again too
            run.folder.rewind(int(begun[0].step) or -1)  # type: ignore[union-attr]
        state = _steps(state, int(begun[0].step), step_fn, stage, evaluate, recorder, label)  # type: ignore[union-attr]
        if layout is not _ALONE:
            state = jax.device_get(state)
        for order, (place, run) in enumerate(runs.items()):
            ends[place] = run.error or layout.part(state, order)
            if run.error is None:
                run.mark_done(stage.steps)
    return ends


def _refuse_longer(folder: RunFolder, state: Any, stage: StageConfig) -> None:
    if int(state.step) > stage.steps:
        raise UserError(f"{folder.path}: the run has gone {int(state.step)} steps, more than the {stage.steps} wanted")


def _end_of_done(folder: RunFolder, checkpoints: Checkpoints, like: TrainState, stage: StageConfig) -> TrainState:
    state, _ = checkpoints.restore(like)
    if int(state.step) != stage.steps:
        raise UserError(f"{folder.path}: the run is done after {int(state.step)} steps, not {stage.steps}")
    return state


def _steps(
    state: TrainState,
    start: int,
    step_fn: StepFn,
    stage: StageConfig,
    evaluate: Callable[[TrainState], Mapping[str, jax.Array]] | None,
    recorder: _Recorder,
    label: str,
) -> TrainState:
    def due(step: int, every: int) -> bool:
        return bool(every) and (step % every == 0 or step == stage.steps)

    def look(step: int) -> None:
        if evaluate is not None and due(step, stage.eval_every):
            recorder.evaluation(step, evaluate(state))

    if start == 0:
        look(0)
    silent = not distributed.is_writer()
    with (
        Preemption() as preemption,
        tqdm(total=stage.steps, initial=start, desc=label, dynamic_ncols=True, mininterval=0.5, disable=silent) as bar,
    ):
        for step in range(start + 1, stage.steps + 1):
            batches, index = zip(*(next(run.batches) for run in recorder.runs), strict=True)
            state, result = step_fn(state, recorder.layout.join(batches))
            recorder.pending.append(_Pending(step, list(index), result))
            if any(due(step, every) for every in (stage.log_every, stage.eval_every, stage.checkpoint_every)):
                recorder.flush()
                bar.set_postfix(loss=f"{np.mean([run.last.get('loss', math.nan) for run in recorder.runs]):.3f}")
                look(step)
            if due(step, stage.checkpoint_every):
                recorder.save(step, state)
            bar.update()
            if not recorder.alive():
                break
            if preemption.reached(step):
                recorder.flush()
                recorder.save(step, state)
                raise PreemptedError(
                    f"SIGTERM: saved at step {step} of {stage.steps}; the same command goes on from there"
                )
    return state


def _last_metrics(run: RunFolder) -> dict[str, float]:
    records = [r for r in run.metrics() if "loss" in r]
    return {k: v for k, v in records[-1].items() if k not in ("step", "seconds")} if records else {}
