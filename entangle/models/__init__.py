"""Decoder language models, seen by the rest of the project as pure functions of parameters and a batch.

The border is :func:`entangle.models.language_model.language_model`: it splits the Flax NNX module once, and nothing
outside this package handles a module. :func:`entangle.models.adapter.log_prob_function` does it for other people's modules.
"""

from entangle import extras

extras.require("train", "flax", "safetensors")

from entangle.models.adapter import log_prob_function
from entangle.models.config import DecoderConfig, Rope, RopeScaling
from entangle.models.decoder import Decoder, layer_of
from entangle.models.frozen import checksum, is_adapter, join_params, on_frozen, split_params
from entangle.models.huggingface import load_pretrained, save_pretrained
from entangle.models.language_model import LanguageModel, language_model
from entangle.models.lora import LORA_PRESETS, LoraConfig, lora_config
from entangle.models.peft import load_adapters, merge_adapters, save_adapters
from entangle.models.presets import PRESETS, VOCABULARIES, preset
from entangle.models.token_statistics import token_statistics

__all__ = [
    "LORA_PRESETS",
    "PRESETS",
    "VOCABULARIES",
    "Decoder",
    "DecoderConfig",
    "LanguageModel",
    "LoraConfig",
    "Rope",
    "RopeScaling",
    "checksum",
    "is_adapter",
    "join_params",
    "language_model",
    "layer_of",
    "load_adapters",
    "load_pretrained",
    "log_prob_function",
    "lora_config",
    "merge_adapters",
    "on_frozen",
    "preset",
    "save_adapters",
    "save_pretrained",
    "split_params",
    "token_statistics",
]
