"""How the families of checkpoints write a decoder down: attributes of ``config.json`` and names of tensors.

Every attribute that is not named here is refused, so that a checkpoint is never computed differently from what it describes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from entangle.errors import UserError
from entangle.models.config import DecoderConfig, Rope, RopeScaling

# Attributes that leave next-token logits as they are: dropout acts in PyTorch's training mode only, and the rest is about
# generation, classification heads or the library itself.
_WITHOUT_EFFECT = """
_name_or_path name_or_path architectures transformers_version torch_dtype dtype use_cache initializer_range
chunk_size_feed_forward gradient_checkpointing is_decoder _attn_implementation attention_dropout
bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id prefix tokenizer_class
output_attentions output_hidden_states output_past return_dict torchscript use_bfloat16
id2label label2id num_labels _num_labels predict_special_tokens finetuning_task problem_type task_specific_params
do_sample early_stopping max_length min_length num_beams num_return_sequences temperature top_k top_p typical_p
repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids
"""
WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT.split())
# ``reorder_and_upcast_attn`` scales before the product instead of after it; ``n_ctx`` sized a mask in old versions.
_GPT2_WITHOUT_EFFECT = """
n_ctx resid_pdrop embd_pdrop attn_pdrop reorder_and_upcast_attn
summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
"""


class Tensor(NamedTuple):
    """Where a checkpoint has one of our parameters.

    Attributes:
      name: of the tensor, without prefix; ``{}`` stands for the number of the layer.
      transposed: whether it is stored ``[out, in]``.
    """

    name: str
    transposed: bool = False


class Family(NamedTuple):
    """One family of checkpoints.

    Attributes:
      sizes: attribute to the field of DecoderConfig that it is; those in ``optional`` may be missing.
      optional: see sizes.
      supported: attribute to the values that this decoder computes; a missing one means the first.
      without_effect: attributes that change nothing here, besides ``WITHOUT_EFFECT``.
      read: all attributes to the fields that no single attribute is, with attributes taken note of as ``understood``.
      understood: attributes that ``read`` understands.
      write: a configuration to these attributes, and to the architecture's name.
      fits: whether a configuration is of this family.
      top: path of a parameter outside of the layers to its tensor.
      layer: path within a layer to its tensor.
      prefix: that names of the decoder's tensors may have; the head's have none.
      ignored: regular expression of stored tensors that are no parameters.
    """

    sizes: Mapping[str, str]
    optional: tuple[str, ...]
    supported: Mapping[str, tuple[Any, ...]]
    without_effect: frozenset[str]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    understood: frozenset[str]
    write: Callable[[DecoderConfig], dict[str, Any]]
    fits: Callable[[DecoderConfig], bool]
    top: Mapping[str, Tensor]
    layer: Mapping[str, Tensor]
    prefix: str
    ignored: str


_NORM = {"scale": "weight", "bias": "bias"}
_MATRIX = {"kernel": "weight", "bias": "bias"}


def _tensors(
    modules: Mapping[str, str], leaves: Mapping[str, str], transposed: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    return {
        f"{ours}/{leaf}": Tensor(f"{theirs}.{stored}", leaf in transposed)
        for ours, theirs in modules.items()
        for leaf, stored in leaves.items()
    }


_EXECUTION = frozenset({"lora", "scan_layers", "remat", "compute_dtype"})


def _written_alike(config: DecoderConfig, other: DecoderConfig, sizes: Mapping[str, str]) -> bool:
    """Whether two decoders differ only in sizes and in what no checkpoint says."""
    names = {field.name for field in dataclasses.fields(config)} - {*sizes.values(), *_EXECUTION}
    return all(getattr(config, name) == getattr(other, name) for name in names)


_GPT2_SIZES = {
    "vocab_size": "vocab_size",
    "n_positions": "max_positions",
    "n_embd": "width",
    "n_layer": "layers",
    "n_head": "heads",
    "n_inner": "hidden",
    "layer_norm_epsilon": "norm_epsilon",
}
_GPT2 = Family(
    sizes=_GPT2_SIZES,
    optional=("n_inner", "layer_norm_epsilon"),
    # Both activation names are the tanh form of GELU.
    supported={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "is_encoder_decoder": (False,),
        "tie_word_embeddings": (True,),
        "pruned_heads": ({}, None),
        "n_special": (0,),
    },
    without_effect=frozenset(_GPT2_WITHOUT_EFFECT.split()),
    read=lambda attributes: {},
    understood=frozenset(),
    write=lambda config: {
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    },
    fits=lambda config: _written_alike(config, DecoderConfig(1, 1, 1, 1, 1), _GPT2_SIZES),
    top={
        "token_embedding": Tensor("wte.weight"),
        "position_embedding": Tensor("wpe.weight"),
        **_tensors({"final_norm": "ln_f"}, _NORM),
    },
    layer={
        **_tensors({"attention_norm": "h.{}.ln_1"}, _NORM),
        **_tensors({"attention/qkv": "h.{}.attn.c_attn", "attention/out": "h.{}.attn.c_proj"}, _MATRIX),
        **_tensors({"feed_forward_norm": "h.{}.ln_2"}, _NORM),
        **_tensors({"feed_forward/up": "h.{}.mlp.c_fc", "feed_forward/down": "h.{}.mlp.c_proj"}, _MATRIX),
    },
    prefix="transformer.",
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",
)

_ROPE_ATTRIBUTES = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
_LLAMA3_ROPE = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_positions",
}


def _read_rope(attributes: Mapping[str, Any]) -> Rope:
    """Rotary positions, as version 5 of transformers writes them and as those before did."""
    both = [found for name in ("rope_parameters", "rope_scaling") if (found := attributes.get(name))]
    if len(both) == 2 and both[0] != both[1]:
        raise UserError("rope_parameters and rope_scaling are both given and differ")
    described = both[0] if both else {}
    if not isinstance(described, dict):
        raise UserError(f"rope_parameters must be an object, got {described!r}")
    kind = described.get("rope_type", described.get("type", "default"))
    theta = described.get("rope_theta", attributes.get("rope_theta", 10_000.0))
    if kind not in ("default", "llama3"):
        raise UserError(f"rope_type = {kind!r} is not supported, only 'default' or 'llama3'")
    known = {"rope_type", "type", "rope_theta", *(_LLAMA3_ROPE if kind == "llama3" else ())}
    if unknown := sorted(described.keys() - known):
        raise UserError(f"attributes of rope_parameters not understood: {', '.join(unknown)}")
    if kind == "default":
        return Rope(theta)
    if missing := [name for name in _LLAMA3_ROPE if name not in described]:
        raise UserError(f"attributes of rope_parameters missing: {', '.join(missing)}")
    return Rope(theta, RopeScaling(**{ours: described[theirs] for theirs, ours in _LLAMA3_ROPE.items()}))


def _write_rope(rope: Rope | None) -> dict[str, Any]:
    assert rope is not None
    if rope.scaling is None:
        return {"rope_type": "default", "rope_theta": rope.theta}
    scaling = {theirs: getattr(rope.scaling, ours) for theirs, ours in _LLAMA3_ROPE.items()}
    return {"rope_type": "llama3", "rope_theta": rope.theta, **scaling}


_LLAMA_FIELDS: Mapping[str, Any] = {
    "norm": "rms",
    "feed_forward": "swiglu",
    "fused_qkv": False,
    "feed_forward_bias": False,
}


def _is_llama_like(config: DecoderConfig, **fields: Any) -> bool:
    wanted = {**_LLAMA_FIELDS, "out_bias": False, **fields}
    return config.rope is not None and all(getattr(config, name) == value for name, value in wanted.items())


_LLAMA_SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "key_value_heads",
    "head_dim": "head_size",
    "intermediate_size": "hidden",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tied",
}
_LLAMA_TOP = {
    "token_embedding": Tensor("embed_tokens.weight"),
    "head_embedding": Tensor("lm_head.weight"),
    "final_norm/scale": Tensor("norm.weight"),
}
_LLAMA_NORMS = {
    "attention_norm": "layers.{}.input_layernorm",
    "feed_forward_norm": "layers.{}.post_attention_layernorm",
    "attention/query_norm": "layers.{}.self_attn.q_norm",
    "attention/key_norm": "layers.{}.self_attn.k_norm",
}
_LLAMA_MATRICES = {
    "attention/query": "layers.{}.self_attn.q_proj",
    "attention/key": "layers.{}.self_attn.k_proj",
    "attention/value": "layers.{}.self_attn.v_proj",
    "attention/out": "layers.{}.self_attn.o_proj",
    "feed_forward/gate": "layers.{}.mlp.gate_proj",
    "feed_forward/up": "layers.{}.mlp.up_proj",
    "feed_forward/down": "layers.{}.mlp.down_proj",
}
_LLAMA_LAYER = _tensors(_LLAMA_NORMS, {"scale": "weight"}) | _tensors(_LLAMA_MATRICES, _MATRIX, ("kernel",))


def _llama_like(
    architecture: str,
    read: Callable[[Mapping[str, Any]], dict[str, Any]],
    write: Callable[[DecoderConfig], dict[str, Any]],
    fits: Callable[[DecoderConfig], bool],
    understood: tuple[str, ...] = (),
    *,
    supported: Mapping[str, tuple[Any, ...]] | None = None,
) -> Family:
    return Family(
        sizes=_LLAMA_SIZES,
        optional=("num_key_value_heads", "head_dim", "tie_word_embeddings"),
        supported={
            "hidden_act": ("silu",),
            "pretraining_tp": (1,),
            "is_encoder_decoder": (False,),
            **(supported or {}),
        },
        without_effect=frozenset(),
        read=lambda attributes: {
            "rope": _read_rope(attributes),
            "tied": attributes.get("tie_word_embeddings", False),
            **_LLAMA_FIELDS,
            **read(attributes),
        },
        understood=_ROPE_ATTRIBUTES | frozenset(understood),
        write=lambda config: {
            "architectures": [architecture],
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "rope_parameters": _write_rope(config.rope),
            **write(config),
        },
        fits=fits,
        top=_LLAMA_TOP,
        layer=_LLAMA_LAYER,
        prefix="model.",
        ignored=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    )


def _no_window(config: DecoderConfig) -> bool:
    return config.sliding_window is None


def _read_qwen_windows(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen's first layers see everything and the others a window; ``layer_types``, where it is there, must say so too."""
    layers, full = attributes["num_hidden_layers"], attributes.get("max_window_layers", 28)
    for name, count in (("num_hidden_layers", layers), ("max_window_layers", full)):
        if not isinstance(count, int):
            raise UserError(f"{name} must be a whole number, got {count!r}")
    window = attributes.get("sliding_window") if attributes.get("use_sliding_window", False) else None
    full = 0 if window is None else min(full, layers)
    kinds = ["full_attention" if window is None or layer < full else "sliding_attention" for layer in range(layers)]
    if (types := attributes.get("layer_types")) is not None and types != kinds:
        raise UserError(
            "layer_types is not supported where it is another than use_sliding_window, sliding_window and "
            "max_window_layers say"
        )
    return {"sliding_window": window, "full_layers": full}


def _write_qwen_windows(config: DecoderConfig) -> dict[str, Any]:
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": config.full_layers,
    }


_QWEN_WINDOWS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

FAMILIES: Mapping[str, Family] = {
    "gpt2": _GPT2,
    "qwen3": _llama_like(
        "Qwen3ForCausalLM",
        lambda attributes: {
            "qkv_bias": attributes.get("attention_bias", False),
            "out_bias": attributes.get("attention_bias", False),
            "qk_norm": True,
            # where it is not said, transformers take this and not D / H
            "head_size": attributes.get("head_dim", 128),
            **_read_qwen_windows(attributes),
        },
        lambda config: {"attention_bias": config.qkv_bias, **_write_qwen_windows(config)},
        lambda config: _is_llama_like(config, qk_norm=True, out_bias=config.qkv_bias),
        ("attention_bias", *_QWEN_WINDOWS),
    ),
    "qwen2": _llama_like(
        "Qwen2ForCausalLM",
        lambda attributes: {"qkv_bias": True, "out_bias": False, **_read_qwen_windows(attributes)},
        _write_qwen_windows,
        lambda config: _is_llama_like(config, qk_norm=False, qkv_bias=True),
        _QWEN_WINDOWS,
    ),
    "mistral": _llama_like(
        "MistralForCausalLM",
        lambda attributes: {
            "qkv_bias": False,
            "out_bias": False,
            # where it is not said, transformers take this
            "sliding_window": attributes.get("sliding_window", 4096),
        },
        lambda config: {"sliding_window": config.sliding_window},
        lambda config: (
            _is_llama_like(config, qk_norm=False, qkv_bias=False) and not _no_window(config) and not config.full_layers
        ),
        ("sliding_window",),
    ),
    "llama": _llama_like(
        "LlamaForCausalLM",
        lambda attributes: {
            "qkv_bias": attributes.get("attention_bias", False),
            "out_bias": attributes.get("attention_bias", False),
        },
        lambda config: {"attention_bias": config.qkv_bias, "mlp_bias": False},
        lambda config: _is_llama_like(config, qk_norm=False, out_bias=config.qkv_bias) and _no_window(config),
        ("attention_bias",),
        supported={"mlp_bias": (False,)},
    ),
}
"""``model_type`` to its family; a configuration without a checkpoint is written as the first that fits."""
