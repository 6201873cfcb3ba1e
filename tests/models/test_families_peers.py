"""All families in both directions against ``transformers`` itself; needs the extra ``peers``."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entangle.models import language_model, load_pretrained, save_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.peers

SIZES = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,  # so that some waves are long, some short and some between the two
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama": ("Llama", {}),
    "llama3 rope, tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama biases": ("Llama", {"attention_bias": True, "head_dim": 6}),
    "mistral window": ("Mistral", {"sliding_window": 5}),
    "mistral without window": ("Mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 0.03}),
    "qwen2 windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 10}),
    "qwen3 biases, tied, theta": (
        "Qwen3",
        {
            "head_dim": 4,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 37, (3, 19)).astype(np.int32)


def their_model(name: str):
    """A random model in evaluation mode; everything is drawn, biases and norms too."""
    family, changes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.float().numpy()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scan", [False, True])
def test_imported_checkpoint_has_their_logits(tmp_path, name, scan):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    config, params = load_pretrained(tmp_path / "theirs", scan_layers=scan)
    expected = their_logits(theirs)
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(jax.jit(language_model(config).logits)(params, TOKENS), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_several_files_with_an_index_are_one_checkpoint(tmp_path, name):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "several", max_shard_size="8KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    one, several = (load_pretrained(tmp_path / folder) for folder in ("one", "several"))
    assert one[0] == several[0]
    jax.tree.map(np.testing.assert_array_equal, one[1], several[1])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("file_bytes", [10_000, 5_000_000_000])
def test_exported_checkpoint_is_their_model_again(tmp_path, name, file_bytes):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    config, params = load_pretrained(tmp_path / "theirs", scan_layers=True)
    save_pretrained(tmp_path / "ours", config, params, file_bytes=file_bytes)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(theirs) or config.sliding_window is None  # Mistral without a window is written as Llama
    np.testing.assert_array_equal(their_logits(again), their_logits(theirs))
    assert dataclasses.replace(load_pretrained(tmp_path / "ours")[0], scan_layers=True) == config


@pytest.mark.parametrize("name", ["llama3 rope, tied", "qwen3"])
def test_attributes_of_older_versions_are_read(tmp_path, name):
    their_model(name).save_pretrained(tmp_path / "theirs")
    expected, _ = load_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    attributes = json.loads(path.read_text())
    rope = attributes.pop("rope_parameters")
    attributes["rope_theta"] = rope.pop("rope_theta")
    attributes["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    attributes["torch_dtype"] = attributes.pop("dtype")
    path.write_text(json.dumps(attributes))
    assert load_pretrained(tmp_path / "theirs")[0] == expected


def test_bfloat16_checkpoint_is_read_as_it_is(tmp_path):
    their_model("qwen2").to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    # read again: ``to`` has rounded the rotary frequencies, too, which no checkpoint has
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    config, params = load_pretrained(tmp_path / "theirs", dtype="bfloat16", compute_dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    logits = jax.jit(language_model(config).logits)(params, TOKENS)
    np.testing.assert_allclose(logits, their_logits(theirs), rtol=0, atol=2e-5)
