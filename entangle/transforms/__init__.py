"""Gradient surgery for preference pairs as optax transforms: weightings of the two gradients and the head of the chain."""

from entangle.transforms.bands import CalibrationMemory, band, reward_calibrated
from entangle.transforms.bisectors import config, imtl_g, nash, normalized, scale_preserving
from entangle.transforms.combine import CombinePairState, combine_pair, combined
from entangle.transforms.min_norm import aligned_mtl, cagrad, mgda
from entangle.transforms.pair_scope import normalize_coefficients, per_pair
from entangle.transforms.surgery import dual_projection, gradvac, gradvac_ema, one_sided, pcgrad, upgrad
from entangle.transforms.table import WEIGHTINGS, Entry, Promises, get_weighting
from entangle.transforms.weightings import PairWeights, RunningWeighting, Weighting, margin

__all__ = [
    "WEIGHTINGS",
    "CalibrationMemory",
    "CombinePairState",
    "Entry",
    "PairWeights",
    "Promises",
    "RunningWeighting",
    "Weighting",
    "aligned_mtl",
    "band",
    "cagrad",
    "combine_pair",
    "combined",
    "config",
    "dual_projection",
    "get_weighting",
    "gradvac",
    "gradvac_ema",
    "imtl_g",
    "margin",
    "mgda",
    "nash",
    "normalize_coefficients",
    "normalized",
    "one_sided",
    "pcgrad",
    "per_pair",
    "reward_calibrated",
    "scale_preserving",
    "upgrad",
]
