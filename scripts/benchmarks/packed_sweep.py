"""A sweep over objectives and seeds in one program, against the same trials one process each.

Every process is the experiment's own command, from its start to its end: imports, data, compilation, training, evaluations,
checkpoints; of the sweep the last one to end draws the figures, on both sides. The base and SFT models that trials share
are made before, and given to all sides. The reported loss is the mean of all trials' last training losses; every trial's
own is compared between the sides.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from entangle import training
from experiments import margin_objectives
from experiments.margin_objectives import MarginObjectivesConfig
from experiments.pairs.pair_config import identity
from experiments.sweep import plan, trial_runs
from experiments.sweep.trial_runs import STARTS
from scripts.benchmarks.measuring import Contender, DisagreementError

TOLERANCE = 1e-4
"""Of a trial's last training loss, relative to its size: a hundred steps apart, rounded differently."""
AT_ONCE = 2
"""Processes at a time on the other side."""


def prepare(folder: Path, *, cache: bool = False) -> tuple[Contender, ...]:
    """The contenders on the laptop preset.

    Args:
      folder: for everything that is written.
      cache: whether each side's processes share a compilation cache, empty at first.
    """
    return contenders(margin_objectives.presets()["laptop"], [], folder, cache=cache)


def prepare_cached(folder: Path) -> tuple[Contender, ...]:
    """The contenders with a compilation cache."""
    return prepare(folder, cache=True)


def contenders(
    settings: MarginObjectivesConfig, flags: list[str], folder: Path, *, cache: bool = False
) -> tuple[Contender, ...]:
    """The contenders: in one program; a process each, two at a time, which on two cores is faster than in turn.

    Args:
      settings: what the flags give.
      flags: of the experiment's command, beside where it writes.
      folder: for everything that is written.
      cache: see ``prepare``.
    """
    trial = dataclasses.replace(settings.trial, data_dir=folder / "tfds")
    trials = plan(trial, margin_objectives.sweep(settings), identity)
    trial_runs.prepare(folder / "made", trials, lambda folder, config: training.NoTracker())
    expected: dict[str, float] = {}

    def contender(name: str, go: Callable[[list[str], dict[str, str]], None]) -> Contender:
        def run() -> float:
            out = folder / name
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(folder / f"{name} cache", ignore_errors=True)
            shutil.copytree(folder / "made" / STARTS, out / STARTS)
            shutil.copy(_config(folder, settings), out / "config.json")
            command = [sys.executable, "-m", "experiments.margin_objectives", "--no-track", "--out", str(out)]
            command += [*flags, "--trial.data-dir", str(trial.data_dir)]
            go(command, _environment(folder / f"{name} cache" if cache else None))
            found = {path.parent.name: _last_loss(path) for path in (out / "trials").glob("*/done.json")}
            if len(found) != len(trials):
                raise DisagreementError(f"{name}: {len(found)} of {len(trials)} trials are done")
            for key, loss in found.items():
                if abs(loss - expected.setdefault(key, loss)) > TOLERANCE * max(1.0, abs(loss)):
                    raise DisagreementError(f"{key}: last loss {loss:.9g} under {name}, {expected[key]:.9g} before")
            return sum(found.values()) / len(found)

        return Contender(name, run)

    parts = [f"{place}/{len(trials)}" for place in range(1, len(trials) + 1)]

    def processes(command: list[str], environment: dict[str, str]) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda part: _run([*command, "--part", part], environment), parts))

    return contender("one program", _run), contender("a process each", processes)


def _config(folder: Path, settings: MarginObjectivesConfig) -> Path:
    """The sweep folder's own file, without which a folder with models in it would be refused."""
    file = folder / "config.json"
    content = {"kind": margin_objectives.KIND, "base": identity(settings.trial)}
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def _environment(cache: Path | None) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    if cache is not None:
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    return environment


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


def _last_loss(done: Path) -> float:
    return float(json.loads(done.read_text(encoding="utf-8"))["metrics"]["loss"])
