import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle.errors import UserError
from entangle.models import (
    LoraConfig,
    join_params,
    language_model,
    load_adapters,
    merge_adapters,
    preset,
    save_adapters,
    split_params,
)

SIZES = {"width": 8, "layers": 2, "heads": 4, "max_positions": 16}
GROUPED = {"key_value_heads": 2, "hidden": 6}
CONFIGS = {
    "gpt2": dataclasses.replace(
        preset("gpt2", 13), **SIZES, lora=LoraConfig(2, 6.0, ("attention/qkv", "feed_forward/down"))
    ),
    "llama": dataclasses.replace(
        preset("llama3_2_1b", 13),
        **SIZES,
        **GROUPED,
        lora=LoraConfig(3, 6.0, ("attention/key", "attention/query", "feed_forward/down"), 0.25),
    ),
}
TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5)


def drawn(config, seed=0):
    shapes = jax.eval_shape(language_model(config).init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scanned", [False, True])
def test_written_and_read_they_are_the_same(tmp_path, name, scanned):
    config = dataclasses.replace(CONFIGS[name], scan_layers=scanned)
    adapters, _ = split_params(drawn(config))
    save_adapters(tmp_path / "a", config, adapters, base="base/model")
    again, found = load_adapters(tmp_path / "a", dataclasses.replace(config, lora=None))
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, found, adapters)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base/model"
    with pytest.raises(UserError, match="already exists; nothing was written"):
        save_adapters(tmp_path / "a", config, adapters)


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_they_compute_the_same(name):
    params = drawn(CONFIGS[name])
    expected = language_model(CONFIGS[name]).logits(params, TOKENS)
    config, merged = merge_adapters(CONFIGS[name], params)
    _, base = split_params(params)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    np.testing.assert_allclose(language_model(config).logits(merged, TOKENS), expected, rtol=0, atol=1e-5)
    assert np.abs(language_model(config).logits(base, TOKENS) - expected).max() > 1e-2
    with pytest.raises(UserError, match="no adapters to merge"):
        merge_adapters(config, merged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora = True is not supported, only False"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported, only 'LORA'"),
        ({"target_modules": "all-linear"}, "target_modules = 'all-linear' is not supported, only a list of names"),
        ({"target_modules": ["wq"]}, "no matrix of this decoder is called 'wq'"),
        ({"target_modules": ["q_proj"]}, "tensors not understood: model.layers.0.mlp.down_proj.lora_A.weight"),
        ({"target_modules": ["o_proj", "q_proj"]}, "tensors missing: model.layers.0.self_attn.o_proj.lora_A.weight"),
        ({"r": 2}, "has shape (3, 8), expected (2, 8)"),
        ({"lora_alpha": None}, "is no configuration of PEFT's LoRA"),
        ({"lora_dropout": None}, "is no configuration of PEFT's LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported, only True"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config = {'loftq_bits': 4} is not supported"),
        ({"nonsense": 1}, "adapter_config.json: attributes not understood: nonsense"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path, change, message):
    config = CONFIGS["llama"]
    save_adapters(tmp_path / "a", config, split_params(drawn(config))[0])
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=re.escape(message)):
        load_adapters(tmp_path / "a", dataclasses.replace(config, lora=None))


def test_pickled_adapters_are_never_loaded(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors \(adapter_model.bin is pickled"):
        load_adapters(tmp_path, dataclasses.replace(CONFIGS["llama"], lora=None))


def test_a_name_that_several_matrices_end_in_adapts_them_all(tmp_path):
    config = dataclasses.replace(CONFIGS["gpt2"], lora=LoraConfig(2, 6.0, ("attention/out", "feed_forward/down")))
    adapters, _ = split_params(drawn(config))
    save_adapters(tmp_path / "a", config, adapters)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["c_proj"]}))
    again, found = load_adapters(tmp_path / "a", dataclasses.replace(config, lora=None))
    jax.tree.map(np.testing.assert_array_equal, found, adapters)
    assert again.lora == config.lora and join_params(found, {}) == found
