"""Running trials: base and SFT models first, then preference optimisation, many trials in one program."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from entangle import training
from entangle.errors import NonFiniteError, UserError
from entangle.models import LanguageModel
from entangle.training import RunFolder
from entangle.training.run_folder import one_at_a_time
from entangle.types import Params
from experiments.pairs import programs, stages
from experiments.pairs.base_models import base_model
from experiments.pairs.pair_config import identity
from experiments.pairs.sentiment_data import Materials
from experiments.sweep import Status, Trial, folder_of, mark_failed, status, trial_data, trial_programs, waiting
from experiments.sweep.progress import Progress
from experiments.sweep.settings import Packing
from experiments.sweep.trial_config import STARTS, TrialConfig, base_fingerprint, data_fingerprint, start_fingerprint
from experiments.sweep.trials import fingerprint

NUMBERS = ("objective", "objective_args", "seed", "sparsity")
"""Fields that are numbers of a program, beside the preference stage's learning rate."""

TrialOf = Trial[TrialConfig]


class _Ground(NamedTuple):
    """What trials on the same pairs share."""

    materials: Materials
    base: Params


def groups(out: Path, trials: Sequence[TrialOf]) -> list[list[TrialOf]]:
    """Trials that one program can serve, in the order of their first ones.

    They differ in objective, its hyperparameters, learning rate and seed alone, and begin at the same step.

    Args:
      out: the sweep's folder.
      trials: not done yet.
    """
    found: dict[str, list[TrialOf]] = {}
    for trial in trials:
        found.setdefault(_program_key(out, trial), []).append(trial)
    return list(found.values())


def prepared(out: Path, trials: Sequence[TrialOf]) -> bool:
    """Whether the base and SFT models are there that the trials start from."""
    folders = [_sft_folder(out, t.config) if t.config.sft_first else _base_folder(out, t.config) for t in trials]
    return all(status(folder) is Status.DONE for folder in folders)


def prepare(out: Path, trials: Sequence[TrialOf], tracker: stages.TrackerFactory) -> None:
    """Make the base and SFT models that the trials start from.

    Raises:
      UserError: bad input.
      NonFiniteError: see ``training.train``.
    """
    for same in _by(trials, lambda trial: data_fingerprint(trial.config)):
        _made(out, same, tracker)


def run(
    out: Path,
    trials: Sequence[TrialOf],
    tracker: stages.TrackerFactory,
    packing: Packing = Packing(),
    gathered: Mapping[str, Materials] = MappingProxyType({}),
) -> None:
    """Run or continue those of the trials that are not over, as few programs as possible.

    A trial that is not finite is marked as failed, with the reason, and the others go on; one that another process is
    training is left to it.

    Args:
      out: the sweep's folder.
      trials: its trials, or some of them.
      tracker: makes the mirror of a run.
      packing: how many trials share a program.
      gathered: data fingerprint -> what such trials are made from, as far as that has been read; the rest is read now.

    Raises:
      UserError: bad input; a folder holds another run.
    """
    left = waiting(out, trials)
    progress = Progress(out, left)
    for same in _by(left, lambda trial: data_fingerprint(trial.config)):
        ground, starts = _made(out, same, tracker, gathered)
        for group in groups(out, same):
            _run_group(out, group, ground, starts, tracker, packing, progress)


class Models(NamedTuple):
    """What a finished trial began with and ended with.

    Attributes:
      model: the policy.
      pairs: both splits.
      start: parameters of its start, which is its reference.
      end: parameters after the last step.
    """

    model: LanguageModel
    pairs: stages.PreferenceData
    start: Params
    end: Params


def finished(out: Path, trials: Sequence[TrialOf]) -> Iterator[tuple[TrialOf, Models]]:
    """The models of trials that are done, out of the sweep's folders.

    Args:
      out: the sweep's folder.
      trials: its trials that are done.

    Raises:
      UserError: bad input, or a checkpoint is gone.
    """

    def no_tracker(folder: Path, config: Mapping[str, Any]) -> training.Tracker:
        return training.NoTracker()

    for same in _by(trials, lambda trial: data_fingerprint(trial.config)):
        ground = _ground(out, same[0].config, no_tracker)
        starts = _starts(out, same, ground, no_tracker)
        for trial in same:
            program = _program([trial], ground, Packing())
            start = starts[start_fingerprint(trial.config)]
            state = program.begin(0, start)
            pairs = ground.materials.pairs[trial_data.name_of_pairs(trial.config)]
            end = training.final_params(folder_of(out, trial), state)
            end = end["policy"] if trial.config.masks == "learned" else end
            yield trial, Models(ground.materials.model, pairs, start, end)


def _run_group(
    out: Path,
    group: Sequence[TrialOf],
    ground: _Ground,
    starts: Mapping[str, Params],
    tracker: stages.TrackerFactory,
    packing: Packing,
    progress: Progress,
) -> None:
    left = list(group)
    while left:
        pack = left[: packing.most or len(left)]
        program = _program(pack, ground, packing)
        while len(pack) > 1 and (fit := _fitting(pack, program, ground, starts, packing)) < len(pack):
            pack = pack[:fit]
            program = _program(pack, ground, packing)
        left = left[len(pack) :]
        with _locked(out, pack, ground, starts, tracker) as (mine, runs):
            if not mine:
                continue
            if len(mine) < len(pack):
                program = _program(mine, ground, packing)
            config = pack[0].config
            pairs = ground.materials.pairs[trial_data.name_of_pairs(config)]
            ends = trial_programs.prefer_trials(runs, program, pairs, probe_pairs=config.probe_pairs)
            for trial, end in zip(mine, ends, strict=True):
                if isinstance(end, NonFiniteError):
                    mark_failed(folder_of(out, trial), str(end))
        progress.look()


def _program(pack: Sequence[TrialOf], ground: _Ground, packing: Packing) -> trial_programs.TrialsProgram:
    config, devices = pack[0].config, min(jax.device_count(), len(pack))
    return trial_programs.trials_program(
        ground.materials.model,
        config.preference,
        [(trial.config.objective, trial.config.objective_args) for trial in pack],
        [trial.config.preference.optimizer.learning_rate for trial in pack],
        training.pair_chain(config.pair_chain, **config.pair_chain_args),
        changes=config.changes,
        layers=config.layers,
        masks=config.masks,
        sparsities=[trial.config.sparsity for trial in pack],
        eval_batch=config.eval_batch,
        mesh=training.trial_mesh(jax.devices()[:devices]) if devices > 1 else None,
        side_by_side=packing.side_by_side or None,
    )


@contextlib.contextmanager
def _locked(
    out: Path, pack: Sequence[TrialOf], ground: _Ground, starts: Mapping[str, Params], tracker: stages.TrackerFactory
) -> Iterator[tuple[list[TrialOf], list[trial_programs.TrialRun]]]:
    """The trials that no other process trains or has ended by now, their folders locked."""
    with contextlib.ExitStack() as stack:
        mine, runs = [], []
        digests = {key: stages.digest(*jax.tree.leaves(start)) for key, start in starts.items()}
        for trial in pack:
            key = start_fingerprint(trial.config)
            config = _run_config(trial, ground, digests[key])
            folder = RunFolder(folder_of(out, trial), config)
            try:
                stack.enter_context(folder.locked())
            except UserError:
                print(f"left to another process: {trial.name}")
                continue
            if folder.done:
                continue
            mine.append(trial)
            made = _tracker(tracker, folder, config)
            runs.append(trial_programs.TrialRun(folder, starts[key], trial.config.seed, made))
        yield mine, runs


def _tracker(tracker: stages.TrackerFactory, folder: RunFolder, config: Mapping[str, Any]) -> Any:
    return lambda: tracker(folder.path, config)


def _run_config(trial: TrialOf, ground: _Ground, start: str) -> dict[str, Any]:
    name = trial_data.name_of_pairs(trial.config)
    both = ground.materials.pairs[name]
    return {
        "kind": "preference",
        "trial": identity(trial.config),
        "parameters": ground.materials.model.config.parameters,
        "pairs": stages.digest(*both.train[:2], *both.held_out[:2]),
        "start": start,
    }


def _fitting(
    pack: Sequence[TrialOf],
    program: trial_programs.TrialsProgram,
    ground: _Ground,
    starts: Mapping[str, Params],
    packing: Packing,
) -> int:
    """How many of the pack's trials fit into memory, by what the compiler says of the step."""
    budget = int(packing.memory_gib * 2**30) or memory()
    if not budget:
        return len(pack)
    config = pack[0].config
    pairs = ground.materials.pairs[trial_data.name_of_pairs(config)]
    start = starts[start_fingerprint(config)]
    needed = trial_programs.memory_of_step(program, start, pairs, len(pack), config.probe_pairs)
    return len(pack) if needed <= budget else max(1, int(len(pack) * budget / needed))


def memory() -> int:
    """Bytes that a program may take on a device; 0 where that cannot be known.

    Of a host, which processes share, as much as is available to all of them now.
    """
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(0.9 * stats["bytes_limit"])
    # virtual devices of one host share its memory
    return int(0.6 * min(filter(None, (_available(), _allowed())), default=0)) // jax.local_device_count()


def _available() -> int:
    """Bytes of the host that can be had without swapping: what is free, and caches that can be dropped."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)


def _allowed() -> int:
    """Bytes that this process's control group leaves it; 0 without a limit."""
    try:
        most, now = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        return max(0, int(most) - int(now))
    except (OSError, ValueError):  # no control groups, or "max"
        return 0


def _made(
    out: Path,
    trials: Sequence[TrialOf],
    tracker: stages.TrackerFactory,
    gathered: Mapping[str, Materials] = MappingProxyType({}),
) -> tuple[_Ground, dict[str, Params]]:
    """What trials on the same pairs start from; made by the first process that comes, others wait for it."""
    ground = _ground(out, trials[0].config, tracker, gathered)
    return ground, _starts(out, trials, ground, tracker)


def _base_folder(out: Path, config: TrialConfig) -> Path:
    return out / STARTS / f"base-{base_fingerprint(config)}"


def _sft_folder(out: Path, config: TrialConfig) -> Path:
    return out / STARTS / f"sft-seed{config.seed}-{start_fingerprint(config)}"


def _ground(
    out: Path,
    config: TrialConfig,
    tracker: stages.TrackerFactory,
    gathered: Mapping[str, Materials] = MappingProxyType({}),
) -> _Ground:
    materials = gathered.get(data_fingerprint(config)) or trial_data.gather(config)
    with one_at_a_time(out / STARTS):
        base = base_model(_base_folder(out, config), config.base, config.max_length, materials, tracker)
    return _Ground(materials, base)


def _starts(out: Path, trials: Sequence[TrialOf], ground: _Ground, tracker: stages.TrackerFactory) -> dict[str, Params]:
    """Start fingerprint -> SFT model, or the base model itself."""
    found: dict[str, Params] = {}
    made: dict[Any, programs.Program] = {}
    for trial in trials:
        config, key = trial.config, start_fingerprint(trial.config)
        if key in found:
            continue
        if not config.sft_first:
            found[key] = ground.base
            continue
        if config.sft not in made:
            made[config.sft] = programs.likelihood_program(ground.materials.model, config.sft)
        name = trial_data.name_of_pairs(config)
        both = ground.materials.pairs[name]
        told = {"pair_set": name, "seed": config.seed, "data": stages.digest(*both.train[:2])}
        with one_at_a_time(out / STARTS):
            tuned = stages.supervise(
                _sft_folder(out, config),
                ground.materials.model,
                made[config.sft],
                ground.base,
                both.train,
                told,
                tracker,
            )
        found[key] = jax.device_get(tuned)  # one a seed: devices are left to the trials
    return found


def _program_key(out: Path, trial: TrialOf) -> str:
    config = trial.config
    same = {name: value for name, value in identity(config).items() if name not in NUMBERS}
    same["preference"] = dataclasses.asdict(config.preference)
    same["preference"]["optimizer"].pop("learning_rate")
    if trial_data.remembers(config):
        same["objective"] = [config.objective, config.objective_args]
    return fingerprint(same | {"begins": _latest(folder_of(out, trial))})


def _latest(folder: Path) -> int:
    """Step of the latest checkpoint, 0 without one."""
    checkpoints = folder / "checkpoints"
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def _by(trials: Sequence[TrialOf], key: Any) -> list[list[TrialOf]]:
    found: dict[str, list[TrialOf]] = {}
    for trial in trials:
        found.setdefault(key(trial), []).append(trial)
    return list(found.values())
