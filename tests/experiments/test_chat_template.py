"""Chat messages of a preference file in the checkpoint's own form, from ``--chat-template`` to tokens."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from entangle import data, models
from experiments import preferences
from experiments.pairs.pair_config import identity

WHO = [{"role": "user", "content": "who"}]
TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
    {{- message.role + ':' + message.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""


def chat(number):
    prompt = [{"role": "user", "content": f"who {number}"}]
    yes, no = ([{"role": "assistant", "content": text}] for text in ("me", "you"))
    return {"prompt": prompt, "chosen": yes, "rejected": no}


TEXT = {"prompt": "who", "chosen": " me", "rejected": " you"}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    tokenizer = data.train_bpe([""], 257)
    config = models.DecoderConfig(vocab_size=tokenizer.vocab_size, max_positions=64, width=8, layers=1, heads=2)
    shapes = jax.eval_shape(models.language_model(config).init, jax.random.key(0))
    models.save_pretrained(folder, config, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    tokenizer.save(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return folder


def write(folder, *lines):
    path = folder.parent / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def first_row(folder, file, which="auto"):
    smoke = preferences.presets()["smoke"]
    stage = dataclasses.replace(smoke.preference, batch_size=1)
    few = {"max_length": 64, "held_out_pairs": 1, "probe_pairs": 0, "sft_first": False, "preference": stage}
    changes = {"data": file, "model": str(folder), "chat_template": which, "data_dir": folder.parent / "tfds"}
    materials = preferences.gather(dataclasses.replace(smoke, **few, **changes))
    pairs, tokenizer = materials.pairs.train, materials.checkpoint.tokenizer
    tokens, mask = pairs.tokens[0, 0], pairs.completion_mask[0, 0]
    assert (tokens[mask] == tokenizer.eos_id).sum() == 1  # one end of text, whoever writes it
    end = int(mask.nonzero()[0][-1]) + 1
    return tokenizer.decode(tokens[:end].tolist()), tokenizer.decode(tokens[mask].tolist()), materials.report["files"]


def test_the_checkpoints_own_template_is_taken_where_there_is_one(folder):
    file = write(folder, *map(chat, range(9)))
    end = "<|endoftext|>"
    in_hh = (f"\n\nHuman: who 0\n\nAssistant: me{end}", f" me{end}")
    *row, lines = first_row(folder, file)
    assert (*row,) == in_hh and len(lines) == 1
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for which in ("auto", "own"):
        *row, lines = first_row(folder, file, which)
        assert (*row,) == (f"user:who 0{end}assistant:me{end}", f"me{end}")
        assert lines[-1] == "chat messages are written by chat_template.jinja"
    assert (*first_row(folder, file, "hh")[:2],) == in_hh
    text = write(folder, *({**TEXT, "prompt": f"who{n}"} for n in range(9)))
    assert first_row(folder, text)[0] == f"who0 me{end}"


def test_the_choice_is_part_of_a_runs_identity():
    assert identity(preferences.PreferencesConfig(chat_template="hh"))["chat_template"] == "hh"


def test_bad_input_ends_in_one_line(folder, fail):
    out = folder.parent / "out"
    where = ["--model", str(folder), "--out", str(out), "--data", write(folder, *map(chat, range(9)))]
    words = ["--preset", "smoke", "--max-length", "64", *where]
    cases = {
        "own": f"--chat-template own: {folder} has none",
        "chatml": "--chat-template chatml: choose from auto, own, hh",
    }
    for which, message in cases.items():
        assert message in fail([*words, "--chat-template", which], main=preferences.main)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    system = {**chat(0), "prompt": [{"role": "system", "content": "be kind"}, *WHO]}
    write(folder, chat(0), system)
    assert "pairs.jsonl:2: " in (error := fail(words, main=preferences.main))
    assert error.endswith("chat_template.jinja: no system role")
    write(folder, chat(0), TEXT)
    assert "pairs.jsonl:2: text, no chat messages for the chat template" in fail(words, main=preferences.main)
    write(folder, TEXT)
    assert "pairs.jsonl:1: text" in fail([*words, "--chat-template", "own"], main=preferences.main)
    (folder / "chat_template.jinja").write_text("{% for %}")
    assert "chat_template.jinja: line 1: " in fail(words, main=preferences.main)
    assert not out.exists()
