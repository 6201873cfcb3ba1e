"""One table from name to objective, for command lines, sweeps and the reference page."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from entangle.errors import UserError
from entangle.losses import (
    batch_margins,
    compositions,
    divergences,
    logistic,
    margin_functions,
    pointwise,
    prospect,
    reference_free,
    tokens,
)
from entangle.losses.coefficients import loss_and_coefficients
from entangle.losses.hyperparameters import check_ranges
from entangle.losses.objective import Objective, as_objective, name_of, with_hyperparameters
from entangle.losses.tokens import TokenObjective
from entangle.types import PairLogProbs

_FAMILY: tuple[Objective, ...] = (
    logistic.dpo,
    logistic.cdpo,
    logistic.robust_dpo,
    logistic.r_dpo,
    logistic.margin_dpo,
    logistic.dpop,
    logistic.dpop_outside,
    logistic.dpo_shift,
    logistic.bdpo,
    compositions.dpo_norm,
    compositions.rpo,
    compositions.mpo,
    compositions.mpo_token_mean,
    divergences.f_dpo_forward_kl,
    divergences.f_dpo_jensen_shannon,
    divergences.f_dpo_alpha,
    margin_functions.hinge,
    margin_functions.ipo,
    margin_functions.ipo_averaged,
    margin_functions.exo_pair,
    margin_functions.discopop,
    margin_functions.lpo,
    pointwise.nca_pair,
    pointwise.bco_pair,
    prospect.bco_pair_shifted,
    prospect.kto,
    pointwise.apo_zero,
    pointwise.apo_down,
    pointwise.sppo,
    pointwise.cal_dpo,
    pointwise.cal_dpo_halved,
    batch_margins.aot,
    batch_margins.aot_unpaired,
    batch_margins.beta_dpo,
    batch_margins.amapo,
    reference_free.cpo,
    reference_free.simpo,
    reference_free.alphapo,
    reference_free.orpo,
    reference_free.asft,
    reference_free.rrhf,
    reference_free.slic_hf,
    compositions.nll,
    compositions.nll_averaged,
    compositions.nll_token_mean,
)

OBJECTIVES: Mapping[str, Objective] = MappingProxyType({name_of(objective): objective for objective in _FAMILY})
"""Every objective of pairs, by name."""

TOKEN_OBJECTIVES: Mapping[str, TokenObjective] = MappingProxyType(
    {name_of(objective): objective for objective in (tokens.ld_dpo, tokens.wpo, tokens.tdpo1, tokens.tdpo2)}
)
"""Every objective of tokens, by name; ``masked_dpo`` takes masks beside them."""

PAPER_OBJECTIVES = ("dpo", "r_dpo", "simpo", "ipo", "rrhf", "slic_hf", "cpo", "dpop", "kto", "sppo")
"""Names of the objectives studied in arXiv 2410.13828."""


def get_objective(name: str, /, **hyperparameters: Any) -> Objective:
    """Look an objective up by name and fix its hyperparameters.

    Args:
      name: a key of ``OBJECTIVES``, or ``module:function`` for one of your own.
      **hyperparameters: keyword arguments of that objective.

    Returns:
      A function of pair log-probabilities alone, of the objective's type.

    Raises:
      UserError: there is no such objective, or it is one of tokens; it has no such hyperparameter, a value lies outside of
        its range or makes the loss of an ordinary pair infinite; or a function of your own does not return one loss a pair.

    Example:
      >>> from entangle import losses
      >>> losses.get_objective("dppo")
      Traceback (most recent call last):
      entangle.errors.UserError: unknown objective 'dppo' (did you mean dpo?): choose one of alphapo, amapo, aot, ...
    """
    if not isinstance(name, str):
        raise UserError(f"an objective is looked up by its name, not by {name!r}")
    objective = _imported(name) if ":" in name else OBJECTIVES.get(name)
    if name in TOKEN_OBJECTIVES or any(objective is o for o in TOKEN_OBJECTIVES.values()):
        raise UserError(
            f"objective {name!r} takes log-probabilities of tokens, and here those of responses are needed: "
            "training.row_gradients trains with it"
        )
    if objective is None:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), OBJECTIVES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(
            f"unknown objective {name!r}{hint}: choose one of {', '.join(sorted(OBJECTIVES))}, or module:function for "
            "your own"
        )
    try:
        parameters = list(inspect.signature(objective).parameters.values())[1:]
    except (TypeError, ValueError):
        raise UserError(f"objective {name!r}: it has no signature that can be read") from None
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    known = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    unknown = [] if takes_any else sorted(set(hyperparameters) - set(known))
    if unknown:
        raise UserError(
            f"objective {name!r} has no hyperparameter {', '.join(unknown)}: it has {', '.join(known) or 'none'}"
        )
    check_ranges(name, objective, hyperparameters)
    fixed = with_hyperparameters(objective, **hyperparameters)
    _try(name, fixed, hyperparameters)
    return fixed


def objective_source(name: str) -> str | None:
    """The text of the module that an objective of your own comes from; None for one of the table.

    What tells two runs apart whose objective has one name and was edited in between.

    Args:
      name: as for :func:`get_objective`.

    Raises:
      UserError: there is no such module or function.

    Example:
      >>> from entangle import losses
      >>> losses.objective_source("dpo") is None, "def dpo(" in losses.objective_source("entangle.losses.logistic:dpo")
      (True, True)
    """
    if ":" not in name:
        return None
    function = _imported(name)
    modules = [importlib.import_module(name.partition(":")[0]), inspect.getmodule(function)]
    return "\n".join(_text(module) for module in modules if module is not None)


def _text(module: Any) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return ""  # typed in by hand, or built in: there is no text


def _imported(name: str) -> Objective:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a module of somebody else's does when it is run
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"objective {name!r}: module {module_name!r} cannot be imported: {reason}") from None
    found = getattr(module, attribute, None)
    if found is None:
        raise UserError(f"objective {name!r}: module {module_name!r} has no {attribute!r}")
    if not callable(found):
        raise UserError(f"objective {name!r}: it is no function, but {type(found).__name__}")
    return as_objective(found)


def _try(name: str, objective: Objective, values: Mapping[str, Any]) -> None:
    """Take it once on two ordinary pairs; where a value is given for each of other pairs there is nothing to take it on."""
    if any(getattr(value, "ndim", 0) for value in values.values()):
        return
    fields = (-20.0, -30.0), (-25.0, -24.0), (-22.0, -28.0), (-23.0, -26.0), (8.0, 10.0), (9.0, 7.0)
    try:
        loss, d = loss_and_coefficients(objective, PairLogProbs(*(jnp.array(field) for field in fields)))
    except ZeroDivisionError:
        raise UserError(f"objective {name!r}: {dict(values)} divides by zero") from None
    except Exception as error:  # an objective of somebody else's may do anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"objective {name!r}: on two ordinary pairs: {reason}") from None
    if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((loss, d))):
        raise UserError(
            f"objective {name!r}: at {dict(values) or 'its defaults'} the loss of an ordinary pair is not finite"
        )
