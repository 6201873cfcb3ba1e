"""Exact geometry of the two log-probability gradients of a preference pair, and what it predicts."""

from entangle.geometry.conditions import (
    Case,
    PairChanges,
    StepChanges,
    case_of,
    condition_1,
    condition_2,
    condition_ratio,
    cosine,
    first_order_changes,
    predicted_changes,
    step_changes,
)
from entangle.geometry.one_backward import (
    ParameterUse,
    by_group,
    pair_geometry,
    parameter_uses,
    total,
    vjp_with_geometry,
)
from entangle.geometry.pairs import pair_vjp, scan_geometry, take_side
from entangle.geometry.products import gram, inner_product, row_gram
from entangle.geometry.tokens import token_gram
from entangle.types import PairGeometry

__all__ = [
    "Case",
    "PairChanges",
    "PairGeometry",
    "ParameterUse",
    "StepChanges",
    "by_group",
    "case_of",
    "condition_1",
    "condition_2",
    "condition_ratio",
    "cosine",
    "first_order_changes",
    "gram",
    "inner_product",
    "pair_geometry",
    "pair_vjp",
    "parameter_uses",
    "predicted_changes",
    "row_gram",
    "scan_geometry",
    "step_changes",
    "take_side",
    "token_gram",
    "total",
    "vjp_with_geometry",
]
