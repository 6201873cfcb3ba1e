"""Shapes of the decoder, and the sizes that go by a name."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

from entangle.errors import UserError


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes of a GPT-2 decoder; it builds nothing.

    Attributes:
      vocab_size: V, rows of the token embedding, which is also the output head.
      max_positions: longest sequence the learned position embedding reaches, in tokens.
      width: D, a multiple of ``heads``.
      layers: L.
      heads: H.
      hidden: F, width of the feed-forward layer; ``None`` means ``4 * width``.
      norm_epsilon: added to the variance in every LayerNorm.

    Raises:
      UserError: a size is not a positive whole number, ``width`` is not a multiple of ``heads``, or ``norm_epsilon`` is
        not a positive number.

    Example:
      >>> DecoderConfig(vocab_size=10, max_positions=8, width=6, layers=1, heads=2).hidden_width
      24
    """

    vocab_size: int
    max_positions: int
    width: int
    layers: int
    heads: int
    hidden: int | None = None
    norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_positions", "width", "layers", "heads", "hidden"):
            value = getattr(self, name)
            if name == "hidden" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"model configuration: {name} must be a positive whole number, got {value!r}")
        if self.width % self.heads:
            raise UserError(f"model configuration: width {self.width} is not a multiple of heads {self.heads}")
        epsilon = self.norm_epsilon
        if not isinstance(epsilon, int | float) or not (epsilon > 0 and math.isfinite(epsilon)):
            raise UserError(f"model configuration: norm_epsilon must be a positive number, got {epsilon!r}")

    @property
    def hidden_width(self) -> int:
        """F, with the default of four times the width filled in."""
        return 4 * self.width if self.hidden is None else self.hidden

    @property
    def head_width(self) -> int:
        """D / H, the width of one attention head."""
        return self.width // self.heads

    @property
    def parameters(self) -> int:
        """Number of trainable parameters; the token embedding, which is also the head, counts once.

        Example:
          >>> DecoderConfig(vocab_size=50257, max_positions=1024, width=768, layers=12, heads=12).parameters
          124439808
        """
        norm, width, hidden = 2 * self.width, self.width, self.hidden_width
        attention = 4 * (width * width + width)
        feed_forward = 2 * width * hidden + hidden + width
        embeddings = (self.vocab_size + self.max_positions) * width
        return embeddings + self.layers * (2 * norm + attention + feed_forward) + norm


PRESETS: Mapping[str, Callable[..., DecoderConfig]] = {
    "tiny": functools.partial(DecoderConfig, max_positions=128, width=64, layers=2, heads=2),
    "mini": functools.partial(DecoderConfig, max_positions=256, width=96, layers=3, heads=3),
    "small": functools.partial(DecoderConfig, max_positions=256, width=128, layers=4, heads=4),
    "gpt2": functools.partial(DecoderConfig, max_positions=1024, width=768, layers=12, heads=12),
}
"""Table of sizes; each entry takes ``vocab_size``, which comes from the tokenizer (GPT-2's own has 50257 tokens)."""


def preset(name: str, vocab_size: int) -> DecoderConfig:
    """Look up a size by its name.

    Args:
      name: a key of ``PRESETS``.
      vocab_size: V, from the tokenizer.

    Returns:
      The configuration.

    Raises:
      UserError: there is no such preset.

    Example:
      >>> preset("gpt2", 50257).layers
      12
    """
    if name not in PRESETS:
        raise UserError(f"unknown model preset {name!r}: choose from {', '.join(PRESETS)}")
    return PRESETS[name](vocab_size=vocab_size)
