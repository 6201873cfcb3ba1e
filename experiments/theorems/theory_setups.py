"""The model set-ups of the theory as arrays: what is trained, one pair of responses, and what tells its logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from entangle.errors import UserError
from entangle.types import Params

UNLIKELY = -60.0
"""Logit of a token outside of the M that share the probability: the others' share is lost in rounding."""
PREFIX_LOGIT, CONTRAST_LOGIT, SUFFIX_LOGIT = 2.0, 3.0, 2.0
"""The toy's logits of its own tokens; all others are 0."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of the sweep: a pair on a model set-up, and the step that is made on it.

    Attributes:
      setup: key of ``SETUPS``.
      seed: of whatever is drawn.
      vocabulary: V.
      width: D, numbers of a hidden state.
      tokens: M, tokens that share all the probability (uniform).
      scale: standard deviation of the logits that are drawn, for hidden states of length 1; 0 is the uniform model.
      prefix: tokens before the one that differs.
      repeats: so many of them are the rejected token (last_token).
      overlap: expected cosine of the hidden states of two positions (last_token).
      suffix: identical tokens after the one that differs.
      gap: nats by which the suffix token's logit is lower in the rejected context.
      spread: standard deviation of what sets the other logits of the two contexts apart (random).
      position: the position that is looked at by itself, too; -1 for none.
      objective: name of an objective, with hyperparameters as in ``cpo,nll_weight=0.02``.
      fallen: nats by which the chosen log-probability is below the reference's; the rejected one is at the reference's.
      step: C, learning rate times the larger coefficient; of DPO C = eta beta c.
      bits: 64 or 32, of the floating numbers.
    """

    setup: str = "suffix"
    seed: int = 0
    vocabulary: int = 8
    width: int = 16
    tokens: int = 2
    scale: float = 1.0
    prefix: int = 2
    repeats: int = 0
    overlap: float = 0.0
    suffix: int = 0
    gap: float = 1.0
    spread: float = 0.0
    position: int = -1
    objective: str = "dpo"
    fallen: float = 0.0
    step: float = 1e-6
    bits: int = 64


class HeadPair(NamedTuple):
    """Set-up 1: hidden states are fixed, the head ``[D, V]`` is trained. Leading axes ``[B, 2]``, or ``[2]`` of one pair.

    Attributes:
      hidden: ``[..., T, D]``.
      tokens: ``[..., T]``.
      mask: ``[..., T]``, false on padding.
    """

    hidden: Any
    tokens: Any
    mask: Any

    def logits(self, params: Params) -> Any:
        """``[..., T, V]``."""
        return self.hidden @ params

    def kernel(self) -> np.ndarray:
        """Inner products of the hidden states of one pair, whose sides share them, ``[T, T]``."""
        return np.asarray(self.hidden[0] @ self.hidden[0].T)


class LogitPair(NamedTuple):
    """Set-up 2: the logits ``[T, V]`` are trained; after the differing token the contexts add an offset, which is fixed.

    Attributes:
      offsets: ``[..., T, V]``.
      tokens: ``[..., T]``.
      mask: ``[..., T]``, false on padding.
    """

    offsets: Any
    tokens: Any
    mask: Any

    def logits(self, params: Params) -> Any:
        """``[..., T, V]``."""
        return params.reshape((1,) * (self.offsets.ndim - 2) + params.shape) + self.offsets

    def kernel(self) -> np.ndarray:
        """Every position has parameters of its own: the identity, ``[T, T]``."""
        return np.eye(self.offsets.shape[-2])


Pair = HeadPair | LogitPair


def log_probs(params: Params, pair: Pair, /) -> jax.Array:
    """Summed log-probabilities of the responses, ``[B, R]``: a LogProbFn.

    Example:
      >>> import jax.numpy as jnp
      >>> from experiments.theorems.theory_setups import LogitPair, log_probs
      >>> pair = LogitPair(jnp.zeros((1, 2, 1, 4)), jnp.array([[[0], [1]]]), jnp.ones((1, 2, 1), bool))
      >>> log_probs(jnp.zeros((1, 4)), pair).round(3).tolist()  # -log 4
      [[-1.3860000371932983, -1.3860000371932983]]
    """
    every = jax.nn.log_softmax(pair.logits(params))
    taken = jnp.take_along_axis(every, pair.tokens[..., None], -1)[..., 0]
    return jnp.where(pair.mask, taken, jnp.zeros_like(taken)).sum(-1)


class Problem(NamedTuple):
    """One pair with the parameters at which it is looked at, in float64.

    Attributes:
      params: what is trained.
      pair: leaves ``[2, T, ...]``.
      differs: the position whose token differs.
    """

    params: np.ndarray
    pair: Pair
    differs: int


def _responses(tokens: np.ndarray, differs: int, contrast: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    both = np.stack([tokens, tokens])
    both[:, differs] = contrast
    return both, np.ones(both.shape, bool)


def _hidden(rng: np.random.Generator, point: Point) -> np.ndarray:
    """Hidden states ``[prefix + 1, D]``, whose lengths vary around 1."""
    shared, own = rng.normal(size=point.width), rng.normal(size=(point.prefix + 1, point.width))
    drawn = np.sqrt(point.overlap) * shared + np.sqrt(1 - point.overlap) * own
    return drawn / np.sqrt(point.width) * np.exp(rng.normal(size=(point.prefix + 1, 1)) / 4)


def uniform(point: Point) -> Problem:
    """Set-up 1, Theorem 1: responses of one token; M tokens share all the probability."""
    rng = np.random.default_rng(point.seed)
    hidden = _hidden(rng, dataclasses.replace(point, prefix=0))
    order = rng.permutation(point.vocabulary)
    logits = np.full(point.vocabulary, UNLIKELY)
    logits[order[: point.tokens]] = 0.0
    head = hidden.T @ logits[None] / (hidden**2).sum()
    pair = HeadPair(np.stack([hidden, hidden]), *_responses(order[:1], 0, (order[0], order[1])))
    return Problem(head, pair, 0)


def last_token(point: Point) -> Problem:
    """Set-up 1, the corollary: responses that differ in their last token, any head; without a prefix, single tokens."""
    rng = np.random.default_rng(point.seed)
    hidden = _hidden(rng, point)
    head = point.scale * rng.normal(size=(point.width, point.vocabulary))
    w, l, *others = rng.permutation(point.vocabulary)
    tokens = rng.choice(others, point.prefix + 1)
    tokens[: point.repeats] = l
    pair = HeadPair(np.stack([hidden, hidden]), *_responses(tokens, point.prefix, (w, l)))
    return Problem(head, pair, point.prefix)


def suffix(point: Point) -> Problem:
    """Set-up 2, the toy: fixed logits; in the rejected context the suffix token's is lower by the gap."""
    length = point.prefix + 1 + point.suffix
    logits = np.zeros((length, point.vocabulary))
    logits[: point.prefix, 3], logits[point.prefix, :2] = PREFIX_LOGIT, CONTRAST_LOGIT
    logits[point.prefix + 1 :, 2] = SUFFIX_LOGIT
    offsets = np.zeros((2, *logits.shape))
    offsets[1, point.prefix + 1 :, 2] = -point.gap
    tokens = np.repeat([3, 0, 2], [point.prefix, 1, point.suffix])
    return Problem(logits, LogitPair(offsets, *_responses(tokens, point.prefix, (0, 1))), point.prefix)


def random(point: Point) -> Problem:
    """Set-up 2: drawn logits and tokens; the rejected context's suffix logits differ by the gap and by drawn numbers."""
    rng = np.random.default_rng(point.seed)
    length, differs = point.prefix + 1 + point.suffix, point.prefix
    logits = point.scale * rng.normal(size=(length, point.vocabulary))
    tokens = rng.integers(point.vocabulary, size=length)
    w, l = rng.permutation(point.vocabulary)[:2]
    offsets = np.zeros((2, *logits.shape))
    after = np.arange(differs + 1, length)
    offsets[1, after] = point.spread * rng.normal(size=(point.suffix, point.vocabulary))
    offsets[1, after, tokens[after]] = -point.gap
    return Problem(logits, LogitPair(offsets, *_responses(tokens, differs, (int(w), int(l)))), differs)


SETUPS: Mapping[str, Callable[[Point], Problem]] = MappingProxyType(
    {"uniform": uniform, "last_token": last_token, "suffix": suffix, "random": random}
)
"""How a point's pair is made, by the name of its set-up."""


def problem(point: Point) -> Problem:
    """Make a point's pair and parameters.

    Raises:
      UserError: there is no such point.

    Example:
      >>> from experiments.theorems.theory_setups import Point, problem
      >>> problem(Point("suffix", suffix=1)).pair.tokens.tolist()
      [[3, 3, 0, 2], [3, 3, 1, 2]]
      >>> problem(Point("suffix", suffix=-1))
      Traceback (most recent call last):
      entangle.errors.UserError: suffix -1: 0 or more are needed
    """
    if point.setup not in SETUPS:
        raise UserError(f"setup {point.setup}: choose from {', '.join(SETUPS)}")
    for name in ("prefix", "suffix", "repeats", "scale", "spread"):
        if getattr(point, name) < 0:
            raise UserError(f"{name} {getattr(point, name)}: 0 or more are needed")
    if not 2 <= point.tokens <= point.vocabulary or point.vocabulary < 4:
        words = f"tokens {point.tokens}, vocabulary {point.vocabulary}"
        raise UserError(f"{words}: two tokens to contrast are needed, and a vocabulary of at least 4 that has them")
    if point.repeats > point.prefix or not 0 <= point.overlap <= 1:
        raise UserError(f"repeats {point.repeats}, overlap {point.overlap}: at most the prefix, and from 0 to 1")
    if not 0 < point.step < np.inf or point.bits not in (32, 64):
        raise UserError(f"step {point.step}, bits {point.bits}: a positive step, and 32 or 64 bits are needed")
    made = SETUPS[point.setup](point)
    if not -1 <= point.position < made.pair.tokens.shape[-1]:
        raise UserError(f"position {point.position}: the responses have {made.pair.tokens.shape[-1]}")
    return made
