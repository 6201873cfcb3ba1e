"""State, the one step, the one loop, checkpoints and tracking: from batches to a run folder."""

from entangle import extras

extras.require("train", "flax", "orbax", "wandb", "tqdm", "numpy", "safetensors")

from entangle.training import trials
from entangle.training.checkpoints import final_params
from entangle.training.evaluation import pair_diagnostics, score_pairs
from entangle.training.gradients import (
    PreferenceExamples,
    TokenBatch,
    likelihood_gradients,
    preference_gradients,
    preference_memory,
    reward_scale,
)
from entangle.training.loop import train, train_trials
from entangle.training.metrics import means
from entangle.training.optimizers import OPTIMIZERS, OptimizerConfig
from entangle.training.pair_chains import PairChain, pair_chain, pair_chains
from entangle.training.reference_cache import (
    ReferenceFingerprint,
    check_reference,
    reference_fingerprint,
    reference_log_probs,
)
from entangle.training.references import Reference, adapter_off, frozen_copy, moving_reference
from entangle.training.row_objectives import masked_rows, row_gradients
from entangle.training.run_folder import RunFolder, read_json, read_metrics, write_json
from entangle.training.stage import StageConfig
from entangle.training.step import TrainState, init_state, make_step
from entangle.training.streams import Batches, MappedBatches, global_rows, process_rows
from entangle.training.tracking import NoTracker, Tracker, WandbTracker
from entangle.training.trials import AXIS as TRIAL_AXIS
from entangle.training.trials import map_trials, trial_mesh

__all__ = [
    "OPTIMIZERS",
    "TRIAL_AXIS",
    "Batches",
    "MappedBatches",
    "NoTracker",
    "OptimizerConfig",
    "PairChain",
    "PreferenceExamples",
    "Reference",
    "ReferenceFingerprint",
    "RunFolder",
    "StageConfig",
    "TokenBatch",
    "Tracker",
    "TrainState",
    "WandbTracker",
    "adapter_off",
    "check_reference",
    "final_params",
    "frozen_copy",
    "global_rows",
    "init_state",
    "likelihood_gradients",
    "make_step",
    "map_trials",
    "masked_rows",
    "means",
    "moving_reference",
    "pair_chain",
    "pair_chains",
    "pair_diagnostics",
    "preference_gradients",
    "preference_memory",
    "process_rows",
    "read_json",
    "read_metrics",
    "reference_fingerprint",
    "reference_log_probs",
    "reward_scale",
    "row_gradients",
    "score_pairs",
    "train",
    "train_trials",
    "trial_mesh",
    "trials",
    "write_json",
]
