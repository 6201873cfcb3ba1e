"""What a checkpoint's ``config.json`` may say: sizes, values that must hold, attributes without effect here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from entangle.errors import UserError
from entangle.models.config import DecoderConfig
from entangle.models.families import FAMILIES, WITHOUT_EFFECT, Family


def read_config(path: Path) -> tuple[Family, DecoderConfig]:
    """Read a decoder from a ``config.json``.

    Args:
      path: the file.

    Returns:
      The family, and the decoder.

    Raises:
      UserError: the file is not a JSON object, the family is not supported, an attribute is unknown or missing, or a value
        is not supported.

    Example:
      >>> import tempfile
      >>> config = DecoderConfig(vocab_size=10, max_positions=8, width=4, layers=1, heads=2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = (path := Path(folder) / "config.json").write_text(json.dumps(config_json(config)))
      ...     read_config(path)[1] == config
      True
    """
    attributes = _read_object(path)
    if "model_type" not in attributes:
        raise UserError(f"{path}: attribute 'model_type' is missing")
    kind = attributes["model_type"]
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        known = ", ".join(map(repr, sorted(FAMILIES)))
        raise UserError(f"{path}: model_type = {kind!r} is not supported, only {known}")
    try:
        return family, _read(family, attributes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read(family: Family, attributes: dict[str, Any]) -> DecoderConfig:
    for name, supported in family.supported.items():
        if name in attributes and attributes[name] not in supported:
            expected = " or ".join(map(repr, supported))
            raise UserError(f"{name} = {attributes[name]!r} is not supported, only {expected}")
    known = {
        *family.sizes,
        *family.supported,
        *family.without_effect,
        *family.understood,
        *WITHOUT_EFFECT,
        "model_type",
    }
    if unknown := sorted(attributes.keys() - known):
        raise UserError(f"attributes not understood: {', '.join(unknown)}")
    if missing := [name for name in family.sizes if name not in attributes and name not in family.optional]:
        raise UserError(f"attributes missing: {', '.join(missing)}")
    sizes = {ours: attributes[theirs] for theirs, ours in family.sizes.items() if theirs in attributes}
    config = DecoderConfig(**sizes | family.read(attributes))
    # a size that is the default is left to it, so that a configuration is written down in one way
    groups = None if config.groups == config.heads else config.key_value_heads
    size = None if config.head_width * config.heads == config.width else config.head_size
    return dataclasses.replace(config, key_value_heads=groups, head_size=size)


def config_json(config: DecoderConfig) -> dict[str, Any]:
    """Return the attributes of a ``config.json`` that describes the decoder, without dropout and special tokens.

    Args:
      config: the decoder; adapters, scanning and precision are not described.

    Returns:
      JSON-ready attributes.

    Raises:
      UserError: no family of checkpoints has such a decoder.

    Example:
      >>> config_json(DecoderConfig(vocab_size=10, max_positions=8, width=4, layers=1, heads=2))["n_embd"]
      4
    """
    kind = family_of(config)
    family = FAMILIES[kind]
    return {
        "model_type": kind,
        **{theirs: getattr(config, ours) for theirs, ours in family.sizes.items()},
        **family.write(config),
        **_filled_in(family, config),
        **dict.fromkeys(("bos_token_id", "eos_token_id")),
        "dtype": "float32",
    }


def _filled_in(family: Family, config: DecoderConfig) -> dict[str, int]:
    """Sizes that other readers would fill in in another way."""
    sizes = {"key_value_heads": config.groups, "head_size": config.head_width}
    return {theirs: sizes[ours] for theirs, ours in family.sizes.items() if ours in sizes}


def family_of(config: DecoderConfig) -> str:
    """The ``model_type`` under which a decoder is written.

    Raises:
      UserError: no family of checkpoints has such a decoder.

    Example:
      >>> family_of(DecoderConfig(vocab_size=10, max_positions=8, width=4, layers=1, heads=2))
      'gpt2'
    """
    for kind, family in FAMILIES.items():
        if family.fits(config):
            return kind
    raise UserError("model configuration: no family of checkpoints has such a decoder, so it cannot be exported")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        attributes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {' '.join(str(error).split())}") from None
    if not isinstance(attributes, dict):
        raise UserError(f"{path}: must hold a JSON object, got {type(attributes).__name__}")
    return attributes
