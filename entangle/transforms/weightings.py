"""What a weighting is: a pure function from the Gram of the chosen and rejected gradients to two weights (x, y).

The combined step goes along ``x chosen - y rejected``, where chosen and rejected are the two means of PairGradients. In the
language of multi-objective optimisation the two objectives' ascent directions are ``g1 = chosen`` and ``g2 = -rejected``, and
they are in conflict where ``<g1, g2> = -<chosen, rejected>`` is negative.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from entangle.losses.hyperparameters import Range
from entangle.types import PairGeometry


class PairWeights(NamedTuple):
    """Weights of the two gradients in the combined step.

    Attributes:
      chosen: x, of the Gram's shape.
      rejected: y, of the Gram's shape.
    """

    chosen: jax.Array
    rejected: jax.Array


Weighting = Callable[[PairGeometry], PairWeights]
"""A pure function of the Gram of two gradients to the two weights, element by element over arrays of any shape."""


class RunningWeighting(NamedTuple):
    """A weighting that remembers earlier steps.

    Attributes:
      init: a Gram of zeros to the memory before the first step, arrays of the Gram's shape.
      update: Gram and memory to the weights and the next memory.
    """

    init: Callable[[PairGeometry], Any]
    update: Callable[[PairGeometry, Any], tuple[PairWeights, Any]]


def as_running(weighting: Weighting | RunningWeighting) -> RunningWeighting:
    """Any weighting as one with a memory, which is ``()`` where nothing is remembered.

    Example:
      >>> from entangle import transforms
      >>> from entangle.transforms.weightings import as_running
      >>> as_running(transforms.margin()).init(None)
      ()
    """
    if isinstance(weighting, RunningWeighting):
        return weighting._replace(update=lambda gram, memory: _checked(gram, *weighting.update(gram, memory)))
    if not callable(weighting):
        hint = f": get_weighting({weighting!r}) finds it" if isinstance(weighting, str) else ""
        raise TypeError(f"a weighting is a function of the Gram, got {type(weighting).__name__} {weighting!r}{hint}")
    if not _takes_one(weighting):
        name = getattr(weighting, "__name__", repr(weighting))
        raise TypeError(f"{name} takes no Gram, so it makes a weighting: call it, {name}()")
    return RunningWeighting(lambda gram: (), lambda gram, memory: _checked(gram, weighting(gram), memory))


def _takes_one(function: Callable[..., Any]) -> bool:
    """Whether it can be meant for a Gram: some argument has no default; a factory's all have one."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some builtins have none
        return True
    kinds = [p.kind for p in parameters]
    return inspect.Parameter.VAR_POSITIONAL in kinds or any(
        p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters
    )


def _checked(gram: PairGeometry, found: Any, memory: Any) -> tuple[PairWeights, Any]:
    shape = gram.inner_product.shape
    arrays = jax.tree.leaves(found)
    fits = isinstance(found, tuple | list) and len(found) == len(arrays) == 2
    if not (fits and all(jnp.shape(w) in ((), shape) for w in arrays)):
        given = [list(jnp.shape(w)) for w in arrays]
        raise TypeError(
            f"a weighting gives two weights, chosen and rejected, each a number or of the Gram's shape {list(shape)}; "
            f"this one gave shapes {given}"
        )
    like = gram.inner_product
    return PairWeights(*(jnp.broadcast_to(jnp.asarray(w, like.dtype), like.shape) for w in found)), memory


class Norms(NamedTuple):
    """The Gram in a form whose numbers stay in float32's range where products of squares would not.

    Attributes:
      chosen: ``|g1|``.
      rejected: ``|g2|``.
      cosine: of ``g1 = chosen`` and ``g2 = -rejected``, in [-1, 1]; 0 where a gradient is zero.
    """

    chosen: jax.Array
    rejected: jax.Array
    cosine: jax.Array


def norms(gram: PairGeometry) -> Norms:
    """Norms and cosine of the two ascent directions; differentiable, with derivative 0 where a gradient is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.transforms.weightings import norms
      >>> from entangle.types import PairGeometry
      >>> [float(x) for x in norms(PairGeometry(*(jnp.array(x) for x in (4.0, 16.0, 2.0))))]
      [2.0, 4.0, -0.25]
    """
    chosen, rejected = root(gram.chosen_sq_norm), root(gram.rejected_sq_norm)
    # divided by one after the other: their product may be too large or too small
    cosine = -gram.inner_product * inverse(chosen) * inverse(rejected)
    return Norms(chosen, rejected, jnp.clip(cosine, -1, 1))


def inverse(positive: jax.Array) -> jax.Array:
    """``1 / x``, and 0 at 0; a NaN stays one, and the derivative at 0 is 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.transforms.weightings import inverse
      >>> inverse(jnp.array([0.0, 4.0])).tolist()
      [0.0, 0.25]
    """
    zero = positive == 0  # not `> 0`: a NaN must stay one
    return jnp.where(zero, 0, 1 / jnp.where(zero, 1, positive))


def root(value: jax.Array) -> jax.Array:
    """Square root whose derivative at 0 is 0.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from entangle.transforms.weightings import root
      >>> float(root(jnp.float32(9.0))), float(jax.grad(root)(jnp.float32(0.0)))
      (3.0, 0.0)
    """
    zero = value == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, value)))


def of_norms(rule: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]) -> Weighting:
    """The weighting of a rule on ``|g1|``, ``|g2|`` and their cosine; NaN where the Gram is not finite.

    Args:
      rule: norms and cosine to (x, y), finite wherever they are.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.transforms.weightings import of_norms
      >>> from entangle.types import PairGeometry
      >>> weighting = of_norms(lambda n1, n2, k: (n2, n1))
      >>> [float(x) for x in weighting(PairGeometry(*(jnp.array(x) for x in (4.0, 16.0, 2.0))))]
      [4.0, 2.0]
      >>> [float(x) for x in weighting(PairGeometry(*(jnp.array(x) for x in (4.0, jnp.inf, 2.0))))]
      [nan, nan]
    """

    def weighting(gram: PairGeometry) -> PairWeights:
        return PairWeights(*(nan_unless_finite(gram, w) for w in rule(*norms(gram))))

    return weighting


def nan_unless_finite(gram: PairGeometry, value: jax.Array) -> jax.Array:
    """A value, and NaN where the Gram is not finite: a bad gradient must not turn into a plausible step."""
    finite = jnp.isfinite(gram.chosen_sq_norm + gram.rejected_sq_norm + gram.inner_product)
    return jnp.where(finite, value, jnp.nan)


def rounding(like: jax.Array) -> float:
    """How far from 1 a cosine's absolute value may be when two vectors are parallel but for rounding: 4 units.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle.transforms.weightings import rounding
      >>> rounding(jnp.float32(0)) == 4 * 2**-23
      True
    """
    return 4 * float(jnp.finfo(like.dtype).eps)


def check(name: str, value: Any, low: float, high: float, *, with_low: bool = False, with_high: bool = False) -> None:
    """Refuse a setting outside of its range; what ``optax.inject_hyperparams`` traces is let through.

    Raises:
      TypeError: it is a function, or no number.
      ValueError: it is outside, or NaN.

    Example:
      >>> from entangle.transforms.weightings import check
      >>> check("c", 1.5, 0.0, 1.0, with_low=True)
      Traceback (most recent call last):
      ValueError: c: 1.5 is not in [0, 1)
    """
    if callable(value):
        raise TypeError(
            f"{name}: a number, not a schedule; optax.inject_hyperparams around the chain follows schedules"
        )
    if not isinstance(value, numbers.Real) and not hasattr(value, "dtype"):
        raise TypeError(f"{name}: a number is needed, got {value!r}")
    range_ = Range(low, high, with_low=with_low, with_high=with_high)
    if not isinstance(value, jax.core.Tracer) and not range_.holds(float(value)):
        raise ValueError(f"{name}: {float(value):g} is not in {range_}")


def check_count(name: str, value: Any, least: int) -> int:
    """A setting that counts something, as an integer.

    Raises:
      TypeError: it is no number, or traced.
      ValueError: it is no whole number, or below ``least``.

    Example:
      >>> from entangle.transforms.weightings import check_count
      >>> check_count("memory", 8.0, 0)
      8
      >>> check_count("memory", 1.5, 0)
      Traceback (most recent call last):
      ValueError: memory: 1.5 is no whole number from 0 up
    """
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name}: arrays have shapes that depend on it; optax.inject_hyperparams(..., static_args={name!r})"
        )
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: a whole number is needed, got {value!r}")
    if not float(value).is_integer() or value < least:
        raise ValueError(f"{name}: {value:g} is no whole number from {least} up")
    return int(float(value))


def check_function(name: str, value: Any, of: str) -> None:
    """Refuse what should be a function of something, or None, and is neither.

    Raises:
      TypeError: it is neither.

    Example:
      >>> from entangle.transforms.weightings import check_function
      >>> check_function("group", "layers", "a parameter's path")
      Traceback (most recent call last):
      TypeError: group: a function of a parameter's path is needed, got 'layers'
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name}: a function of {of} is needed, got {value!r}")


def fixed(chosen: float = 1.0, rejected: float = 1.0) -> Weighting:
    """Two constants; ``fixed(chosen=0)`` only lowers the rejected side, which is the baseline of unlearning.

    Scope: what is promised for :func:`margin` holds for equal constants.

    Args:
      chosen: x, finite.
      rejected: y, finite.

    Raises:
      ValueError: a constant is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> [float(w) for w in transforms.fixed(chosen=0.0)(PairGeometry(*(jnp.array(x) for x in (4.0, 9.0, 1.0))))]
      [0.0, 1.0]
    """
    check("chosen", chosen, -float("inf"), float("inf"))
    check("rejected", rejected, -float("inf"), float("inf"))

    def weighting(gram: PairGeometry) -> PairWeights:
        like = gram.inner_product
        return PairWeights(*(jnp.broadcast_to(jnp.asarray(w, like.dtype), like.shape) for w in (chosen, rejected)))

    return weighting


def margin() -> Weighting:
    """The objective's own combination, (1, 1): the chain is then exactly the ordinary gradient step.

    Scope: the margin of the batch does not fall to first order under a plain gradient step, as for every objective with
    equal coefficients; both log-probabilities may fall or rise together (arXiv 2410.13828, section 3).

    Example:
      >>> import jax.numpy as jnp
      >>> from entangle import transforms
      >>> from entangle.types import PairGeometry
      >>> [float(w) for w in transforms.margin()(PairGeometry(*(jnp.array(x) for x in (4.0, 9.0, 1.0))))]
      [1.0, 1.0]
    """
    return fixed()
