import json

import pytest
from tokenizers import AddedToken, models, normalizers
from tokenizers import Tokenizer as Inner

from entangle.data import (
    ChatTemplate,
    PreferenceRecord,
    Tokenizer,
    encode_pairs,
    load_chat_template,
    load_tokenizer,
    read_preferences,
)
from entangle.data.chat_templates import TemplateError
from entangle.data.tokenization import train_bpe
from entangle.errors import UserError

CHATML = """\
{% for message in messages %}
    {% if not message['content'] is string %}
        {{ raise_exception('no text') }}
    {% endif %}
{{ '<|im_start|>' + message.role }}
{% if message.role == 'assistant' %}
{% generation %}
{{ message.content + '<|im_end|>' }}
{% endgeneration %}
{% else %}
{{ message.content + '<|im_end|>' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}
"""
LLAMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system, turns = messages[0].content, messages[1:] %}
{%- else %}
    {%- set system, turns = 'Data: ' + {'é': '<b>'} | tojson, messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' + system + '<|eot_id|>' }}
{%- if tools is not none %}{{ raise_exception('no tools') }}{% endif %}
{%- for message in turns %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate\nuser/assistant') }}
    {%- endif %}
    {%- if loop.index0 > 99 %}{% break %}{% endif %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
CHAT = [("user", "hi"), ("assistant", "hello"), ("user", " and é? ")]
ANSWERS = [("assistant", "good ")], [("assistant", "bad"), ("user", "why"), ("assistant", "so")]


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def checkpoint(folder, config, template=None):
    """A folder with a byte tokeniser that has the special tokens of both templates, as Hugging Face writes it."""
    inner = Inner.from_str(train_bpe([""], 257)._inner.to_str())
    names = ("<|im_start|>", "<|im_end|>", "<|begin|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    inner.add_special_tokens([AddedToken(name) for name in names])
    Tokenizer(inner).save(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>"} | config)
    )
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_llamas_form_to_the_letter():
    template = ChatTemplate(LLAMA, {"bos_token": "<|begin|>"})
    prompt, chosen, rejected = template([("user", " hi ")], *ANSWERS)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    begun = (
        f'<|begin|>{header("system")}Data: {{"é": "<b>"}}<|eot_id|>{header("user")}hi<|eot_id|>{header("assistant")}'
    )
    assert (prompt, chosen) == (begun, "good<|eot_id|>")
    assert rejected == f"bad<|eot_id|>{header('user')}why<|eot_id|>{header('assistant')}so<|eot_id|>"


def test_an_answer_without_a_word_is_left_to_the_encoding_report():
    template = ChatTemplate(LLAMA, {})
    assert template([("user", "hi")], [("assistant", " ")], ANSWERS[0])[1:] == ("", "good<|eot_id|>")


def test_a_template_is_told_the_same_day_on_every_day():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {})
    assert template.render([], add_generation_prompt=False) == "26 Jul 2024"


@pytest.mark.parametrize(
    ("config", "template", "expected"),
    [
        ({}, None, None),
        ({"chat_template": None}, None, None),
        ({"chat_template": "{{ bos_token }}one"}, None, "<|begin|>one"),
        ({"chat_template": "one"}, "{{ bos_token }}file", "<|begin|>file"),
        ({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}, None, "d"),
        (
            {"bos_token": {"content": "<s>"}, "pad_token": None},
            "{{ bos_token }}{{ pad_token }}{{ eos_token }}",
            "<s></s>",
        ),
    ],
)
def test_where_a_template_and_its_tokens_are_found(tmp_path, config, template, expected):
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "no", "eos_token": {"content": "</s>"}}')
    found = load_chat_template(checkpoint(tmp_path, config, template))
    assert (found and found.render([], add_generation_prompt=True)) == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"chat_template.jinja": "\n{% if %}"}, r"chat_template\.jinja: line 2: Expected an expression"),
        ({"chat_template.jinja": "\xff"}, r"chat_template\.jinja: cannot be read"),
        ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json: not JSON"),
        ({"tokenizer_config.json": "[]"}, r"tokenizer_config\.json: not a JSON object"),
        (
            {"tokenizer_config.json": '{"chat_template": [{"name": "rag", "template": ""}]}'},
            "with 'default' among them",
        ),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        load_chat_template(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ raise_exception('Roles must\nalternate') }}", "t: Roles must alternate"),
        ("{{ messages[0].content + 1 }}", "t: can only concatenate str"),
        ("{{ messages[0].turn.name }}", "t: 'dict object' has no attribute 'turn'"),
        ("{{ ''.__class__.__mro__ }}", "t: access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "t: access to attribute 'append' of 'list' object is unsafe"),
        ("{{ messages | length }} messages", r"t: prompt and answer do not begin with the prompt as it is alone \('1 "),
    ],
)
def test_what_a_template_cannot_write_is_one_line(text, message):
    with pytest.raises(TemplateError, match=message) as caught:
        ChatTemplate(text, {}, "t")([("user", "hi")], *ANSWERS)
    assert "\n" not in str(caught.value)


def test_a_line_that_the_template_refuses_is_named_and_text_is_told_from_messages(tmp_path):
    template = ChatTemplate(LLAMA, {}, "t")
    good = {"prompt": "hi", "chosen": messages(ANSWERS[0]), "rejected": messages(ANSWERS[1])}
    text = {"prompt": "p", "chosen": " a", "rejected": " b"}
    records, report = read_preferences(write(tmp_path / "a.jsonl", good, text, {}), template)
    assert records[0].chosen == "good<|eot_id|>" and records[1][:3] == ("p", " a", " b")
    assert report.text_lines == ("a.jsonl:2",) and [bad.source for bad in report.bad_lines] == ["a.jsonl:3"]
    odd = good | {"prompt": messages([("user", "a"), ("user", "b")])}
    with pytest.raises(UserError, match=r"^a\.jsonl:2: t: Roles must alternate user/assistant$"):
        read_preferences(write(tmp_path / "a.jsonl", good, odd), template)


def test_tokens_that_the_template_wrote_are_read_and_none_is_added(tmp_path):
    tokenizer = load_tokenizer(checkpoint(tmp_path, {}, LLAMA))
    template = load_chat_template(tmp_path)
    line = {"prompt": "hi", "chosen": messages(ANSWERS[0]), "rejected": messages(ANSWERS[1])}
    records, _ = read_preferences(write(tmp_path / "a.jsonl", line), template)
    encoded, _ = encode_pairs(records, tokenizer, 128, add_eos=False, templated=True)
    assert tokenizer.token_labels(encoded.tokens[0, 0][encoded.completion_mask[0, 0]]) == [*"good", "<|eot_id|>"]
    assert tokenizer.token_labels(encoded.tokens[0, 0, :2]) == ["<|begin|>", "<|start_header_id|>"]
    assert tokenizer.encode_many(["<|eot_id|>"]) == [tokenizer.encode("<|eot_id|>")]  # the next text is plain again
    assert len(tokenizer.encode("<|eot_id|>")) == len("<|eot_id|>")


def test_a_tokeniser_that_puts_a_space_before_a_text_sees_one_text():
    characters = ["</s>", "▁", *"hieyoas:"]
    inner = Inner(
        models.BPE({token: index for index, token in enumerate([*characters, "▁▁", "s:"])}, [("▁", "▁"), ("s", ":")])
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(inner)
    records = [PreferenceRecord("</s>hi", " yes</s>", " hey</s>", "x:1"), PreferenceRecord("yes", ":", "a", "x:2")]
    encoded, _ = encode_pairs(records, tokenizer, 16, add_eos=False, templated=True)
    labels = [
        [tokenizer.decode([i]) for i in ids[mask]] for ids, mask in zip(*(a[:, 0] for a in encoded[:2]), strict=True)
    ]
    assert labels[0] == ["▁", *"yes", "</s>"]  # apart it would be two spaces, here one token
    assert labels[1] == ["▁", ":"]  # 's:' would be a token of both: apart, as it is without a template
    assert tokenizer.encode(" yes") == [tokenizer.encode("  ")[0], *map(characters.index, "yes")]


def test_gpt2_files_know_their_special_token(tmp_path):
    vocab = {token: index for index, token in enumerate(["<|endoftext|>", *"<|endoftx>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_many(["<|endoftext|>o"], special_tokens=True) == [[0, vocab["o"]]]
    assert 0 not in tokenizer.encode("<|endoftext|>")
