"""What is planned, as data: a model, a step on it, and the machines."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Annotated, Any

import tyro

from entangle.errors import UserError
from entangle.training import OptimizerConfig

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """A training step and the machines that it is planned for.

    Attributes:
      preset: default: the defaults that the other flags override.
      experiment: module of an experiment (experiments.preferences, experiments.scale, ...) or module:function; what its
        configuration says of the step comes in the place of the defaults.
      model: a name of ``models.PRESETS``, or a Hugging Face checkpoint folder, of which only config.json is read.
      vocab_size: rows of the embedding; 0 takes those of the released model.
      topology: a slice, such as v5e:8x8; a generation alone (v5p) finds the smallest slice that fits.
      mesh: sizes of the axes data, fsdp and tensor, such as data=4,fsdp=16; by default all chips are fsdp.
      objective: as in every experiment.
      objective_args: its hyperparameters by name.
      pair_chain: as in every experiment.
      pair_chain_args: its settings by name.
      geometry: the exact geometry of every pair at every step; its cost is told against a step without it.
      changes: what every step did to its batch, to first order and in fact; it makes a step about twice as long.
      lora: none, or adapters as ``models.lora_config`` reads them, such as paper; without them all parameters are trained.
      max_length: T, tokens of a row.
      completion_length: tokens of the longest completion, the only positions that meet the head; 0 takes all of a row.
      head_chunk: entries of the vocabulary that the head multiplies at a time.
      batch_size: pairs a step, on all chips together.
      optimizer: how the parameters move.
      dtype: of trained parameters; gradients and moments follow.
      frozen_dtype: of what adapters leave as it is.
      compute_dtype: of activations and products.
      remat: what the backward computes again: none, dots or full.
      search: where it does not fit, try which setting makes it fit.
      out: folder of plan.json; made, or written over when it holds a plan.
    """

    preset: str = "default"
    experiment: str = ""
    model: str = "llama3_8b"
    vocab_size: int = 0
    topology: str = "v5e:8x8"
    mesh: str = ""
    objective: str = "dpo"
    objective_args: dict[str, float] = dataclasses.field(default_factory=dict)
    pair_chain: str = "margin"
    pair_chain_args: dict[str, float] = dataclasses.field(default_factory=dict)
    geometry: Annotated[bool, tyro.conf.FlagCreatePairsOff] = True
    changes: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    lora: str = "none"
    max_length: int = 512
    completion_length: int = 0
    head_chunk: int = 8192
    batch_size: int = 64
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-6)
    dtype: str = "float32"
    frozen_dtype: str = "bfloat16"
    compute_dtype: str = "bfloat16"
    remat: str = "full"
    search: Annotated[bool, tyro.conf.FlagCreatePairsOff] = True
    out: Path | None = None


_TAKEN = (
    "objective",
    "objective_args",
    "pair_chain",
    "pair_chain_args",
    "max_length",
    "head_chunk",
    "lora",
    "model",
    "mesh",
)


def from_experiment(name: str) -> PlanConfig:
    """The plan of an experiment's step: its objective, chain, lengths, batch, optimizer, mesh and dtypes.

    Layers are scanned and computed again, as they are in experiments on a mesh; without adapters an experiment trains and
    computes in float32.

    Args:
      name: a module with ``config()`` or ``presets()``, or ``module:function``; the configuration has ``preference``, a
        stage, and any of the fields of :class:`PlanConfig`.

    Raises:
      UserError: there is no such module or function, or what it gives is no such configuration.

    Example:
      >>> from entangle.plan.config import from_experiment
      >>> found = from_experiment("experiments.preferences")
      >>> found.max_length, found.batch_size, found.changes, found.compute_dtype
      (256, 16, True, 'float32')
    """
    module_name, _, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"--experiment {name}: cannot be imported: {error}") from None
    made = _made(module, name, function)
    made = getattr(made, "trial", made)
    stage = getattr(made, "preference", None)
    if stage is None:
        raise UserError(f"--experiment {name}: its configuration has no stage called preference")
    fields: dict[str, Any] = {field: getattr(made, field) for field in _TAKEN if getattr(made, field, None)}
    fields["changes"] = bool(getattr(made, "changes", False))
    fields["frozen_dtype"] = fields["compute_dtype"] = getattr(made, "dtype", "float32")
    return dataclasses.replace(
        PlanConfig(), experiment=name, batch_size=stage.batch_size, optimizer=stage.optimizer, **fields
    )


def _made(module: Any, name: str, function: str) -> Any:
    if function:
        if not callable(getattr(module, function, None)):
            raise UserError(f"--experiment {name}: the module has no function {function}")
        return getattr(module, function)()
    if hasattr(module, "config"):
        return module.config()
    if hasattr(module, "presets"):
        return next(iter(module.presets().values()))
    raise UserError(f"--experiment {name}: the module has neither config() nor presets(); name a function with a colon")
