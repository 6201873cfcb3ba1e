"""Optimizer settings as data, and the optax chains they stand for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import optax

from entangle.errors import UserError


def adamw(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """AdamW with the betas of Hugging Face's trainer (0.9, 0.999).

    Example:
      >>> import optax
      >>> from entangle.training.optimizers import adamw
      >>> tx = adamw(optax.constant_schedule(1e-3), 0.0)
    """
    return optax.adamw(schedule, weight_decay=weight_decay)


def sgd(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Plain gradient descent, the optimizer that the paper's conditions speak of; weight decay is decoupled.

    Example:
      >>> import optax
      >>> from entangle.training.optimizers import sgd
      >>> tx = sgd(optax.constant_schedule(1e-3), 0.0)
    """
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(schedule))


OPTIMIZERS: Mapping[str, Callable[[optax.Schedule, float], optax.GradientTransformation]] = MappingProxyType(
    {"adamw": adamw, "sgd": sgd}
)
"""Name -> factory of (schedule, weight decay), for command lines."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How the parameters move: linear warm-up, then linear decay to ``final_fraction`` of the peak.

    Attributes:
      name: adamw or sgd.
      learning_rate: peak learning rate.
      warmup_fraction: share of all steps spent warming up from 0.
      final_fraction: learning rate at the end over the peak; 1 keeps it constant after the warm-up.
      weight_decay: decoupled weight decay.
      clip_norm: largest global norm of the combined gradient; 0 does not clip.

    Raises:
      UserError: the name is not in OPTIMIZERS, or a number is out of range.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.1
    final_fraction: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        """Refuse an unknown name, and numbers that would climb, freeze or silently not clip."""
        if self.name not in OPTIMIZERS:
            raise UserError(f"unknown optimizer {self.name!r}: choose one of {', '.join(sorted(OPTIMIZERS))}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"learning rate {self.learning_rate}: it must be positive")
        if not 0 <= self.warmup_fraction <= 1:
            raise UserError(f"warm-up fraction {self.warmup_fraction}: it must be from 0 to 1")
        for name in ("final_fraction", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name.replace('_', ' ')} {value}: it must be 0 or more")

    def schedule(self, steps: int, learning_rate: float | jax.Array | None = None) -> optax.Schedule:
        """Learning rate as a function of the step, for a run of that many steps.

        Args:
          steps: of the run.
          learning_rate: peak, in the place of the configuration's own; it may be traced, so that one program serves many.

        Example:
          >>> from entangle.training.optimizers import OptimizerConfig
          >>> rate = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.5).schedule(4)
          >>> [float(rate(step)) for step in range(5)]
          [0.5, 1.0, 1.0, 0.5, 0.0]
        """
        warmup = max(1, round(self.warmup_fraction * steps))
        peak: Any = self.learning_rate if learning_rate is None else learning_rate
        rising = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
        falling = optax.linear_schedule(peak, self.final_fraction * peak, max(1, steps - warmup))
        return optax.join_schedules([rising, falling], [warmup])

    def build(
        self, steps: int, *head: optax.GradientTransformation, learning_rate: float | jax.Array | None = None
    ) -> optax.GradientTransformation:
        """The optax chain: the head (for pairs ``combine_pair``), clipping if asked for, the optimizer.

        Args:
          steps: of the run.
          head: what comes before the optimizer.
          learning_rate: as for :meth:`schedule`.

        Example:
          >>> import jax.numpy as jnp
          >>> from entangle.training.optimizers import OptimizerConfig
          >>> tx = OptimizerConfig(name="sgd", learning_rate=0.5, warmup_fraction=0.0).build(10)
          >>> tx.update(jnp.ones(1), tx.init(jnp.zeros(1)), jnp.zeros(1))[0].tolist()
          [-0.5]
        """
        clip = [optax.clip_by_global_norm(self.clip_norm)] if self.clip_norm > 0 else []
        return optax.chain(*head, *clip, OPTIMIZERS[self.name](self.schedule(steps, learning_rate), self.weight_decay))
