"""Draws the figures and writes the reports of finished experiments again, from their run folders alone.

Command: ``python -m experiments.figures RUNS [RUNS ...]``: each is an experiment's folder, or one with such folders below it.
Nothing is trained, no device taken, no data or model read; what the experiment itself drew at its end is drawn again.
Output: in each experiment's folder its figures, their numbers as CSV, its report in Markdown, and ``report.html``.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from entangle import command_line
from entangle.errors import UserError
from entangle.training.run_folder import CONFIG, read_json
from experiments.reports import page

REDRAW: Mapping[str, str] = MappingProxyType(
    {
        "sentiment": "experiments.reports.preference_report:redraw",
        "preferences": "experiments.reports.preference_report:redraw",
        "unlearning": "experiments.reports.unlearning_report:redraw",
        "single_token": "experiments.single_token:redraw",
        "one_step": "experiments.reports.one_step_report:redraw",
        "margin_objectives": "experiments.reports.margin_report:redraw",
        "remedies": "experiments.reports.remedies_report:redraw",
        "scale": "experiments.reports.scale_report:redraw",
        "layerwise": "experiments.reports.layerwise_report:redraw",
        "token_overlap": "experiments.reports.token_overlap_report:redraw",
        "theory": "experiments.theory:redraw",
    }
)
"""Kind of experiment, as config.json has it -> ``module:function``, which takes the experiment's folder, writes figures and
report from the runs in it alone, and returns the files that a reader wants; the report is its one Markdown file."""


def check_kind(kind: str) -> None:
    """Refuse a kind of experiment that nothing draws, before it is trained.

    Raises:
      UserError: it is.

    Example:
      >>> from experiments.figures import check_kind
      >>> check_kind("mine")
      Traceback (most recent call last):
      entangle.errors.UserError: no figures are known for kind 'mine' (known: ...); name what draws it in REDRAW of
      experiments/figures.py
    """
    if kind not in REDRAW:
        raise UserError(
            f"no figures are known for kind {kind!r} (known: {', '.join(REDRAW)}); name what draws it in REDRAW of "
            "experiments/figures.py"
        )


def redraw(out: Path) -> list[Path]:
    """Draw an experiment's figures, write its report, and make the page of it.

    Args:
      out: the experiment's folder.

    Returns:
      The files that a reader wants: figures, report and page.

    Raises:
      UserError: it is no experiment's folder, or has no finished runs.

    Example:
      >>> from pathlib import Path
      >>> from experiments.figures import redraw
      >>> redraw(Path("nowhere"))
      Traceback (most recent call last):
      entangle.errors.UserError: nowhere/config.json is missing
    """
    entry = _entry(out)
    if entry is None:
        raise UserError(f"{out}: no experiment's folder")
    module, function = entry.split(":")
    files: list[Path] = getattr(importlib.import_module(module), function)(out)
    report = next(file for file in files if file.suffix == ".md")
    return [*files, page.write_page(out, report.name)]


def find(runs: Path) -> list[Path]:
    """The experiments in a folder: itself, or those anywhere below it; of what they hold nothing is looked at.

    Args:
      runs: the folder.

    Raises:
      UserError: there is none, one is of an unknown kind, or a configuration cannot be read.

    Example:
      >>> import pathlib, tempfile
      >>> from experiments.figures import find
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> (folder / "mine").mkdir()
      >>> (folder / "mine" / "config.json").write_text('{"kind": "sentiment"}')
      21
      >>> [found.name for found in find(folder)]
      ['mine']
    """
    found = []
    for path, folders, files in os.walk(runs):
        folders.sort()
        if CONFIG in files and _entry(Path(path)) is not None:
            found.append(Path(path))
            folders.clear()
    if not found:
        raise UserError(f"{runs}: no experiment's folder, and none below it")
    return found


def _entry(folder: Path) -> str | None:
    """What ``REDRAW`` has for the folder's kind; None where its config.json is of another sort, as in a model's folder."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or "kind" not in config:
        return None
    if config["kind"] not in REDRAW:
        raise UserError(f"{folder}: no figures are known for kind {config['kind']!r} (known: {', '.join(REDRAW)})")
    return REDRAW[config["kind"]]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: ``python -m experiments.figures --help``."""
    parser = argparse.ArgumentParser("python -m experiments.figures", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUNS", help="an experiment's folder, or one with such folders below it"
    )
    found = [out for runs in parser.parse_args(arguments).runs for out in find(runs)]
    for out in {out.resolve(): out for out in found}.values():
        command_line.name_files(redraw(out))


if __name__ == "__main__":
    command_line.run(main)
