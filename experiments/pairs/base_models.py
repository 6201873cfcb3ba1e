"""Base models that are pretrained where an experiment brings no checkpoint."""

from __future__ import annotations

from pathlib import Path

from entangle.training import StageConfig
from entangle.types import Params
from experiments.pairs import exports, programs, stages
from experiments.pairs.sentiment_data import Materials


def base_model(
    folder: Path, stage: StageConfig, length: int, materials: Materials, tracker: stages.TrackerFactory
) -> Params:
    """The checkpoint's parameters; without one, those of a base model that is pretrained or gone on with.

    Args:
      folder: its run folder, where it is left as a checkpoint folder, too.
      stage: of pretraining.
      length: tokens of a window.
      materials: model, tokenizer and text.
      tracker: makes the mirror of a run.

    Raises:
      UserError: the folder holds another run.
      NonFiniteError: see ``training.train``.
    """
    if materials.checkpoint is not None:
        return materials.checkpoint
    program = programs.likelihood_program(materials.model, stage)
    params = stages.pretrain(folder, materials.model, program, materials.text, length, 0, tracker)
    # so that another experiment can start from it with --model
    exports.leave_checkpoint(folder / exports.CHECKPOINT, materials.model.config, params, materials.tokenizer)
    return params
