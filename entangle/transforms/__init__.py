"""Gradient surgery for preference pairs as optax transforms: weightings of the two gradients and the heads of chains."""

from entangle.transforms.bands import CalibrationMemory, band, reward_calibrated
from entangle.transforms.bisectors import config, imtl_g, nash, normalized, scale_preserving
from entangle.transforms.bridges import aggregate_pair, pair_aggregator, stack_pair, unstack_pair
from entangle.transforms.chains import AccumulatePairsState, accumulate_pairs, chain_pair
from entangle.transforms.combine import CombinePairState, combine_pair, combined
from entangle.transforms.groups import (
    CombineGroupsState,
    GroupWeighting,
    adaptive_balance,
    combine_groups,
    group_mean,
    projected_on_last,
    soft_aggregation,
)
from entangle.transforms.min_norm import aligned_mtl, cagrad, mgda
from entangle.transforms.pair_scope import normalize_coefficients, per_pair
from entangle.transforms.retain import AdamMetric, project_retain
from entangle.transforms.span import RetainState, retained
from entangle.transforms.surgery import dual_projection, gradvac, gradvac_ema, one_sided, pcgrad, upgrad
from entangle.transforms.table import WEIGHTINGS, Entry, Promises, get_weighting
from entangle.transforms.weightings import PairWeights, RunningWeighting, Weighting, fixed, margin
from entangle.transforms.wrappers import ProtectChosenState, RetainInvariantState, protect_chosen, retain_invariant

__all__ = [
    "WEIGHTINGS",
    "AccumulatePairsState",
    "AdamMetric",
    "CalibrationMemory",
    "CombineGroupsState",
    "CombinePairState",
    "Entry",
    "GroupWeighting",
    "PairWeights",
    "Promises",
    "ProtectChosenState",
    "RetainInvariantState",
    "RetainState",
    "RunningWeighting",
    "Weighting",
    "accumulate_pairs",
    "adaptive_balance",
    "aggregate_pair",
    "aligned_mtl",
    "band",
    "cagrad",
    "chain_pair",
    "combine_groups",
    "combine_pair",
    "combined",
    "config",
    "dual_projection",
    "fixed",
    "get_weighting",
    "gradvac",
    "gradvac_ema",
    "group_mean",
    "imtl_g",
    "margin",
    "mgda",
    "nash",
    "normalize_coefficients",
    "normalized",
    "one_sided",
    "pair_aggregator",
    "pcgrad",
    "per_pair",
    "project_retain",
    "projected_on_last",
    "protect_chosen",
    "retain_invariant",
    "retained",
    "reward_calibrated",
    "scale_preserving",
    "soft_aggregation",
    "stack_pair",
    "unstack_pair",
    "upgrad",
]
