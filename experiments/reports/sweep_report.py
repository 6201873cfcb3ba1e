"""report.md of a sweep: its claims with verdicts, one row a group of trials, every trial, figures, and where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from entangle.training.run_folder import read_json, write_text
from experiments.reports.claims import Verdict
from experiments.reports.preference_report import provenance
from experiments.reports.run_tables import pair_lines, spread
from experiments.reports.sweep_figures import coefficient_ratio
from experiments.reports.sweep_tables import Group, Sweep
from experiments.sweep import summary
from experiments.sweep.trials import PAIRS, TRIALS

COLUMNS = {
    "log_prob/chosen": "chosen",
    "log_prob/rejected": "rejected",
    "margin": "margin",
    "accuracy": "accuracy",
    "geometry/cosine": "cosine",
    "case/ideal": "ideal",
}
CHANGES = ("log_prob/chosen", "log_prob/rejected", "margin")


def write(
    out: Path,
    sweep: Sweep,
    title: str,
    verdicts: Sequence[Verdict],
    pictures: Sequence[Path],
    notes: str = "",
    sections: Sequence[str] = (),
) -> Path:
    """Write ``report.md`` into the sweep's folder.

    Args:
      out: the folder.
      sweep: what ``read_sweep`` made of it.
      title: of the report.
      verdicts: on the experiment's claims.
      pictures: its figures, PNG files below ``out``.
      notes: what a reader of the verdicts has to know.
      sections: the experiment's own, before the table of its settings.

    Returns:
      The file.
    """
    parts = [_head(sweep, title), _claims(verdicts, notes), *sections, _groups(sweep), _pictures(out, pictures)]
    trained_in = sorted(path.parent for path in out.glob(f"{TRIALS}/*/environment.json"))
    parts += [_failed(sweep), _data(out), _trials(out), provenance(out, trained_in=trained_in)]
    file = out / "report.md"
    write_text(file, "\n\n".join(filter(None, parts)) + "\n")
    return file


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; a bar inside of a cell does not end it.

    Example:
      >>> from experiments.reports.sweep_report import table
      >>> print(table(["a", "b"], [["|g|", 1]]))
      | a | b |
      |---|---|
      | \\|g\\| | 1 |
    """
    lines = [header, *rows]
    said = [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    ]
    return "\n".join([said[0], "|---" * len(header) + "|", *said[1:]])


def _head(sweep: Sweep, title: str) -> str:
    base = sweep.base
    stage, sft = base["preference"], base["sft"]
    count = sum(len(group.seeds) for group in sweep.groups.values())
    first = (
        f"after {sft['steps']} steps of SFT at {sft['optimizer']['learning_rate']:g}"
        if base["sft_first"]
        else "from the base model itself"
    )
    still = f" {len(sweep.open)} trials are not over and not in it." if sweep.open else ""
    usual = "".join(
        f"{'combination' if name == 'pair_chain' else name} {Path(base[name]).name}, "
        for name in ("model", "data", "objective", "pair_chain")
        if any(group.config[name] == base[name] for group in sweep.groups.values())
    )
    return (
        f"# {title}\n\n"
        f"{count} trials of {len(sweep.groups)} settings; what a setting is called is what it differs in from others. Unless "
        f"it says so: {usual}{stage['steps']} steps of {stage['batch_size']} pairs, {_rates(sweep)}, {first}.{still}\n\n"
        "Values are the mean over seeds and, in brackets, the smallest and largest seed. Log-probabilities are means over the "
        'held-out pairs, in nats; changes are last evaluation minus first. "Shown" means in every seed.'
    )


def _rates(sweep: Sweep) -> str:
    """Every optimizer with the learning rates that it has in the sweep: a label leaves out what follows from the rest."""
    rates: dict[str, set[float]] = {}
    for group in sweep.groups.values():
        optimizer = group.config["preference"]["optimizer"]
        rates.setdefault(optimizer["name"], set()).add(optimizer["learning_rate"])
    return ", ".join(f"{name} at {' or '.join(f'{rate:g}' for rate in sorted(found))}" for name, found in rates.items())


def _claims(verdicts: Sequence[Verdict], notes: str) -> str:
    if not verdicts:
        return f"## Claims\n\n{notes or 'None is judged.'}"
    shown = sum(verdict.verdict.startswith("shown") for verdict in verdicts)
    judged = sum(verdict.verdict != "not judged" for verdict in verdicts)
    others = f"; {len(verdicts) - judged} not judged" if judged < len(verdicts) else ""
    rows = [(v.claim, v.where, v.verdict, v.numbers) for v in verdicts]
    parts = [
        "## Claims",
        f"{shown} of {judged} judged are shown{others}.",
        notes,
        table(["claim", "where", "verdict", "numbers"], rows),
    ]
    return "\n\n".join(filter(None, parts))


def _groups(sweep: Sweep) -> str:
    rows = [_group(label, group) for label, group in sweep.groups.items()]
    header = [
        "setting",
        "learning rate",
        "chosen",
        "rejected",
        "margin",
        "accuracy",
        "d_w / d_l",
        "cosine",
        "ideal pairs",
    ]
    text = (
        "Change of the held-out log-probabilities and of their margin; accuracy at the end, the share of pairs whose chosen "
        "response gained more on the reference; ratio of the mean coefficients, cosine and share of ideal pairs, first to "
        "last evaluation."
    )
    return f"## Settings\n\n{text}\n\n{table(header, rows)}"


def _group(label: str, group: Group) -> list[str]:
    def two(values: np.ndarray, form: str) -> str:
        first, last = values[:, 0].mean(), values[:, -1].mean()
        return " to ".join(f"{value:{form}}" if np.isfinite(value) else "none" for value in (first, last))

    return [
        label,
        f"{group.config['preference']['optimizer']['learning_rate']:g}",
        *(spread(group.change(f"eval/{name}")) for name in CHANGES),
        f"{group.last('eval/accuracy').mean():.0%}",
        two(coefficient_ratio(group).values, ".2f"),
        two(group.curve("eval/geometry/cosine").values, "+.2f"),
        two(group.curve("eval/case/ideal").values, ".0%"),
    ]


def _pictures(out: Path, pictures: Sequence[Path]) -> str:
    shown = [f"![{picture.stem}]({picture.relative_to(out)})" for picture in pictures]
    return "\n\n".join(["## Figures", *shown])


def _failed(sweep: Sweep) -> str:
    if not sweep.failed:
        return ""
    text = "Not in any number above; `--retry-failed` begins them again."
    return f"## Failed trials\n\n{text}\n\n{table(['trial', 'reason'], sweep.failed)}"


def _data(out: Path) -> str:
    """What became of the pairs, where the sweep's folder tells it."""
    found = read_json(out / PAIRS) if (out / PAIRS).exists() else {}
    lines = pair_lines(found.values())
    return "\n".join(["## Data", "", *dict.fromkeys(lines)]) if lines else ""


def _trials(out: Path) -> str:
    found = summary.rows(out)
    fields = [name for name in found[0] if ":" not in name and name not in ("reason",)]
    rows = []
    for row in found:
        cells = [f"{row[name]:g}" if isinstance(row[name], float) else row[name] for name in fields]
        for metric in COLUMNS:
            first, last = (row.get(f"{when}:eval/{metric}", "") for when in ("first", "last"))
            known = first != "" and last != ""
            value = (last - first if metric in CHANGES else last) if known else ""
            cells.append(f"{value:+.4f}" if known and metric in CHANGES else f"{value:.4f}" if known else "")
        rows.append(cells)
    header = [*fields, *(f"{said} change" if m in CHANGES else f"{said} at the end" for m, said in COLUMNS.items())]
    text = f"One row a trial; every number of its first and last evaluation is in `{summary.FILE}`."
    return f"## Trials\n\n{text}\n\n{table(header, rows)}"
