"""report.md: what an experiment's runs show of the paper's claims, with numbers, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from entangle.training.run_folder import read_json
from experiments.reports import claims, pair_figures
from experiments.reports.run_tables import (
    PREDICTIONS,
    Runs,
    all_predictions,
    curve,
    method_label,
    pair_chain_label,
    pair_lines,
    read_runs,
    spread,
)

CASES = ("ideal", "both_fall", "both_rise", "reversed", "inactive")


def redraw(out: Path) -> list[Path]:
    """Draw the figures and write ``report.md`` of an experiment on preference pairs, from its run folders alone.

    Args:
      out: the experiment's folder.

    Returns:
      The files that a reader wants: figures and report.

    Raises:
      UserError: the folder has no finished runs, or a file in it cannot be read; nothing has been overwritten.
    """
    text(out)  # what is amiss ends here, before anything is drawn
    return [*pair_figures.draw(out), write(out)]


def write(out: Path) -> Path:
    """Write ``report.md`` into an experiment's folder; the figures that it shows are there already.

    Args:
      out: the experiment's folder.

    Returns:
      The file.

    Raises:
      UserError: see ``text``.
    """
    file = out / "report.md"
    file.write_text(text(out), encoding="utf-8")
    return file


def text(out: Path) -> str:
    """What ``report.md`` says.

    Raises:
      UserError: the folder has no finished runs, or a file in it cannot be read.
    """
    runs = read_runs(out)
    claimed = [_claims(runs, out)] if runs.config["kind"] == "sentiment" else []
    parts = [
        _head(runs),
        *claimed,
        _seen(runs),
        *([_moved(runs)] if all_predictions(runs) else []),
        _checks(runs),
        _cases(runs),
        _pictures(runs, out),
        _data(runs, out),
        provenance(out),
    ]
    return "\n\n".join(parts) + "\n"


def _head(runs: Runs) -> str:
    c = runs.config
    stage, seeds = c["preference"], c["seeds"]
    sft = f"{c['sft']['steps']} steps of SFT at {c['sft']['optimizer']['learning_rate']:g}"
    adapters = c.get("lora", "none")
    return (
        f"# {c['kind'].capitalize()} experiment: {method_label(c)} on {Path(c['data']).name}\n\n"
        f"Model {Path(c['model']).name}"
        f"{'' if adapters == 'none' else f' with low-rank adapters ({adapters}), which alone are trained and measured'}, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}, "
        f"combination of the two gradients: {pair_chain_label(c)}. Preference stage: {stage['steps']} steps of "
        f"{stage['batch_size']} pairs, {stage['optimizer']['name']} at {stage['optimizer']['learning_rate']:g}, "
        f"{f'after {sft}' if c.get('sft_first', True) else 'from the checkpoint itself'}.\n\n"
        "Values are the mean over seeds and, in brackets, the smallest and largest seed. "
        'Changes are last step minus first. "Shown" means in every seed.'
    )


def _seen(runs: Runs) -> str:
    changes = {
        "chosen": "eval/log_prob/chosen",
        "rejected": "eval/log_prob/rejected",
        "chosen on training pairs": "eval_train/log_prob/chosen",
    }
    levels = {"cosine": "eval/geometry/cosine", "condition ratio": "eval/geometry/condition_ratio"}
    rows = []
    for name, seeds in runs.records.items():
        cells = [spread(curve(seeds, metric).change()) for metric in changes.values()]
        for metric in levels.values():
            first, last = (curve(seeds, metric).values[:, place].mean() for place in (0, -1))
            cells.append(f"{first:+.2f} to {last:+.2f}")
        cells.append(f"{curve(seeds, 'eval/accuracy').values[:, -1].mean():.0%}")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    titles = ["set", *changes, *levels, "accuracy"]
    text = (
        "Held-out pairs, unless said otherwise: change of the log-probabilities in nats; cosine and condition ratio of the "
        "gradients, first to last step; accuracy at the end, the share of pairs whose chosen response gained more on the "
        "reference."
    )
    return "\n".join(
        ["## What was seen", "", text, "", "| " + " | ".join(titles) + " |", "|---" * len(titles) + "|", *rows]
    )


def _claims(runs: Runs, out: Path) -> str:
    verdicts = claims.paper_claims(runs, out)
    if verdicts and all(v.verdict == "measured" for v in verdicts):
        why = (
            "They are about DPO by plain combination, and are not judged for this run's "
            f"{method_label(runs.config)}: the numbers alone."
        )
        return "\n".join(["## Claims of arXiv 2410.13828", "", why, "", *_table("claim", verdicts)])
    shown = [v for v in verdicts if v.verdict.startswith("shown")]
    others = [f"- {v.verdict}: {v.claim}" for v in verdicts if v not in shown]
    counts = []
    for place in dict.fromkeys(v.where for v in verdicts):
        here = [v for v in verdicts if v.where == place]
        counts.append(f"{place}: {sum(v in shown for v in here)} of {len(here)} shown")
    summary = f"{'; '.join(counts)}." + (" Not shown in every seed:" if others else "")
    return "\n".join(["## Claims of arXiv 2410.13828", "", summary, "", *others, "", *_table("claim", verdicts)])


def _table(title: str, verdicts: list[claims.Verdict]) -> list[str]:
    rows = [f"| {v.claim} | {v.where} | {v.verdict} | {v.numbers} |" for v in verdicts]
    return [f"| {title} | where | this run | numbers |", "|---|---|---|---|", *rows]


def _moved(runs: Runs) -> str:
    rows = []
    for name, seeds in runs.records.items():
        for side in ("chosen", "rejected"):
            sums = [curve(seeds, f"{kind}/{side}").values.sum(1) for kind in (*PREDICTIONS, "realised")]
            rows.append(f"| {name} | {side}, nats | " + " | ".join(spread(total) for total in sums) + " |")
        shares = [curve(seeds, f"agreement/{kind}").values.mean(1) for kind in PREDICTIONS]
        cells = " | ".join(spread(share, signed=False) for share in shares)
        rows.append(f"| {name} | share of rows that move so | {cells} | |")
    text = (
        "Rows of the training batches: their mean change in nats, summed over all steps, as predicted to first order and as "
        "realised; and the share of rows, two a pair, whose realised change has the sign of the prediction. The plain steps "
        "have the optimizer's learning rate: where the optimizer scales gradients, as Adam does, compare their signs alone."
    )
    titles = ["set", "", *PREDICTIONS.values(), "realised"]
    return "\n".join(
        ["## What moved the rows", "", text, "", "| " + " | ".join(titles) + " |", "|---" * len(titles) + "|", *rows]
    )


def _checks(runs: Runs) -> str:
    verdicts = claims.checks(runs)
    rows = _table("check", verdicts) if verdicts else ["None: without `--probe-pairs` nothing is checked."]
    return "\n".join(["## Checks of this run", "", *rows])


def _data(runs: Runs, out: Path) -> str:
    rows = pair_lines([read_json(out / "pairs.json")])
    balanced = "Both labels are equally frequent in both splits. " if runs.config["kind"] == "sentiment" else ""
    text = f"{balanced}A seed varies the order of the SFT and preference batches."
    return "\n".join(["## Data", "", text, "", *rows])


def _cases(runs: Runs) -> str:
    rows = []
    for name, seeds in runs.records.items():
        shares = [curve(seeds, f"eval/case/{case}").values.mean(0) for case in CASES]
        for when, place in (("first", 0), ("last", -1)):
            rows.append(f"| {name} | {when} | " + " | ".join(f"{s[place]:.0%}" for s in shares) + " |")
    head = ["| set | step | " + " | ".join(c.replace("_", " ") for c in CASES) + " |", "|---" * 7 + "|"]
    text = "Share of held-out pairs in each case: what one plain gradient step on the pair alone would do to it"
    chain = runs.config["pair_chain"]
    text += ", with the coefficients that the rule gives it." if chain.startswith("pairwise_") else "."
    if chain != "margin" and not chain.startswith("pairwise_"):
        text += f" What {chain} makes of the batch's two gradients is not in this."
    return "\n".join(["## Cases", "", text, "", *head, *rows])


def _pictures(runs: Runs, out: Path) -> str:
    names = [name for name in pair_figures.names(runs) if (out / "figures" / f"{name}.png").exists()]
    return "\n\n".join(["## Figures", *(f"![{name}](figures/{name}.png)" for name in names)])


def provenance(
    out: Path, rows: str = "metrics.jsonl with every step of each run", trained_in: Sequence[Path] = ()
) -> str:
    """The report's last section: commit, versions, devices.

    Args:
      out: the experiment's folder.
      rows: what its folder has beside the configuration.
      trained_in: run folders whose devices are named, where other processes than the experiment's own trained.
    """
    environments = read_json(out / "environment.json")
    environment = environments[-1]
    more = f" (the last of {len(environments)} environments)" if len(environments) > 1 else ""
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    changed = " with uncommitted changes" if environment["git_changed"] else ""
    trained = [read_json(folder / "environment.json")[-1] for folder in trained_in] or [environment]
    devices = " or ".join(dict.fromkeys(", ".join(each["devices"]) for each in trained))
    return (
        "## Where this comes from\n\n"
        f"Commit {environment['git_commit']}{changed}{more}; {packages}; Python {environment['python']}; "
        f"devices {devices}. The plotted "
        f"numbers are in figures/*.csv; the run's own folder has config.json, and {rows}."
    )
