"""How a JSON object becomes a prompt and two completions.

Chat messages are written out by a `ChatForm`: that of a checkpoint (`entangle.data.chat_templates`), or hh-rlhf's format,
``"\\n\\nHuman: ...\\n\\nAssistant: ..."``, so that all sources of dialogues end in the same text. There the prompt ends in
``"\\n\\nAssistant:"`` and completions begin with a space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from entangle.errors import UserError

_ASSISTANT = "\n\nAssistant:"
_SPEAKERS = {"system": "\n\nSystem:", "user": "\n\nHuman:", "assistant": _ASSISTANT}

Message = tuple[str, str]
"""Role and content."""

ChatForm = Callable[[Sequence[Message], Sequence[Message], Sequence[Message]], tuple[str, str, str]]
"""Writes out the messages of prompt, chosen and rejected; the last two begin with the assistant."""


class NotAPairError(UserError):
    """An object that holds no preference pair; the message is the reason."""


def hh_rlhf(prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]) -> tuple[str, str, str]:
    """Write messages out in hh-rlhf's format.

    Example:
      >>> hh_rlhf([("user", "hi")], [("assistant", "hello")], [("assistant", "no")])
      ('\\n\\nHuman: hi\\n\\nAssistant:', ' hello', ' no')
    """
    return _render(prompt) + _ASSISTANT, _completion(chosen), _completion(rejected)


def is_text(fields: Mapping[str, object]) -> bool:
    """Whether a preference object has its completions as text, not as chat messages."""
    return isinstance(fields.get("chosen"), str) and isinstance(fields.get("rejected"), str)


def parse_pair(fields: Mapping[str, object], form: ChatForm = hh_rlhf) -> tuple[str, str, str]:
    """Return the prompt and the two completions of a preference object.

    Args:
      fields: the JSON object; other fields than prompt, chosen and rejected are passed over.
      form: writes chat messages out.

    Returns:
      Prompt, chosen, rejected. Completions may be empty or equal; `encode_pairs` drops those and says so.

    Raises:
      NotAPairError: a field is missing or of another type, the two do not share a prompt, or a string is not Unicode.
      TemplateError: see `entangle.data.chat_templates`, where ``form`` is a template.

    Example:
      >>> parse_pair({"chosen": "\\n\\nHuman: hi\\n\\nAssistant: hello", "rejected": "\\n\\nHuman: hi\\n\\nAssistant: no"})
      ('\\n\\nHuman: hi\\n\\nAssistant:', ' hello', ' no')
    """
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise NotAPairError(f"no field {name!r}")
    prompt, chosen, rejected = fields.get("prompt"), fields["chosen"], fields["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):  # see is_text
        texts = _split_dialogues(chosen, rejected) if prompt is None else (_string(prompt), chosen, rejected)
    else:
        texts = form(*_divide(prompt, _messages("chosen", chosen), _messages("rejected", rejected)))
    for text in texts:
        _require_unicode(text)
    return texts


def _split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two whole dialogues after the last assistant's turn that both begin."""
    differing = (index for index, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    shared = chosen[: next(differing, min(len(chosen), len(rejected)))]
    start = shared.rfind(_ASSISTANT)
    if start < 0:
        raise NotAPairError("no field 'prompt', and the two dialogues share none (up to an 'Assistant:')")
    end = start + len(_ASSISTANT)
    return shared[:end], chosen[end:], rejected[end:]


def _divide(
    prompt: object, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """All messages that the two share belong to the prompt, but the last of each."""
    if prompt is None:
        head: list[Message] = []
    elif isinstance(prompt, str):
        head = [("user", prompt)]
    else:
        head = _messages("prompt", prompt)
    if head and chosen[: len(head)] == head == rejected[: len(head)]:  # the prompt is said once more in both
        chosen, rejected = chosen[len(head) :], rejected[len(head) :]
    while len(chosen) > 1 and len(rejected) > 1 and chosen[0] == rejected[0]:
        head, chosen, rejected = [*head, chosen[0]], chosen[1:], rejected[1:]
    if not head:
        raise NotAPairError("no prompt: chosen and rejected share no message")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[0][0] != "assistant":
            raise NotAPairError(f"after the shared prompt {name} does not go on with the assistant")
    return head, chosen, rejected


def _render(messages: Sequence[Message]) -> str:
    return "".join(f"{_SPEAKERS[role]} {content}" for role, content in messages)


def _completion(messages: Sequence[Message]) -> str:
    return "" if list(messages) == [("assistant", "")] else _render(messages).removeprefix(_ASSISTANT)


def _messages(name: str, value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise NotAPairError(f"field {name!r} is neither text nor a list of messages as its partners are")
    return [_message(name, item) for item in value]


def _message(name: str, item: object) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("content"), str):
        raise NotAPairError(f"field {name!r} has a message without a text 'content'")
    if item.get("role") not in _SPEAKERS:
        raise NotAPairError(
            f"field {name!r} has a message of role {item.get('role')!r}: not one of {', '.join(_SPEAKERS)}"
        )
    return item["role"], item["content"]


def _string(prompt: object) -> str:
    if not isinstance(prompt, str):
        raise NotAPairError("field 'prompt' is not text, while chosen and rejected are")
    return prompt


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NotAPairError(f"a text has half a character (surrogate at position {error.start})") from error
