"""What a decoder is, as data: its shapes, the choices in which families differ, and how it is run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from entangle.errors import UserError
from entangle.models.lora import LoraConfig

NORMS = ("layer", "rms")
FEED_FORWARDS = ("gelu", "swiglu")
REMATS = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of low rotary frequencies.

    Attributes:
      factor: frequencies of long waves are divided by this.
      low_frequency_factor: waves longer than ``original_positions`` over this are stretched whole.
      high_frequency_factor: waves shorter than ``original_positions`` over this are left; between the two it is gradual.
      original_positions: longest sequence before the stretching, in tokens.

    References:
      Grattafiori et al., arXiv 2407.21783, section 3.4.2; the formula is that of the released code.
    """

    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self) -> None:
        """Refuse what has no wavelengths between its two limits."""
        for name in ("factor", "low_frequency_factor", "high_frequency_factor"):
            _require_positive(f"rope scaling: {name}", getattr(self, name))
        _require_count("rope scaling: original_positions", self.original_positions)
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise UserError(
                f"model configuration: rope scaling: low_frequency_factor {self.low_frequency_factor} must be below "
                f"high_frequency_factor {self.high_frequency_factor}"
            )


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions, of halves as in Llama (arXiv 2104.09864).

    Attributes:
      theta: base of the wavelengths.
      scaling: None leaves them as they are.
    """

    theta: float = 10_000.0
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        """Refuse a base that has no powers."""
        _require_positive("rope theta", self.theta)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder; it builds nothing. The defaults are GPT-2's, the presets name the other families.

    Attributes:
      vocab_size: V, rows of the token embedding.
      max_positions: longest sequence, in tokens.
      width: D, a multiple of ``heads`` unless ``head_size`` is given.
      layers: L.
      heads: H.
      hidden: F, width of the feed-forward layer; ``None`` means ``4 * width``.
      norm_epsilon: added to the variance, or mean square, in every norm.
      key_value_heads: K, a divisor of H; ``None`` means H, less is grouped-query attention.
      head_size: width of one head; ``None`` means ``width / heads``.
      norm: ``layer`` (LayerNorm) or ``rms`` (RMSNorm).
      feed_forward: ``gelu`` (two matrices around GELU's tanh form) or ``swiglu`` (gate, up and down around SiLU).
      rope: rotary positions; ``None`` means learned ones.
      fused_qkv: one kernel holds query, key and value.
      qkv_bias: biases of query, key and value.
      out_bias: bias of attention's output.
      feed_forward_bias: biases of the feed-forward matrices.
      qk_norm: RMSNorm of every head's queries and keys, before they are rotated.
      tied: the token embedding is also the head.
      sliding_window: a position sees so many positions, itself included; ``None`` means all before it.
      full_layers: so many first layers see everything all the same.
      lora: low-rank adapters on some of the matrices.
      scan_layers: parameters of all layers stacked ``[L, ...]`` and scanned over: a program of one layer, whatever L is.
      remat: what the backward computes again: ``none``, ``dots`` (all but products with weights), ``full`` (every layer).
      compute_dtype: dtype of the residual stream and of products; ``None`` means that of the parameters.

    Raises:
      UserError: a size is not a positive whole number, one does not divide another, ``norm_epsilon`` is not a positive
        number, or a name is none of those above.

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
    key_value_heads: int | None = None
    head_size: int | None = None
    norm: str = "layer"
    feed_forward: str = "gelu"
    rope: Rope | None = None
    fused_qkv: bool = True
    qkv_bias: bool = True
    out_bias: bool = True
    feed_forward_bias: bool = True
    qk_norm: bool = False
    tied: bool = True
    sliding_window: int | None = None
    full_layers: int = 0
    lora: LoraConfig | None = None
    scan_layers: bool = False
    remat: str = "none"
    compute_dtype: str | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        for name in ("vocab_size", "max_positions", "width", "layers", "heads"):
            _require_count(name, getattr(self, name))
        for name in ("hidden", "key_value_heads", "head_size", "sliding_window"):
            if getattr(self, name) is not None:
                _require_count(name, getattr(self, name))
        if self.head_size is None and self.width % self.heads:
            raise UserError(f"model configuration: width {self.width} is not a multiple of heads {self.heads}")
        if self.heads % self.groups:
            raise UserError(
                f"model configuration: heads {self.heads} is not a multiple of key_value_heads {self.groups}"
            )
        if self.rope is not None and self.head_width % 2:
            raise UserError(f"model configuration: heads of width {self.head_width} cannot be rotated: it must be even")
        _require_positive("norm_epsilon", self.norm_epsilon)
        for name, known in (("norm", NORMS), ("feed_forward", FEED_FORWARDS), ("remat", REMATS)):
            _require_known(name, getattr(self, name), known)
        flags = ("fused_qkv", "qkv_bias", "out_bias", "feed_forward_bias", "qk_norm", "tied", "scan_layers")
        for name in flags:
            _require_known(name, getattr(self, name), (True, False))
        if not isinstance(self.full_layers, int) or self.full_layers < 0:
            raise UserError(f"model configuration: full_layers must be 0 or more, got {self.full_layers!r}")
        _require_known("compute_dtype", self.compute_dtype, (None, *DTYPES))

    @property
    def hidden_width(self) -> int:
        """F, with the default of four times the width filled in."""
        return 4 * self.width if self.hidden is None else self.hidden

    @property
    def head_width(self) -> int:
        """Width of one attention head, with the default of D / H filled in."""
        return self.width // self.heads if self.head_size is None else self.head_size

    @property
    def groups(self) -> int:
        """K, the number of key-value heads, with the default filled in."""
        return self.heads if self.key_value_heads is None else self.key_value_heads

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many positions a position sees, layer by layer; None for all before it."""
        return tuple(None if layer < self.full_layers else self.sliding_window for layer in range(self.layers))

    @property
    def parameters(self) -> int:
        """Number of parameters, those of adapters left out; a tied embedding counts once.

        Example:
          >>> DecoderConfig(vocab_size=50257, max_positions=1024, width=768, layers=12, heads=12).parameters
          124439808
        """
        norm = self.width * (2 if self.norm == "layer" else 1)
        queries, keys = self.heads * self.head_width, self.groups * self.head_width
        attention = (
            2 * self.width * (queries + keys) + self.qkv_bias * (queries + 2 * keys) + self.out_bias * self.width
        )
        attention += 2 * self.head_width * self.qk_norm
        inner = (2 if self.feed_forward == "swiglu" else 1) * self.hidden_width  # of gate and up side by side
        feed_forward = self.width * (inner + self.hidden_width) + self.feed_forward_bias * (inner + self.width)
        embeddings = self.vocab_size * (1 if self.tied else 2) + (self.max_positions if self.rope is None else 0)
        return embeddings * self.width + self.layers * (2 * norm + attention + feed_forward) + norm


def _require_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"model configuration: {name} must be a positive whole number, got {value!r}")


def _require_positive(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not (value > 0 and math.isfinite(value)):
        raise UserError(f"model configuration: {name} must be a positive number, got {value!r}")


def _require_known(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise UserError(f"model configuration: {name} must be one of {', '.join(map(str, known))}, got {value!r}")
