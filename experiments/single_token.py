"""When does the chosen log-probability of single_token rise? Learning rate, length of SFT, SGD against AdamW.

Claim: a pair that differs in its one token is the ideal case, so its chosen log-probability rises (arXiv 2410.13828,
Figure 3). For the pair alone, a plain gradient step and two tokens that share all the probability it must; for held-out
pairs, a batch and AdamW it need not.

Command: ``python -m experiments.single_token --data FOLDER --model BASE/huggingface --out DIR``, where BASE is the ``base``
folder of a sentiment experiment.
Hardware and time: two CPU cores: about two minutes a run, eighteen runs.
Result: experiments/results/single_token/single_token.md (three seeds): on held-out pairs it ends below its start in every run;
on training pairs it rises for a while under SGD after a short SFT. The larger the step, the larger its share of the rejected
one's fall.
Output: ``single_token.csv`` and ``single_token.md``, one row a variant: changes from the first to the last evaluation and
highest evaluation above the first, in nats; accuracy, cosine and share of ideal pairs at the end, on held-out pairs; and
``report.html``, the same table as a page.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from entangle import command_line, losses, training
from entangle.errors import UserError
from entangle.training import RunFolder
from entangle.training.run_folder import CONFIG, read_json
from experiments import figures
from experiments.pairs import pair_runs, programs, stages
from experiments.pairs.pair_config import NOT_EVALUATED, identity
from experiments.pairs.sentiment_config import SentimentConfig
from experiments.pairs.sentiment_config import presets as sentiment_presets
from experiments.pairs.sentiment_data import gather
from experiments.reports.run_tables import curve, read_seeds, spread

PAIR_SET = "single_token"
LEGEND = (
    "Changes from the first to the last evaluation in nats, and the highest evaluation above the first; accuracy, cosine and "
    "share of ideal pairs at the end, on held-out pairs. Mean over seeds (smallest to largest)."
)
UNUSED = (
    *("sets", "vocab_size", "base", "sft.steps", "preference.optimizer.name", "preference.optimizer.learning_rate"),
    "changes",
)
COLUMNS = (
    ("held-out chosen", "eval/log_prob/chosen"),
    ("held-out rejected", "eval/log_prob/rejected"),
    ("training chosen", "eval_train/log_prob/chosen"),
    ("training rejected", "eval_train/log_prob/rejected"),
)


class Variant(NamedTuple):
    """One setting of the sweep.

    Attributes:
      sft_steps: steps of SFT before.
      optimizer: of the preference stage.
      learning_rate: of the preference stage.
    """

    sft_steps: int
    optimizer: str
    learning_rate: float

    @property
    def name(self) -> str:
        """Folder name."""
        return f"sft{self.sft_steps}-{self.optimizer}-{self.learning_rate:g}"


def sweep() -> Iterator[Variant]:
    """A short and the default length of SFT; after each, SGD, AdamW at a tenth of the default rate, and at that rate.

    Example:
      >>> from experiments.single_token import sweep
      >>> next(sweep()).name
      'sft25-sgd-0.01'
    """
    for steps in (25, 100):
        for optimizer, learning_rate in (("sgd", 0.01), ("adamw", 2e-6), ("adamw", 2e-5)):
            yield Variant(steps, optimizer, learning_rate)


def presets() -> dict[str, SentimentConfig]:
    """Those of the sentiment experiment, with this module's pair set and output folder."""
    changed = {"out": Path("runs/single_token"), "sets": (PAIR_SET,)}
    return {name: dataclasses.replace(preset, **changed) for name, preset in sentiment_presets().items()}  # type: ignore[arg-type]


def run(settings: SentimentConfig) -> list[Path]:
    """Run every variant and seed that is not done yet, and write the table.

    Returns:
      The files: the table as CSV, in Markdown and as a page.

    Raises:
      UserError: bad input; the base model must be a checkpoint folder.
    """
    materials = gather(settings)
    if materials.checkpoint is None:
        raise UserError(f"--model {settings.model}: name the checkpoint folder of a base model")
    RunFolder(settings.out, {"kind": "single_token", **identity(settings)})
    pairs, tracker = materials.pairs[PAIR_SET], pair_runs.trackers(settings)
    objective = losses.get_objective(settings.objective, **settings.objective_args)
    for variant in sweep():
        sft_stage = dataclasses.replace(settings.sft, steps=variant.sft_steps)
        sft = programs.likelihood_program(materials.model, sft_stage)
        moved = {"name": variant.optimizer, "learning_rate": variant.learning_rate}
        optimizer = dataclasses.replace(settings.preference.optimizer, **moved)  # type: ignore[arg-type]
        stage = dataclasses.replace(settings.preference, optimizer=optimizer)
        program = programs.preference_program(
            materials.model,
            stage,
            objective,
            training.pair_chain(settings.pair_chain, **settings.pair_chain_args),
            with_geometry=False,
            changes=False,
            eval_batch=settings.eval_batch,
        )
        for seed in range(settings.seeds):
            supervised, preferred = pair_runs.identities(settings, PAIR_SET, pairs, seed)
            folder = settings.out / f"sft{variant.sft_steps}" / f"seed{seed}"
            start = stages.supervise(
                folder, materials.model, sft, materials.checkpoint, pairs.train, supervised, tracker
            )
            folder = settings.out / variant.name / f"seed{seed}"
            stages.prefer(folder, program, start, pairs, preferred, tracker, probe_pairs=settings.probe_pairs)
    return figures.redraw(settings.out)


def redraw(out: Path) -> list[Path]:
    """Write ``single_token.csv`` and ``single_token.md`` from the run folders alone.

    Args:
      out: the experiment's folder.

    Returns:
      The files.

    Raises:
      UserError: a run has not ended, or a file cannot be read; nothing has been overwritten.
    """
    seeds = read_json(out / CONFIG)["seeds"]
    rows = [_row(out, variant, seeds) for variant in sweep()]
    with (out / "single_token.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [LEGEND, "", "| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    (out / "single_token.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [out / "single_token.csv", out / "single_token.md"]


def _row(out: Path, variant: Variant, seeds: int) -> dict[str, object]:
    records = read_seeds(out / variant.name, seeds)
    row: dict[str, object] = {
        "SFT steps": variant.sft_steps,
        "optimizer": variant.optimizer,
        "learning rate": variant.learning_rate,
    }
    for title, metric in COLUMNS:
        found = curve(records, metric)
        row[title] = spread(found.change())
    for title, split in (("held-out", "eval"), ("training", "eval_train")):
        chosen = curve(records, f"{split}/log_prob/chosen").values
        row[f"highest {title} chosen"] = spread((chosen - chosen[:, :1]).max(1))
    for title, metric in (
        ("accuracy", "eval/accuracy"),
        ("cosine", "eval/geometry/cosine"),
        ("ideal", "eval/case/ideal"),
    ):
        row[title] = spread(curve(records, metric).values[:, -1], signed=False)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: ``python -m experiments.single_token --help``."""
    settings = command_line.parse(presets(), arguments, description=(__doc__ or "").split("\n")[0])
    command_line.refuse_unused(settings, presets()[settings.preset], UNUSED, "this study sets it itself")
    why = "this study computes its references anew"
    command_line.refuse_unused(settings, presets()[settings.preset], ("reference_cache",), why)
    command_line.refuse_unused(settings, presets()[settings.preset], *NOT_EVALUATED)
    files = run(settings)
    print(next(file for file in files if file.suffix == ".md").read_text(encoding="utf-8"))
    command_line.name_files(files)


if __name__ == "__main__":
    command_line.run(main)
