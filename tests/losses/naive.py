"""The formulas of the docstrings, evaluated by plain NumPy in float64."""

import inspect
import re

import numpy as np

from scripts.reference.formulas import parse


def _softplus(x):
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


FUNCTIONS = {
    "s": lambda x: np.exp(-_softplus(-x)),
    "log_s": lambda x: -_softplus(-x),
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "logaddexp": np.logaddexp,
    "abs": np.abs,
    "sign": np.sign,
    "min": np.minimum,
    "max": np.maximum,
    "sort": np.sort,
    "rank": lambda x: np.argsort(np.argsort(x, kind="stable"), kind="stable"),
    "mean": np.mean,
    "std": lambda x: np.std(x, ddof=1),
    "one": lambda condition: np.asarray(condition, np.float64),
}


def _readable(expression):
    """``log s(x)`` and ``1[condition]`` as Python."""
    return re.sub(r"\b1\[([^\]]*)\]", r"one(\1)", expression.replace("log s(", "log_s("))


def symbols(lp):
    """What the formulas may speak of, from PairLogProbs of float64 arrays."""
    l_w, l_l, ref_w, ref_l, len_w, len_l = (np.asarray(field, np.float64) for field in lp)
    n_w, n_l = np.maximum(len_w, 1.0), np.maximum(len_l, 1.0)
    r_w, r_l = l_w - ref_w, l_l - ref_l
    return {
        **{"l_w": l_w, "l_l": l_l, "ref_w": ref_w, "ref_l": ref_l, "len_w": len_w, "len_l": len_l},
        **{"n_w": n_w, "n_l": n_l, "r_w": r_w, "r_l": r_l, "h": r_w - r_l, "lbar_w": l_w / n_w, "lbar_l": l_l / n_l},
        "B": len(l_w),
    }


def evaluate(objective, lp, **hyperparameters):
    """Values of every assignment, and of ratio and sign conditions under ``ratio``, ``d_w < 0`` and ``d_l < 0``."""
    formulas = parse(objective)
    defaults = {p.name: p.default for p in list(inspect.signature(objective).parameters.values())[1:]}
    scope = FUNCTIONS | symbols(lp) | defaults | hyperparameters
    shape = np.shape(lp.chosen)
    with np.errstate(all="ignore"):
        for name, expression in formulas.assignments:
            scope[name] = eval(_readable(expression), {"__builtins__": {}}, scope)
        found = {name: np.broadcast_to(scope[name], shape) for name in ("L", "d_w", "d_l")}
        if formulas.ratio is not None:
            found["ratio"] = np.broadcast_to(eval(_readable(formulas.ratio), {"__builtins__": {}}, scope), shape)
        for name, condition in formulas.negative.items():
            if condition is not None:
                value = eval(_readable(condition), {"__builtins__": {}}, scope)
                found[f"{name} < 0"] = np.broadcast_to(value, shape)
    return found
