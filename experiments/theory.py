"""The paper's Theorem 1, its corollary and Theorem 3 on the model set-ups that they are about: prediction and measurement.

Claim (arXiv 2410.13828, section 4). Set-up 1, hidden states fixed, the head trained: two single tokens are the ideal case,
with ``cos = -1/(M - 1)`` where M tokens share all the probability; so are responses equal but for their last token. Set-up 2,
the logits of every position trained: Theorem 3 says by how much each position of a pair with one differing token and a
shared suffix moves under DPO; the chosen log-probability loses linearly with the suffix, and at some length falls.

Measured are the geometry, the coefficients and the first-order changes of ``entangle``, and what one small step changes.
C is learning rate times coefficient: of DPO C = eta beta c, c the sigmoid in its gradient. The suffix is swept beyond the
paper, too: where the token is less likely in the chosen context, and under objectives of unequal coefficients.

Command: ``python -m experiments.theory --out DIR``.
Hardware and time: two CPU cores, a minute.
Result: experiments/results/theory/report.md. All that follows from the set-ups is measured to rounding. Two readings do not
follow: under an arbitrary head the corollary is about the last token, and of whole responses 10 % are not ideal; and a suffix
token that is likelier in the chosen context lowers both sides for certain only where no other token is.
Output: ``theory.csv``, a row a point; ``report.md``; ``figures/``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from entangle import command_line
from entangle.training import RunFolder
from entangle.training.run_folder import DONE, read_json
from experiments import figures
from experiments.reports import theory_figures, theory_report
from experiments.theorems import theory_rows
from experiments.theorems.theory_config import TheoryConfig, check, identity, presets
from experiments.theorems.theory_measure import measure_all
from experiments.theorems.theory_points import HEAD, RANDOM, STEPPED
from experiments.theorems.theory_setups import Point

HEAD_SCALES = (0.5, 2.0, 8.0)
SPREADS = (0.0, 0.1, 0.5, 2.0)
REPEATED = 4
"""Prefix length at which the rejected token is repeated in the prefix."""


def config() -> Point:
    """The default point, which every point of ``sweep`` overrides.

    Example:
      >>> from experiments.theory import config
      >>> config().objective
      'dpo'
    """
    return Point()


def sweep(settings: TheoryConfig | None = None) -> Iterator[dict[str, Any]]:
    """All points: fields of ``config()`` to values.

    Args:
      settings: how far; None takes the default preset.

    Example:
      >>> from experiments.theory import sweep
      >>> next(sweep())
      {'setup': 'uniform', 'vocabulary': 128, 'tokens': 2, 'seed': 0, 'bits': 64}
    """
    settings = TheoryConfig() if settings is None else settings
    for part in (_theorem_1, _corollary, _theorem_3, _toy, _steps):
        yield from part(settings)


def _theorem_1(settings: TheoryConfig) -> Iterator[dict[str, Any]]:
    vocabulary = max(HEAD["vocabulary"], *settings.tokens)
    for tokens, seed, bits in itertools.product(settings.tokens, range(settings.seeds), (64, 32)):
        yield {"setup": "uniform", "vocabulary": vocabulary, "tokens": tokens, "seed": seed, "bits": bits}
    for scale, seed in itertools.product(HEAD_SCALES, range(settings.seeds)):
        for step in (config().step, *settings.steps):
            yield {**HEAD, "prefix": 0, "scale": scale, "seed": seed, "step": step}


def _corollary(settings: TheoryConfig) -> Iterator[dict[str, Any]]:
    for scale, seed in itertools.product((0.0, 2.0), range(settings.seeds)):
        for prefix, overlap in itertools.product(settings.prefixes, settings.overlaps):
            yield {**HEAD, "scale": scale, "seed": seed, "prefix": prefix, "overlap": overlap, "position": prefix}
        prefix, overlap = max(settings.prefixes), max(settings.overlaps)
        for step in settings.steps:
            point = {**HEAD, "scale": scale, "seed": seed, "prefix": prefix, "overlap": overlap}
            yield point | {"position": prefix, "step": step}
    for repeats, seed in itertools.product(range(1, REPEATED + 1), range(settings.seeds)):
        yield {**HEAD, "scale": 0.0, "seed": seed, "prefix": REPEATED, "overlap": 0.9, "repeats": repeats}


def _theorem_3(settings: TheoryConfig) -> Iterator[dict[str, Any]]:
    for spread, seed, position in itertools.product(SPREADS, range(settings.seeds), range(5)):
        yield {**RANDOM, "spread": spread, "seed": seed, "position": position}


def _toy(settings: TheoryConfig) -> Iterator[dict[str, Any]]:
    lengths = range(settings.suffix + 1)
    for gap, suffix in itertools.product(dict.fromkeys((config().gap, *settings.gaps)), lengths):
        yield {"suffix": suffix, "gap": gap}
    for position in range(config().prefix + 3):
        yield {"suffix": 2, "position": position}
    for objective, suffix in itertools.product(settings.objectives, lengths):
        yield {"suffix": suffix, "objective": objective, "fallen": settings.fallen}


def _steps(settings: TheoryConfig) -> Iterator[dict[str, Any]]:
    for step, bits in itertools.product(settings.steps, (64, 32)):
        yield {"suffix": STEPPED, "step": step, "bits": bits}
        for seed in range(settings.seeds):
            yield {**RANDOM, "spread": SPREADS[2], "seed": seed, "step": step, "bits": bits}
            if bits == 32:  # in float64 it is in the sweep of Theorem 1
                yield {**HEAD, "prefix": 0, "scale": HEAD_SCALES[1], "seed": seed, "step": step, "bits": bits}


def run(settings: TheoryConfig) -> list[Path]:
    """Measure every point, unless that was done before, and draw the figures and write the report.

    Returns:
      The files: figures, the report and its page.

    Raises:
      UserError: bad input; nothing has been overwritten.
    """
    check(settings)
    folder = RunFolder(settings.out, {"kind": "theory", **identity(settings)})
    if folder.done:
        files = [folder.path / name for name in read_json(folder.path / DONE)["files"]]
        return files if all(file.exists() for file in files) else figures.redraw(folder.path)
    with folder.locked():
        points = dict.fromkeys(Point(**overrides) for overrides in sweep(settings))
        print(f"{len(points)} points", flush=True)
        theory_rows.write(folder.path, measure_all([dataclasses.asdict(point) for point in points]))
        files = figures.redraw(folder.path)
        folder.mark_done({"points": len(points), "files": [str(file.relative_to(folder.path)) for file in files]})
    return files


def redraw(out: Path) -> list[Path]:
    """Draw the figures and write the report from ``theory.csv`` and ``environment.json`` alone.

    Args:
      out: the study's folder.

    Returns:
      The files: figures, then the report.

    Raises:
      UserError: the folder has no measured points.
    """
    rows = theory_rows.read(out)
    return [*theory_figures.draw(out, rows), theory_report.write(out, rows)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: ``python -m experiments.theory --help``."""
    settings = command_line.parse(presets(), arguments, description=(__doc__ or "").split("\n")[0])
    command_line.say_where(settings.out)
    command_line.name_files(run(settings))


if __name__ == "__main__":
    command_line.run(main)
