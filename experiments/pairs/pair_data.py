"""What experiments on preference pairs are made from: checked and encoded before anything is written."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from entangle import data, losses, models, sharding, training
from entangle.data import PreferenceRecord
from entangle.errors import UserError
from entangle.training import StageConfig
from entangle.types import Params
from experiments.pairs import stages
from experiments.pairs.pair_config import PairConfig, PairSettings
from experiments.pairs.placement import Placement


class Checkpoint(NamedTuple):
    """A model with its tokenizer.

    Attributes:
      model: the policy.
      params: its trained parameters.
      tokenizer: the one that its tokens come from.
      frozen: its other parameters, where they lie in training; none but under adapters.
      folder: the checkpoint folder that it was read from, if there is one.
    """

    model: models.LanguageModel
    params: Params
    tokenizer: data.Tokenizer
    frozen: Params = MappingProxyType({})
    folder: str = ""


def check(settings: PairSettings) -> None:
    """Refuse flags that cannot work, before any data is read.

    Raises:
      UserError: the objective, its hyperparameters, the pair chain or a number.

    Example:
      >>> from experiments.pairs.pair_config import PairConfig, PairSettings
      >>> from experiments.pairs.pair_data import check
      >>> check(PairConfig(seeds=0))
      Traceback (most recent call last):
      entangle.errors.UserError: --seeds 0: at least one is needed
    """
    losses.get_objective(settings.objective, **settings.objective_args)
    training.pair_chain(settings.pair_chain, **settings.pair_chain_args)
    counts = ("eval_batch", "head_chunk", "max_length", "train_pairs", "held_out_pairs")
    for name in ("seeds", *counts) if isinstance(settings, PairConfig) else counts:
        if getattr(settings, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: at least one is needed")
    if settings.preference.eval_every < 1:
        raise UserError("--preference.eval-every 0: the figures are drawn from the evaluations")
    if not 0 <= settings.probe_pairs <= settings.held_out_pairs:
        raise UserError(f"--probe-pairs {settings.probe_pairs}: from 0 to the {settings.held_out_pairs} held-out pairs")


def check_size(stage: str, config: StageConfig, count: int, what: str) -> None:
    """Refuse a batch that is larger than what there is to train on.

    Raises:
      UserError: it is.

    Example:
      >>> from entangle.training import StageConfig
      >>> from experiments.pairs.pair_data import check_size
      >>> check_size("sft", StageConfig(1, 8), 4, "training pairs")
      Traceback (most recent call last):
      entangle.errors.UserError: --sft.batch-size 8: there are only 4 training pairs
    """
    if count < config.batch_size:
        raise UserError(f"--{stage}.batch-size {config.batch_size}: there are only {count} {what}")


def check_length(settings: PairSettings, name: str, shape: models.DecoderConfig) -> None:
    """Refuse rows that are longer than the model reaches.

    Raises:
      UserError: they are.
    """
    if settings.max_length > shape.max_positions:
        raise UserError(
            f"--max-length {settings.max_length}: model {name} has {shape.max_positions} positions; "
            f"give --max-length {shape.max_positions} or less"
        )


def load_checkpoint(settings: PairSettings, folder: str, place: Placement | None = None) -> Checkpoint:
    """Read a Hugging Face checkpoint folder with its tokenizer.

    Args:
      settings: the configuration.
      folder: see ``models.load_pretrained``.
      place: where it is trained; its layers are then scanned, for a run to go on anywhere else. On a mesh every device reads
        its own part, so that none ever holds the whole model, and the backward computes layers again, as ``entangle.plan``
        has it. None leaves layers as they are, on the first device.

    Raises:
      UserError: a file is missing or broken, another architecture, a tokenizer or rows that do not fit the model; the mesh
        does not divide it.
    """
    if place is None:
        shape, params = models.load_pretrained(folder)
    else:
        shape, params = _scanned(folder, place, remat="none" if place.mesh is None else "full")
    tokenizer = _tokenizer(settings, folder, shape)
    return Checkpoint(models.language_model(shape), params, tokenizer, folder=folder)


def _scanned(folder: str, place: Placement, **options: str) -> tuple[models.DecoderConfig, Params]:
    shardings = None if place.mesh is None else functools.partial(_shardings, place.mesh)
    return models.load_pretrained(folder, shardings=shardings, scan_layers=True, **options)


def _tokenizer(settings: PairSettings, folder: str, shape: models.DecoderConfig) -> data.Tokenizer:
    tokenizer = data.load_tokenizer(folder)
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {shape.vocab_size}")
    check_length(settings, folder, shape)
    return tokenizer


def with_adapters(
    settings: PairSettings, folder: str, lora: models.LoraConfig, dtype: str, place: Placement
) -> Checkpoint:
    """Read a checkpoint folder as a frozen base, every device its own part, with new adapters on it.

    Args:
      settings: the configuration.
      folder: see :func:`load_checkpoint`.
      lora: the adapters.
      dtype: of the base, and of activations and products; adapters are float32.
      place: where the base lies.

    Raises:
      UserError: as :func:`load_checkpoint`; an adapter's target is no matrix of this model; the mesh does not divide it.
    """
    shape, base = _scanned(folder, place, dtype=dtype, remat="full", compute_dtype=dtype)
    tokenizer = _tokenizer(settings, folder, shape)
    model = models.language_model(dataclasses.replace(shape, lora=lora))
    adapters = jax.jit(lambda key: models.split_params(model.init(key))[0])(jax.random.key(0))
    return Checkpoint(model, jax.device_get(adapters), tokenizer, base, folder)


def _shardings(mesh: Mesh, config: models.DecoderConfig, shapes: Params) -> Params:
    return sharding.shardings(shapes, mesh)


def with_head(
    settings: PairSettings, model: models.LanguageModel, pairs: Iterable[stages.PreferenceData]
) -> models.LanguageModel:
    """A model whose head is that of ``--head-chunk``, for all completions of these pairs.

    Example:
      >>> import numpy as np
      >>> from entangle import data, models
      >>> from experiments.pairs import stages
      >>> from experiments.pairs.pair_config import PairSettings
      >>> from experiments.pairs.pair_data import with_head
      >>> model = models.language_model(models.preset("tiny", 300))
      >>> with_head(PairSettings(), model, []) is model  # a small vocabulary
      True
    """
    if model.config.vocab_size <= settings.head_chunk:
        return model
    masks = [split.completion_mask for both in pairs for split in both]
    longest = max((int(mask.sum(-1).max()) for mask in masks), default=None)
    return models.language_model(model.config, completion_length=longest, chunk=settings.head_chunk)


def encode(
    settings: PairSettings,
    tokenizer: data.Tokenizer,
    name: str,
    train: Sequence[PreferenceRecord],
    held_out: Sequence[PreferenceRecord],
    *,
    add_eos: bool,
    templated: bool = False,
    trained: Sequence[str] = ("sft", "preference"),
) -> tuple[stages.PreferenceData, dict[str, list[str]]]:
    """Store both splits through TFDS and encode them.

    They go into TFDS's own folder (or ``settings.data_dir``), under a name that carries their fingerprint.

    Args:
      settings: the configuration.
      tokenizer: the tokenizer.
      name: of the pair set.
      train: training pairs.
      held_out: pairs that are only looked at.
      add_eos: whether completions end with the end-of-text token.
      templated: whether a chat template wrote the texts; see ``data.encode_pairs``.
      trained: the stages that take batches of the training pairs.

    Returns:
      Both splits, and split -> lines that tell what became of its pairs.

    Raises:
      UserError: a split is empty, or smaller than what a batch or the probe needs.
    """
    records: Mapping[str, Sequence[PreferenceRecord]] = {"train": train, "held_out": held_out}
    prepared = data.prepare_pairs(name, records, settings.data_dir or tfds_folder())
    encoded, lines = {}, {}
    for split in records:
        stored = data.load_pairs(prepared, split)
        encoded[split], found = data.encode_pairs(
            stored, tokenizer, settings.max_length, add_eos=add_eos, templated=templated
        )
        lines[split] = found.lines()
    for stage in trained:
        check_size(stage, getattr(settings, stage), len(encoded["train"].tokens), "training pairs")
    count = len(encoded["held_out"].tokens)
    if count < settings.probe_pairs:
        raise UserError(
            f"--probe-pairs {settings.probe_pairs}: there are only {count} held-out pairs; give --probe-pairs {count} or fewer"
        )
    return stages.PreferenceData(**encoded), lines


def tfds_folder() -> Path:
    """TFDS's own folder: ``TFDS_DATA_DIR``, or ``tensorflow_datasets`` in the user's home."""
    return Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")
