"""Decoder language models, seen by the rest of the project as pure functions of parameters and a batch.

The border is :func:`entangle.models.language_model.language_model`: it splits the Flax NNX module once, and nothing
outside this package handles a module. :func:`entangle.models.adapter.log_prob_function` does it for other people's modules.
"""

from entangle import extras

extras.require("train", "flax", "safetensors")

from entangle.models.adapter import log_prob_function
from entangle.models.config import PRESETS, DecoderConfig, preset
from entangle.models.decoder import Decoder, layer_of
from entangle.models.huggingface import load_gpt2, save_gpt2
from entangle.models.language_model import LanguageModel, language_model
from entangle.models.token_statistics import token_statistics

__all__ = [
    "PRESETS",
    "Decoder",
    "DecoderConfig",
    "LanguageModel",
    "language_model",
    "layer_of",
    "load_gpt2",
    "log_prob_function",
    "preset",
    "save_gpt2",
    "token_statistics",
]
