"""Low-rank adapters by themselves: merged into their base, and in the format of PEFT's checkpoints, both ways."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from entangle.errors import UserError
from entangle.models.config import DecoderConfig
from entangle.models.families import FAMILIES
from entangle.models.frozen import split_params
from entangle.models.huggingface_config import family_of
from entangle.models.language_model import language_model
from entangle.models.lora import LoraConfig
from entangle.models.weights import Weights, refuse, written_whole
from entangle.paths import named_leaves
from entangle.types import Params

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HALVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
# What PEFT writes and what changes nothing in what is computed here.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "use_dora": (False,),
    "use_rslora": (False,),
    "use_qalora": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layers_pattern": (None,),
    "exclude_modules": (None, []),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "corda_config": (None,),
    "eva_config": (None,),
    "megatron_config": (None,),
    # Others than these alter the base that they are added to.
    "init_lora_weights": (True, False, "gaussian"),
    "loftq_config": ({}, None),
    "lora_ga_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "use_bdlora": (None, False),
    "ensure_weight_tying": (False,),
}
# What is read, and what says nothing of what is computed.
_READ = {"r", "lora_alpha", "lora_dropout", "target_modules"}
_NOTES = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
}


def merge_adapters(config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
    """Add every adapter's product to its matrix: the same decoder without adapters.

    Args:
      config: with adapters.
      params: all parameters, see ``join_params``.

    Returns:
      The configuration and the parameters without adapters, for ``save_pretrained``.

    Raises:
      UserError: there are no adapters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from entangle import models
      >>> lora = models.LoraConfig(rank=2, alpha=4.0, targets=("qkv",))
      >>> config = models.DecoderConfig(vocab_size=9, max_positions=4, width=4, layers=1, heads=1, lora=lora)
      >>> merged, params = models.merge_adapters(config, models.language_model(config).init(jax.random.key(0)))
      >>> merged.lora is None, sorted(params["layers"]["0"]["attention"]["qkv"])
      (True, ['bias', 'kernel'])
    """
    lora = config.lora
    if lora is None:
        raise UserError("there are no adapters to merge")

    def merged(tree: Params) -> Params:
        if "lora_a" not in tree:
            return {name: merged(node) if isinstance(node, dict) else node for name, node in tree.items()}
        a, b = (tree[name].astype(jnp.float32) for name in ("lora_a", "lora_b"))
        kernel = tree["kernel"].astype(jnp.float32) + lora.scale * jnp.einsum("...ir,...ro->...io", a, b)
        kept = {name: leaf for name, leaf in tree.items() if name not in _HALVES}
        return kept | {"kernel": kernel.astype(tree["kernel"].dtype)}

    return dataclasses.replace(config, lora=None), merged(params)


def save_adapters(folder: str | Path, config: DecoderConfig, adapters: Params, *, base: str = "") -> None:
    """Write adapters as PEFT does: ``PeftModel.from_pretrained(base_model, folder)`` reads them.

    Args:
      folder: where to write; must not exist. It appears whole or not at all.
      config: the decoder, with its adapters.
      adapters: the trained part of the parameters, see ``split_params``.
      base: name or folder of the base model, which PEFT's configuration keeps.

    Raises:
      UserError: the folder exists or cannot be written, there are no adapters, no family of checkpoints has such a decoder,
        or the adapters are not those of ``config``.
    """
    folder = Path(folder)
    lora, tensors = config.lora, list(_tensors(config))
    assert lora is not None
    given = dict(named_leaves(adapters))
    expected = dict(named_leaves(_expected(config)))
    refuse(folder, "adapters missing", [path for path in expected if path not in given])
    refuse(folder, "adapters not understood", sorted(given.keys() - expected.keys()))
    for path, leaf in given.items():
        if leaf.shape != expected[path].shape:
            raise UserError(f"{folder}: adapter {path} has shape {leaf.shape}, expected {expected[path].shape}")
    modules = sorted({".".join(name.removesuffix(".weight").split(".")[-3:-1]) for name, _, _ in tensors})
    attributes = {name: values[0] for name, values in _PLAIN.items() if name in ("peft_type", "task_type", "bias")}
    attributes |= {
        "base_model_name_or_path": base or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": modules,
        "fan_in_fan_out": family_of(config) == "gpt2",
        "inference_mode": True,
    }
    with written_whole(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(attributes, indent=2) + "\n", encoding="utf-8")
        arrays = {
            _PREFIX + name: np.ascontiguousarray(np.asarray(_layer(given[path], layer), np.float32).T)
            for name, path, layer in tensors
        }
        save_file(arrays, partial / TENSORS, metadata={"format": "pt"})
        (partial / TENSORS).chmod((partial / CONFIG).stat().st_mode)


def load_adapters(folder: str | Path, config: DecoderConfig) -> tuple[DecoderConfig, Params]:
    """Read adapters that PEFT or :func:`save_adapters` wrote.

    Args:
      folder: has ``adapter_config.json`` and ``adapter_model.safetensors``.
      config: the base decoder.

    Returns:
      The decoder with adapters, and their parameters, float32.

    Raises:
      UserError: a file is missing or broken, the configuration says something that is not computed here, or a tensor is
        missing, unknown or of another shape. Pickled adapters are never loaded.

    Example:
      >>> import tempfile, jax
      >>> from entangle import models
      >>> lora = models.LoraConfig(rank=2, alpha=4.0, targets=("attention/qkv",))
      >>> base = models.DecoderConfig(vocab_size=9, max_positions=4, width=4, layers=1, heads=1)
      >>> config = dataclasses.replace(base, lora=lora)
      >>> adapters, _ = models.split_params(models.language_model(config).init(jax.random.key(0)))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     models.save_adapters(Path(folder) / "adapter", config, adapters)
      ...     models.load_adapters(Path(folder) / "adapter", base)[0] == config
      True
    """
    folder = Path(folder)
    path = folder / TENSORS
    if not path.is_file():
        pickled = " (adapter_model.bin is pickled and never loaded)" if (folder / "adapter_model.bin").is_file() else ""
        raise UserError(f"{folder}: has no {TENSORS}{pickled}")
    config = dataclasses.replace(config, lora=_read_lora(folder / CONFIG, config))
    shapes, tensors = _expected(config), list(_tensors(config))
    with Weights(path, {path: None}, _PREFIX, "") as weights:
        names = [name for name, _, _ in tensors]
        refuse(path, "tensors missing", [name for name in names if name not in weights.names])
        refuse(path, "tensors not understood", sorted(weights.names - set(names)))
        layers: dict[str, dict[int | None, np.ndarray]] = {}
        for name, parameter, layer in tensors:
            shape = dict(named_leaves(shapes))[parameter].shape[-2:]
            read = weights.reader(name, shape[::-1])
            layers.setdefault(parameter, {})[layer] = read((slice(None), slice(None))).T.astype(np.float32)
    leaves = []
    for parameter, _ in named_leaves(shapes):
        parts = layers[parameter]
        leaves.append(jnp.asarray(parts[None] if None in parts else np.stack([parts[n] for n in sorted(parts)])))  # type: ignore[type-var]
    return config, jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _expected(config: DecoderConfig) -> Params:
    return split_params(jax.eval_shape(language_model(config).init, jax.random.key(0)))[0]


def _layer(leaf: jax.Array, layer: int | None) -> jax.Array:
    return leaf if layer is None else leaf[layer]


def _tensors(config: DecoderConfig) -> Iterator[tuple[str, str, int | None]]:
    """PEFT's names without prefix, our paths, and the layer where ours are stacked."""
    family = FAMILIES[family_of(dataclasses.replace(config, lora=None))]
    for path, _ in named_leaves(_expected(config)):
        rest = path.removeprefix("layers/")
        number, within = (None, rest) if config.scan_layers else (int(rest.split("/")[0]), rest.partition("/")[2])
        matrix, _, half = within.rpartition("/")
        module = family.prefix + family.layer[f"{matrix}/kernel"].name.removesuffix(".weight")
        for layer in range(config.layers) if number is None else (number,):
            yield f"{module.format(layer)}.{_HALVES[half]}", path, layer if number is None else None


def _read_lora(path: Path, config: DecoderConfig) -> LoraConfig:
    """The adapters that a PEFT configuration describes, if all that it says is computed here."""
    try:
        attributes = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = attributes["r"], float(attributes["lora_alpha"])
        targets, dropout = attributes["target_modules"], float(attributes.get("lora_dropout", 0.0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no configuration of PEFT's LoRA: {' '.join(str(error).split())}") from None
    for name, known in _PLAIN.items():
        if name in attributes and attributes[name] not in known:
            raise UserError(f"{path}: {name} = {attributes[name]!r} is not supported, only {known[0]!r}")
    refuse(path, "attributes not understood", sorted(attributes.keys() - _PLAIN.keys() - _READ - _NOTES))
    if not isinstance(targets, list):
        raise UserError(f"{path}: target_modules = {targets!r} is not supported, only a list of names")
    family = FAMILIES[family_of(config)]
    modules = {p.removesuffix("/kernel"): t.name for p, t in family.layer.items() if p.endswith("/kernel")}
    ours = []
    for target in targets:
        found = [p for p, name in modules.items() if f".{name.removesuffix('.weight')}".endswith(f".{target}")]
        if not found:
            raise UserError(f"{path}: target_modules: no matrix of this decoder is called {target!r}")
        ours += found
    return LoraConfig(rank, alpha, tuple(sorted(set(ours))), dropout)
