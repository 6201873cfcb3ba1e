import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from entangle.errors import UserError
from entangle.models import DecoderConfig, language_model, load_pretrained, save_pretrained

ATTRIBUTES = {
    "model_type": "gpt2",
    "vocab_size": 13,
    "n_positions": 8,
    "n_embd": 12,
    "n_layer": 2,
    "n_head": 3,
    "n_inner": 20,
    "layer_norm_epsilon": 0.03,
}


@pytest.fixture
def tensors(draw_tensors) -> dict[str, np.ndarray]:
    return draw_tensors(seed=0, vocab=13, positions=8, width=12, layers=2, hidden=20)


def write(folder: Path, tensors, **changes) -> Path:
    """Write a checkpoint by hand; a change to ``None`` removes the attribute."""
    folder.mkdir(exist_ok=True)
    attributes = {name: value for name, value in (ATTRIBUTES | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(attributes))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_logits_equal_an_independent_numpy_forward(tmp_path, tensors, naive_logits, heads, prefix):
    folder = write(tmp_path / "a", {f"{prefix}{name}": tensor for name, tensor in tensors.items()}, n_head=heads)
    config, params = load_pretrained(folder)
    tokens = np.array([[1, 12, 0, 7, 7, 3, 4, 9], [5, 5, 5, 2, 11, 0, 1, 8]], np.int32)
    expected = np.stack([naive_logits(tensors, heads, 0.03, row) for row in tokens])
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(language_model(config).logits(params, tokens), expected, rtol=0, atol=1e-5)


def test_defaults_of_absent_attributes_are_those_of_transformers(tmp_path, draw_tensors):
    folder = write(tmp_path / "a", draw_tensors(0, 13, 8, 12, 2, hidden=48), n_inner=None, layer_norm_epsilon=None)
    assert load_pretrained(folder)[0] == DecoderConfig(13, 8, 12, 2, 3, hidden=None, norm_epsilon=1e-5)


def test_real_gpt2_configuration_is_understood(tmp_path, tensors):
    # The attributes that the configuration of the released GPT-2 has beside the shapes, and those transformers 5 adds.
    write(
        tmp_path / "a",
        tensors,
        activation_function="gelu_new",
        architectures=["GPT2LMHeadModel"],
        attn_pdrop=0.1,
        bos_token_id=50256,
        embd_pdrop=0.1,
        eos_token_id=50256,
        initializer_range=0.02,
        n_ctx=1024,
        resid_pdrop=0.1,
        summary_activation="tanh",
        summary_first_dropout=0.1,
        summary_proj_to_labels=True,
        summary_type="cls_index",
        summary_use_proj=True,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
        add_cross_attention=False,
        dtype="float32",
        reorder_and_upcast_attn=False,
        scale_attn_by_inverse_layer_idx=False,
        scale_attn_weights=True,
        tie_word_embeddings=True,
        transformers_version="5.23.0",
        use_cache=True,
    )
    assert load_pretrained(tmp_path / "a")[0].vocab_size == 13


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_checkpoints_are_read_to_float32_exactly(tmp_path, tensors, dtype):
    half = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    with pytest.raises(UserError, match="parameters of dtype int8 are not read: choose from float32, bfloat16"):
        load_pretrained(write(tmp_path / "b", half), dtype="int8")
    _, params = load_pretrained(write(tmp_path / "a", half))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(params["token_embedding"], half["wte.weight"].astype(np.float32))


def test_causal_masks_and_a_tied_head_are_accepted(tmp_path, tensors):
    masks = {"h.0.attn.bias": np.tril(np.ones((1, 1, 8, 8), bool)), "h.1.attn.masked_bias": np.array(-1e4, np.float32)}
    folder = write(tmp_path / "a", tensors | masks | {"lm_head.weight": tensors["wte.weight"].copy()})
    _, params = load_pretrained(folder)
    np.testing.assert_array_equal(params["token_embedding"], tensors["wte.weight"])


def test_export_and_import_return_the_same_parameters(tmp_path, tensors):
    config, params = load_pretrained(write(tmp_path / "a", tensors))
    save_pretrained(tmp_path / "deep" / "b", config, params)
    config_again, params_again = load_pretrained(tmp_path / "deep" / "b")
    assert config_again == config
    jax.tree.map(np.testing.assert_array_equal, params_again, params)
    written = load_file(tmp_path / "deep" / "b" / "model.safetensors")
    assert {name.removeprefix("transformer.") for name in written} == set(tensors)
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gptj"},
            "model_type = 'gptj' is not supported, only 'gpt2', 'llama', 'mistral', 'qwen2', 'qwen3'",
        ),
        ({"model_type": None}, "attribute 'model_type' is missing"),
        ({"activation_function": "relu"}, "activation_function = 'relu' is not supported"),
        ({"activation_function": "gelu"}, "activation_function = 'gelu' is not supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True is not supported"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention = True is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False is not supported"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads = {'0': [1]} is not supported"),
        ({"rope_theta": 1e4, "alibi": True}, "attributes not understood: alibi, rope_theta"),
        ({"n_embd": None, "n_head": None}, "attributes missing: n_embd, n_head"),
        ({"n_head": 5}, "width 12 is not a multiple of heads 5"),
        ({"n_layer": "2"}, "layers must be a positive whole number, got '2'"),
    ],
)
def test_configurations_computed_otherwise_are_refused_by_name_and_value(tmp_path, tensors, change, message):
    folder = write(tmp_path / "a", tensors, **change)
    with pytest.raises(UserError, match=re.escape(f"{folder / 'config.json'}: ") + ".*" + re.escape(message)):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("h.1.ln_2.bias"), "tensors missing: h.1.ln_2.bias"),
        (lambda t: t.update({"score.weight": t["ln_f.bias"]}), "tensors not understood: score.weight"),
        (lambda t: t.update({"h.2.ln_1.bias": t["ln_f.bias"]}), "tensors not understood: h.2.ln_1.bias"),
        (lambda t: t.update({"transformer.ln_f.bias": t["ln_f.bias"]}), "ln_f.bias is there with and without"),
        (
            lambda t: t.update({"h.0.mlp.c_fc.weight": t["h.0.mlp.c_fc.weight"].T.copy()}),
            "tensor h.0.mlp.c_fc.weight has shape (20, 12), expected (12, 20)",
        ),
        (lambda t: t.update({"ln_f.bias": np.ones(12)}), "tensor ln_f.bias has type F64, expected one of F32"),
        (
            lambda t: t.update({"lm_head.weight": t["wte.weight"] + 1}),
            "lm_head.weight differs from the token embedding",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith("h.1.")],
            "tensors missing: h.1.ln_1.weight, h.1.ln_1.bias, h.1.attn.c_attn.weight, h.1.attn.c_attn.bias, "
            "h.1.attn.c_proj.weight and 7 more",
        ),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_refused_by_name(tmp_path, tensors, change, message):
    change(tensors)
    folder = write(tmp_path / "a", tensors)
    with pytest.raises(UserError, match=re.escape(f"{folder / 'model.safetensors'}: ") + ".*" + re.escape(message)):
        load_pretrained(folder)


def remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: remove(f, "config.json"), "has no config.json"),
        (lambda f: remove(f, "model.safetensors"), "has no model.safetensors"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "has pytorch_model.bin only, which is pickled and never loaded; convert to safetensors",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "model.safetensors.index.json"),
            "is no index of safetensors files",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"not a checkpoint"), "cannot be read as safetensors"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-4]),
            "cannot be read as safetensors",
        ),
        (lambda f: (f / "config.json").write_text('{"model_type": '), "cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object, got list"),
        (lambda f: f.rename(f.with_name("elsewhere")), "no such folder"),
    ],
)
def test_broken_folders_are_refused_in_one_line_with_the_path(tmp_path, tensors, change, message):
    folder = write(tmp_path / "a", tensors)
    change(folder)
    with pytest.raises(UserError, match=re.escape(str(folder)) + ".*" + re.escape(message)) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_export_never_overwrites(tmp_path, tensors):
    config, params = load_pretrained(write(tmp_path / "a", tensors))
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises(UserError, match="already exists; nothing was written"):
        save_pretrained(tmp_path / "a", config, jax.tree.map(jnp.zeros_like, params))
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_a_failed_export_leaves_nothing_behind(tmp_path, tensors, monkeypatch):
    config, params = load_pretrained(write(tmp_path / "a", tensors))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("entangle.models.weights.save_file", full)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'b'}: cannot be written: ") + ".*No space left"):
        save_pretrained(tmp_path / "b", config, params)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_parameters_of_another_configuration_are_not_exported(tmp_path, tensors):
    config, params = load_pretrained(write(tmp_path / "a", tensors))
    extra = params | {"adapter": jnp.zeros(2)}
    with pytest.raises(UserError, match="parameters not understood: adapter"):
        save_pretrained(tmp_path / "b", config, extra)
    with pytest.raises(UserError, match="parameters missing: final_norm/bias, final_norm/scale"):
        save_pretrained(tmp_path / "b", config, {name: leaf for name, leaf in params.items() if name != "final_norm"})
    with pytest.raises(UserError, match=re.escape("parameter token_embedding has shape (2, 12), expected (13, 12)")):
        save_pretrained(tmp_path / "b", config, params | {"token_embedding": params["token_embedding"][:2]})
    assert not (tmp_path / "b").exists()
