"""Decoders that go by a name: small ones for laptops, and the sizes people use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from entangle.errors import UserError
from entangle.models.config import DecoderConfig, Rope, RopeScaling

_LLAMA_LIKE: dict[str, Any] = {
    "norm": "rms",
    "feed_forward": "swiglu",
    "fused_qkv": False,
    "qkv_bias": False,
    "out_bias": False,
    "feed_forward_bias": False,
    "scan_layers": True,
    "remat": "full",
}
_LLAMA = functools.partial(DecoderConfig, **_LLAMA_LIKE, tied=False)
# Mistral 7B has the same layers.
_LLAMA_8B = functools.partial(_LLAMA, width=4096, layers=32, heads=32, key_value_heads=8, hidden=14336)
_LLAMA_3_1 = RopeScaling(factor=8.0)
_LLAMA_3_2 = RopeScaling(factor=32.0)
_QWEN2 = functools.partial(DecoderConfig, **_LLAMA_LIKE | {"qkv_bias": True}, norm_epsilon=1e-6, rope=Rope(1e6))
_QWEN3 = functools.partial(DecoderConfig, **_LLAMA_LIKE, norm_epsilon=1e-6, rope=Rope(1e6), head_size=128, qk_norm=True)

PRESETS: Mapping[str, Callable[..., DecoderConfig]] = {
    "tiny": functools.partial(DecoderConfig, max_positions=128, width=64, layers=2, heads=2),
    "mini": functools.partial(DecoderConfig, max_positions=256, width=96, layers=3, heads=3),
    "small": functools.partial(DecoderConfig, max_positions=256, width=128, layers=4, heads=4),
    "gpt2": functools.partial(DecoderConfig, max_positions=1024, width=768, layers=12, heads=12),
    "llama3_8b": functools.partial(_LLAMA_8B, max_positions=8192, rope=Rope(5e5)),
    "llama3_1_8b": functools.partial(_LLAMA_8B, max_positions=131_072, rope=Rope(5e5, _LLAMA_3_1)),
    "llama3_1_70b": functools.partial(
        _LLAMA,
        max_positions=131_072,
        width=8192,
        layers=80,
        heads=64,
        key_value_heads=8,
        hidden=28672,
        rope=Rope(5e5, _LLAMA_3_1),
    ),
    "llama3_2_1b": functools.partial(
        DecoderConfig,
        **_LLAMA_LIKE,
        max_positions=131_072,
        width=2048,
        layers=16,
        heads=32,
        key_value_heads=8,
        hidden=8192,
        rope=Rope(5e5, _LLAMA_3_2),
    ),
    "mistral_7b": functools.partial(_LLAMA_8B, max_positions=32_768, rope=Rope(1e6)),
    "qwen2_5_0_5b": functools.partial(
        _QWEN2, max_positions=32_768, width=896, layers=24, heads=14, key_value_heads=2, hidden=4864
    ),
    "qwen2_5_7b": functools.partial(
        _QWEN2, max_positions=32_768, width=3584, layers=28, heads=28, key_value_heads=4, hidden=18944, tied=False
    ),
    "qwen3_0_6b": functools.partial(
        _QWEN3, max_positions=40_960, width=1024, layers=28, heads=16, key_value_heads=8, hidden=3072
    ),
    "qwen3_8b": functools.partial(
        _QWEN3, max_positions=40_960, width=4096, layers=36, heads=32, key_value_heads=8, hidden=12288, tied=False
    ),
}
"""Table of decoders; each entry takes ``vocab_size``, which comes from the tokenizer or from ``VOCABULARIES``."""

VOCABULARIES: Mapping[str, int] = {
    "gpt2": 50_257,
    "llama3_8b": 128_256,
    "llama3_1_8b": 128_256,
    "llama3_1_70b": 128_256,
    "llama3_2_1b": 128_256,
    "mistral_7b": 32_768,
    "qwen2_5_0_5b": 151_936,
    "qwen2_5_7b": 152_064,
    "qwen3_0_6b": 151_936,
    "qwen3_8b": 151_936,
}
"""Rows of the token embedding of the released models."""


def preset(name: str, vocab_size: int | None = None) -> DecoderConfig:
    """Look up a decoder by its name.

    Args:
      name: a key of ``PRESETS``.
      vocab_size: V, from the tokenizer; None takes that of the released model.

    Returns:
      The configuration.

    Raises:
      UserError: there is no such preset, or it has no vocabulary of its own.

    Example:
      >>> preset("gpt2", 50257).layers, preset("llama3_8b").parameters
      (12, 8030261248)
    """
    if name not in PRESETS:
        raise UserError(f"unknown model preset {name!r}: choose from {', '.join(PRESETS)}")
    size = VOCABULARIES.get(name) if vocab_size is None else vocab_size
    if size is None:
        raise UserError(f"model preset {name!r}: its vocabulary comes from the tokenizer")
    return PRESETS[name](vocab_size=size)
