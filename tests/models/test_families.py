import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from entangle import geometry
from entangle.errors import UserError
from entangle.models import (
    Decoder,
    LoraConfig,
    Rope,
    RopeScaling,
    language_model,
    load_pretrained,
    preset,
    save_pretrained,
)
from entangle.models.attention import rotated, rotation, sees
from entangle.models.linear import Dropout
from tests.toy import draw_pairs

SMALL = {"width": 8, "layers": 2, "heads": 4, "key_value_heads": 2, "hidden": 6, "max_positions": 16}
FAMILIES = {
    "llama": dataclasses.replace(preset("llama3_2_1b", 13), **SMALL),
    "mistral": dataclasses.replace(preset("mistral_7b", 13), **SMALL, sliding_window=3),
    "qwen2": dataclasses.replace(preset("qwen2_5_0_5b", 13), **SMALL, sliding_window=2, full_layers=1),
    "qwen3": dataclasses.replace(preset("qwen3_8b", 13), **SMALL | {"head_size": 6}),
}
TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5)


def drawn(config, seed=0):
    """Everything drawn, norms and biases too."""
    shapes = jax.eval_shape(language_model(config).init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize("name", FAMILIES)
def test_written_and_read_it_is_the_same_side_by_side_and_scanned(tmp_path, name):
    config = FAMILIES[name]
    params = drawn(config)
    save_pretrained(tmp_path / "a", config, params, file_bytes=1000)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == name
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    scanned, again = load_pretrained(tmp_path / "a", scan_layers=True, remat="full")
    assert scanned == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    side_by_side, others = load_pretrained(tmp_path / "a")
    expected = language_model(scanned).logits(again, TOKENS)
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(language_model(side_by_side).logits(others, TOKENS), expected, rtol=0, atol=2e-5)


def test_every_part_is_read_straight_to_its_device(tmp_path):
    config = FAMILIES["llama"]
    save_pretrained(tmp_path / "a", config, drawn(config), file_bytes=1000)
    program = Path(__file__).with_name("sharded_import_program.py")
    done = subprocess.run(
        [sys.executable, program, tmp_path / "a"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.stdout == "[(2, 8, 2)]\n", done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "default", "mrope": 1}}, "rope_parameters not understood: mrope"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters missing: factor"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported, only False"),
        ({"num_key_value_heads": 3}, "heads 4 is not a multiple of key_value_heads 3"),
        ({"head_dim": 3}, "heads of width 3 cannot be rotated"),
        ({"attention_sinks": 4}, "attributes not understood: attention_sinks"),
        ({"tie_word_embeddings": "no"}, "tied must be one of True, False, got 'no'"),
        (
            {"model_type": "qwen2", "attention_bias": None, "mlp_bias": None, "num_hidden_layers": "2"},
            "must be a whole",
        ),
        ({"rope_parameters": 3}, "rope_parameters must be an object, got 3"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            "rope_parameters and rope_scaling are both given and differ",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, change, message):
    config = FAMILIES["llama"]
    save_pretrained(tmp_path / "a", config, drawn(config))
    path = tmp_path / "a" / "config.json"
    attributes = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in attributes.items() if value is not None}))
    with pytest.raises(UserError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)):
        load_pretrained(tmp_path / "a")


@pytest.mark.parametrize("change", [{"rope": None}, {"norm": "layer"}, {"feed_forward_bias": True}, {"full_layers": 1}])
def test_what_no_family_writes_is_not_exported(tmp_path, change):
    config = dataclasses.replace(FAMILIES["mistral"], **change)
    with pytest.raises(UserError, match="no family of checkpoints has such a decoder"):
        save_pretrained(tmp_path / "a", config, drawn(config))
    assert not (tmp_path / "a").exists()


def test_an_index_that_its_files_contradict_is_refused(tmp_path):
    config = FAMILIES["llama"]
    save_pretrained(tmp_path / "a", config, drawn(config), file_bytes=1000)
    index = tmp_path / "a" / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    name, file = next(iter(where["weight_map"].items()))
    index.write_text(json.dumps({"weight_map": where["weight_map"] | {"model.extra.weight": file}}))
    with pytest.raises(UserError, match=f"{file}: tensors missing, which .* says are here: model.extra.weight"):
        load_pretrained(tmp_path / "a")
    index.write_text(json.dumps(where))
    (tmp_path / "a" / file).write_bytes((tmp_path / "a" / file).read_bytes()[:-4])
    with pytest.raises(UserError, match=f"{file}: cannot be read as safetensors"):
        load_pretrained(tmp_path / "a")
    (tmp_path / "a" / file).unlink()
    with pytest.raises(UserError, match=f"files missing: {file}"):
        load_pretrained(tmp_path / "a")
    assert name.startswith("model.")


def test_rotation_keeps_what_depends_on_distance_alone():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 1, 1, 6)), jnp.float32)
    query, key = (jnp.broadcast_to(part, (1, 9, 1, 6)) for part in x)
    angles = rotation(Rope(10.0), 6, 9, jnp.float32)
    scores = jnp.einsum("nthd,nshd->ts", rotated(query, *angles), rotated(key, *angles))
    np.testing.assert_allclose(scores[3, 1], scores[8, 6], atol=1e-5)
    assert abs(scores[3, 1] - scores[3, 2]) > 1e-3


def test_llama_scaling_leaves_short_waves_and_stretches_long_ones():
    # waves of 2 pi 16^(i/4): 6.3, 101, 1608 and 25,736 tokens; limits are 400 / 4 = 100 and 400 / 1 = 400 tokens
    scaled = rotation(Rope(65_536.0, RopeScaling(8.0, 1.0, 4.0, 400)), 8, 2, jnp.float32)[1][1]
    plain = rotation(Rope(65_536.0), 8, 2, jnp.float32)[1][1]
    np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(jnp.arcsin(scaled[2:]), jnp.arcsin(plain[2:]) / 8, rtol=1e-5)
    # 400 / 100.53 = 3.979 turns: a share of 0.993 of the plain one and the rest of an eighth
    np.testing.assert_allclose(jnp.arcsin(scaled[1]) / jnp.arcsin(plain[1]), 0.99297 + 0.00703 / 8, rtol=1e-4)


def test_a_window_counts_the_position_itself():
    assert sees(4, 2).sum(-1).tolist() == [1, 2, 2, 2]


def test_an_adapter_begins_as_nothing_and_ends_as_its_product():
    config = dataclasses.replace(FAMILIES["qwen2"], lora=LoraConfig(rank=2, alpha=6.0, targets=("query", "down")))
    params = language_model(config).init(jax.random.key(1))
    base = dataclasses.replace(config, lora=None)
    without = jax.tree.map(lambda leaf: leaf, params)
    for name, part in (("query", without["layers"]["attention"]), ("down", without["layers"]["feed_forward"])):
        part[name] = {key: leaf for key, leaf in part[name].items() if not key.startswith("lora")}
    before = language_model(base).logits(without, TOKENS)
    np.testing.assert_array_equal(language_model(config).logits(params, TOKENS), before)
    query = params["layers"]["attention"]["query"]
    query["lora_b"] = jnp.ones_like(query["lora_b"])
    merged = query["kernel"] + 3.0 * jnp.einsum("lir,lro->lio", query["lora_a"], query["lora_b"])
    without["layers"]["attention"]["query"]["kernel"] = merged
    after = language_model(base).logits(without, TOKENS)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(language_model(config).logits(params, TOKENS), after, rtol=0, atol=1e-5)


def test_a_target_that_no_matrix_has_is_refused():
    config = dataclasses.replace(FAMILIES["llama"], lora=LoraConfig(2, 2.0, ("qkv",)))
    with pytest.raises(UserError, match="no matrix of this decoder is called 'qkv': there are attention/key"):
        language_model(config)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])  # tied, biases, windows; own head, normed heads
def test_geometry_of_scanned_layers_is_exact(name):
    config = FAMILIES[name]
    params, log_probs = drawn(config), language_model(config).log_probs
    batch = draw_pairs(1, 2, 8, config.vocab_size)
    scanned = jax.jit(geometry.scan_geometry, static_argnums=0)(log_probs, params, batch)
    _, found = jax.jit(lambda p, b: geometry.vjp_with_geometry(log_probs, p, b)[1](jnp.ones(2), jnp.ones(2)))(
        params, batch
    )
    norms = np.sqrt(scanned.chosen_sq_norm * scanned.rejected_sq_norm)
    for one, other in zip(found, scanned, strict=True):
        np.testing.assert_allclose(one / norms, other / norms, rtol=0, atol=1e-5)


def test_adapters_drop_inputs_row_by_row_where_there_are_seeds():
    lora = LoraConfig(rank=2, alpha=2.0, targets=("query", "down"), dropout=0.5)
    config = dataclasses.replace(FAMILIES["llama"], lora=lora)
    graph = nnx.graphdef(Decoder(config, nnx.Rngs(0)))
    params, rows = drawn(config), np.tile(TOKENS[0], (3, 1))

    def hidden(*seeds):
        given = np.array(seeds, np.uint32) if seeds else None
        return nnx.merge(graph, params).hidden_states(rows, given)

    nothing = hidden()
    np.testing.assert_array_equal(nothing[0], nothing[1])
    first = hidden(7, 7, 8)
    np.testing.assert_array_equal(first[0], first[1])
    assert np.abs(first[0] - first[2]).max() > 1e-3 and np.abs(first[0] - nothing[0]).max() > 1e-3
    # a row's draws are its own, whatever the others'
    np.testing.assert_allclose(hidden(1, 8, 7)[2], first[0], rtol=0, atol=1e-6)


def test_what_is_kept_is_scaled_up_and_every_matrix_draws_anew():
    dropout = Dropout(jax.random.split(jax.random.key(0), 2))
    x = jnp.ones((2, 50, 80))
    one, other = (np.asarray(dropout(x, 0.2, path)) for path in ("attention/query", "attention/key"))
    assert set(np.unique(one)) == {np.float32(0.0), np.float32(1.25)}
    # 8,000 draws of 0.8: five deviations are 0.022
    assert abs((one > 0).mean() - 0.8) < 0.022
    assert (one != other).any() and (one[0] != one[1]).any()
