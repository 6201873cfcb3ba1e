"""What an experiment leaves for others to use: checkpoint folders, and adapters as PEFT reads them."""

from __future__ import annotations

import shutil
from pathlib import Path

from entangle import data, models
from entangle.types import Params
from experiments.pairs.pair_data import Checkpoint

CHECKPOINT, ADAPTERS = "huggingface", "adapter"
"""Names of the folders that are left beside or in a run's."""
_BESIDE_WEIGHTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def leave_checkpoint(
    folder: Path, config: models.DecoderConfig, params: Params, tokenizer: data.Tokenizer, source: str = ""
) -> Path:
    """Write a checkpoint folder that ``transformers`` and ``--model`` read; what is there already stays.

    Args:
      folder: where.
      config: the decoder.
      params: its parameters.
      tokenizer: its tokenizer.
      source: the checkpoint folder that the model began as: its tokenizer's files and chat template are copied.

    Returns:
      The folder.

    Raises:
      UserError: see ``models.save_pretrained``.
    """
    if not folder.exists():
        models.save_pretrained(folder, config, params)
    for name in _BESIDE_WEIGHTS if source else ():
        if (Path(source) / name).is_file() and not (folder / name).exists():
            partial = folder / f"{name}.partial"
            shutil.copyfile(Path(source) / name, partial)
            partial.replace(folder / name)
    if not source and not (folder / "tokenizer.json").exists():
        tokenizer.save(folder)
    return folder


def leave_trained(folder: Path, base: Checkpoint, params: Params) -> Path | None:
    """Leave what was trained on somebody's checkpoint: adapters by themselves, or the whole model.

    Args:
      folder: that of a pair set's seed.
      base: what training began with.
      params: what it ended with.

    Returns:
      The new folder; None where there was no checkpoint folder to begin with.

    Raises:
      UserError: see ``models.save_adapters`` and ``models.save_pretrained``.
    """
    config = base.model.config
    if config.lora is not None:
        if not (folder / ADAPTERS).exists():
            models.save_adapters(folder / ADAPTERS, config, params, base=base.folder)
        return folder / ADAPTERS
    return leave_checkpoint(folder / CHECKPOINT, config, params, base.tokenizer, base.folder) if base.folder else None
