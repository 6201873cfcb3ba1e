"""Chat templates against transformers and TRL themselves: text and tokens; needs the extra ``peers``."""

import pytest

from entangle.data import load_chat_template, load_tokenizer
from tests.data.test_chat_templates import ANSWERS, CHAT, CHATML, LLAMA, checkpoint, messages

transformers = pytest.importorskip("transformers")
data_utils = pytest.importorskip("trl.data_utils")

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("text", [CHATML, LLAMA], ids=["chatml", "llama"])
@pytest.mark.parametrize("in_config", [False, True], ids=["file", "config"])
def test_the_same_text_and_tokens(tmp_path, text, in_config):
    folder = checkpoint(tmp_path, {"chat_template": text} if in_config else {}, None if in_config else text)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer, template = load_tokenizer(folder), load_chat_template(folder)
    for head in (CHAT[:1], CHAT, [("system", "be kind"), *CHAT]):
        begun = theirs.apply_chat_template(messages(head), tokenize=False, add_generation_prompt=True)
        assert template.render(head, add_generation_prompt=True) == begun
        named = dict(zip(("prompt", "chosen", "rejected"), map(messages, (head, *ANSWERS)), strict=True))
        prompt, *completions = template(head, *ANSWERS)
        assert [prompt, *completions] == list(data_utils.apply_chat_template(named, theirs).values())
        for answer, completion in zip(ANSWERS, completions, strict=True):
            ids = theirs.apply_chat_template(messages([*head, *answer]), return_dict=False)
            parts = tokenizer.encode_many([prompt, completion], special_tokens=True)
            assert [*parts[0], *parts[1]] == ids
