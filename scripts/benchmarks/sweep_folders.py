"""What a large sweep costs where nothing is left to train: its summary from the folders, and its command again."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from entangle.training import write_json
from experiments import margin_objectives
from experiments.pairs.pair_config import identity
from experiments.sweep import folder_of, plan, summary
from scripts.benchmarks.measuring import Contender

SUMMARISED, RESUMED = 10_000, 1_000
METRICS = 41
"""Numbers of an evaluation."""


def prepare_summary(folder: Path) -> tuple[Contender, ...]:
    """The summary of 10,000 finished run folders."""
    out = fabricate(folder / "sweep", SUMMARISED)

    def run() -> float:
        with summary.write(out).open(encoding="utf-8") as file:
            return float(sum(row["status"] == "done" for row in csv.DictReader(file)))

    return (Contender("summary", run),)


def prepare_resume(folder: Path) -> tuple[Contender, ...]:
    """The command of a finished sweep of 1,000 trials, a process from its start to its end."""
    out = fabricate(folder / "sweep", RESUMED)
    words = ["--no-track", "--out", str(out), *_flags(RESUMED)]
    command = [sys.executable, "-m", "experiments.margin_objectives", *words]

    def run() -> float:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(f"{RESUMED} trials, 0 to run" in done.stdout)

    return (Contender("resume", run),)


def fabricate(out: Path, count: int) -> Path:
    """A sweep's folder as it is when all of its trials have ended, without metrics and checkpoints."""
    preset = margin_objectives.presets()["laptop"]
    settings = dataclasses.replace(preset, seeds=count // len(preset.objectives))
    out.mkdir(parents=True)
    write_json(out / "config.json", {"kind": margin_objectives.KIND, "base": identity(settings.trial)})
    look = {f"eval/metric_{number}": number / 7 for number in range(METRICS)}
    done = {"step": 100, "metrics": look, "first": {"step": 0, **look}, "last": {"step": 100, **look}}
    for trial in plan(settings.trial, margin_objectives.sweep(settings), identity):
        folder = folder_of(out, trial)
        folder.mkdir(parents=True)
        # as write_json does, without its fsync
        config = {"kind": "preference", "trial": identity(trial.config), "pairs": "0" * 64, "start": "0" * 64}
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        (folder / "done.json").write_text(json.dumps(done, indent=2), encoding="utf-8")
    (out / "report.md").write_text("# made\n", encoding="utf-8")
    write_json(out / "done.json", {"files": ["report.md"]})
    return out


def _flags(count: int) -> list[str]:
    return ["--seeds", str(count // len(margin_objectives.presets()["laptop"].objectives))]
