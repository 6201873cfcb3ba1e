"""Any preference file: SFT and preference optimisation from a checkpoint, with the pair geometry at every step.

Claim: none of its own; it shows for your data and model what arXiv 2410.13828, Figures 2 and 3, show for theirs: how both
log-probabilities move, how their gradients are entangled, and which case the pairs are in.

Command: ``python -m experiments.preferences --data TRAIN.jsonl --held-out TEST.jsonl --model FOLDER --out DIR``.
Hardware and time: an accelerator for GPT-2 small and larger; the smoke preset on a million parameters took 94 s on two cores.
Result: figures (log-probabilities, cosine), their numbers as CSV, report.md and report.html in the output folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from entangle import command_line, distributed, models, sharding
from entangle.errors import UserError
from entangle.training import OptimizerConfig, StageConfig
from experiments.pairs import pair_data, pair_runs, placement, preference_files, references, stages
from experiments.pairs.pair_config import NOT_EVALUATED, PairConfig
from experiments.pairs.preference_files import PAIR_SET


@dataclasses.dataclass(frozen=True)
class PreferencesConfig(PairConfig):
    """Training on a preference file.

    Attributes:
      out: folder of the experiment; made, or continued when it holds the same configuration.
      preset: default, smoke or paper: the defaults that the other flags override.
      data: preference file, .jsonl or .jsonl.gz, one JSON object a line with prompt, chosen and rejected.
      held_out: a second file to evaluate on; without it every eighth prompt of --data is held out.
      model: local Hugging Face checkpoint folder with its tokenizer.
      sft_first: whether SFT on the chosen completions comes before, whose model is then start and reference; else the
        checkpoint itself is.
      lora: none, or low-rank adapters that alone are trained, on the frozen checkpoint: paper, attention, all, or fields such
        as rank=16,alpha=32,targets=query+value,dropout=0.05. They are left beside the run in PEFT's format.
      dtype: of the frozen checkpoint under adapters, of activations and products: float32 or bfloat16.
      chat_template: what writes chat messages out: own, the checkpoint's chat template; hh, hh-rlhf's form; auto, the first
        where the checkpoint has one.
      mesh: how the devices are laid out, sizes of data, fsdp and tensor such as data=2,fsdp=4; by default one device is
        used, and by several processes all, with fsdp. A run may go on on another one.
    """

    out: Path = Path("runs/preferences")
    data: str = ""
    held_out: str = ""
    model: str = ""
    seeds: int = 1
    max_length: int = 256
    sft: StageConfig = StageConfig(64, 16, OptimizerConfig(learning_rate=1.41e-5), checkpoint_every=64)
    preference: StageConfig = StageConfig(
        500, 16, OptimizerConfig(learning_rate=5e-6), eval_every=50, checkpoint_every=50
    )
    sft_first: Annotated[bool, tyro.conf.FlagCreatePairsOff] = True
    lora: str = "none"
    dtype: str = "float32"
    chat_template: str = "auto"
    mesh: str = ""


class Materials(NamedTuple):
    """What the runs are made from.

    Attributes:
      checkpoint: model, parameters and tokenizer.
      pairs: both splits, encoded.
      report: what became of the lines of the files and of the pairs of each split.
    """

    checkpoint: pair_data.Checkpoint
    pairs: stages.PreferenceData
    report: dict[str, list[str]]


def presets() -> dict[str, PreferencesConfig]:
    """The named defaults.

    ``default`` has the learning rates and batch sizes of arXiv 2410.13828 for GPT-2 sized models and larger (one epoch is
    the data's affair: ``--preference.steps``); ``paper`` is its setting for Figures 1 and 2 (adapters on the instruction-tuned
    models of 7 and 8 billion parameters in bfloat16, 16 pairs a step, 2048 held-out pairs every 200 steps); ``smoke`` makes
    ten steps, to see that all is in place.

    Example:
      >>> from experiments.preferences import presets
      >>> list(presets())
      ['default', 'smoke', 'paper']
    """
    default = PreferencesConfig()
    smoke = dataclasses.replace(
        default,
        preset="smoke",
        max_length=128,
        train_pairs=256,
        held_out_pairs=16,
        probe_pairs=8,
        sft=dataclasses.replace(default.sft, steps=8, batch_size=8),
        preference=dataclasses.replace(default.preference, steps=10, batch_size=8, eval_every=5),
    )
    paper = dataclasses.replace(
        default,
        preset="paper",
        lora="paper",
        dtype="bfloat16",
        sft_first=False,
        max_length=512,
        train_pairs=10**6,
        held_out_pairs=2048,
        preference=dataclasses.replace(default.preference, steps=5000, eval_every=200, checkpoint_every=200),
    )
    return {preset.preset: preset for preset in (default, smoke, paper)}


def gather(settings: PreferencesConfig, place: placement.Placement = placement.FIRST_DEVICE) -> Materials:
    """Read, check and encode everything that a wrong flag or file can spoil, before anything is written.

    Args:
      settings: the configuration.
      place: where the parameters are to lie.

    Raises:
      UserError: bad input.
    """
    pair_data.check(settings)
    for name, what in (
        ("data", "a preference file (.jsonl or .jsonl.gz)"),
        ("model", "a Hugging Face checkpoint folder"),
    ):
        if not getattr(settings, name):
            raise UserError(f"name {what} with --{name}")
    lora = models.lora_config(settings.lora)
    if settings.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {settings.dtype}: choose from float32, bfloat16")
    if lora is None and settings.dtype != "float32":
        raise UserError(f"--dtype {settings.dtype}: parameters that are trained are float32; give adapters with --lora")
    template = preference_files.chat_template(settings.chat_template, settings.model)
    checkpoint = (
        pair_data.load_checkpoint(settings, settings.model, place)
        if lora is None
        else pair_data.with_adapters(settings, settings.model, lora, settings.dtype, place)
    )
    chat = settings.chat_template == "own"
    records = preference_files.read_records(settings.data, settings.held_out, template, chat=chat)
    trained = ("sft", "preference") if settings.sft_first else ("preference",)
    pairs, report = preference_files.encode_records(settings, checkpoint.tokenizer, records, trained)
    model = pair_data.with_head(settings, checkpoint.model, [pairs])
    return Materials(checkpoint._replace(model=model), pairs, report)


def run(settings: PreferencesConfig) -> list[Path]:
    """Run or continue the whole experiment, and draw its figures.

    Returns:
      What a reader wants: figures, report, and the folders of adapters or of checkpoints.

    Raises:
      UserError: bad input; nothing has been overwritten.
      NonFiniteError: see ``training.train``.
    """
    where = placement.place(settings.mesh)
    if where.mesh is not None:
        for stage in ("sft", "preference") if settings.sft_first else ("preference",):
            sharding.check_pairs(where.mesh, getattr(settings, stage).batch_size, f"--{stage}.batch-size")
    checkpoint, pairs, lines = distributed.writer_first(lambda: gather(settings, where))
    # from here on all processes compute together
    checkpoint = checkpoint._replace(params=where.host(checkpoint.params))
    references.check(settings, checkpoint, {PAIR_SET: pairs}, sft_first=settings.sft_first)
    experiment = pair_runs.open_folder(settings, PAIR_SET, {PAIR_SET: pairs}, {PAIR_SET: lines})
    tracker = pair_runs.trackers(settings)
    left = pair_runs.run_all(
        settings, checkpoint, {PAIR_SET: pairs}, tracker, sft_first=settings.sft_first, place=where
    )
    return [*pair_runs.write_up(experiment), *left]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: ``python -m experiments.preferences --help``."""
    settings = command_line.parse(presets(), arguments, description=(__doc__ or "").split("\n")[0])
    distributed.initialize()
    command_line.say_where(settings.out)
    if not settings.sft_first:
        command_line.refuse_unused(settings, presets()[settings.preset], ("sft",), "--no-sft-first leaves SFT out")
    command_line.refuse_unused(settings, presets()[settings.preset], *NOT_EVALUATED)
    command_line.name_files(run(settings))


if __name__ == "__main__":
    command_line.run(main)
