"""Chat messages as a checkpoint's own template writes them.

The template is a Jinja program of the checkpoint's folder, run in a sandbox with what ``transformers`` gives it. It writes the
special tokens itself, so its text is encoded with them recognised and nothing added: ``encode_pairs(templated=True)``.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, nodes, parser, sandbox

from entangle.data.dialogues import Message
from entangle.errors import UserError

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_SHOWN = 40

_TODAY = datetime.datetime(2024, 7, 26)
"""What ``strftime_now`` tells: Llama 3's own default. A run that goes on tomorrow has the same prompts."""


class TemplateError(UserError):
    """A template that does not parse or cannot write a dialogue; the message has its file and the reason."""


class ChatTemplate:
    """A chat template, as a function from messages to prompt and completions (see `entangle.data.dialogues.ChatForm`).

    Args:
      text: the template.
      special_tokens: what it may write by name: ``bos_token``, ``eos_token``, ...
      source: the file that it comes from, for messages.

    Raises:
      TemplateError: it does not parse.

    Example:
      >>> turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
      >>> template = ChatTemplate(turns + "{% if add_generation_prompt %}<|assistant|>{% endif %}", {"eos_token": "</s>"})
      >>> template([("user", "hi")], [("assistant", "hello")], [("assistant", "no")])
      ('<|user|>hi</s><|assistant|>', 'hello</s>', 'no</s>')
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str], source: str = "chat template") -> None:
        """Parse the template."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"{source}: line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Write messages out.

        Args:
          messages: role and content of each.
          add_generation_prompt: whether an assistant's turn is begun at the end.

        Raises:
          TemplateError: whatever the template raises.
        """
        try:
            return self._template.render(
                messages=[{"role": role, "content": content} for role, content in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a template is a program: it can raise anything
            raise TemplateError(f"{self.source}: {_one_line(error) or type(error).__name__}") from error

    def __call__(
        self, prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]
    ) -> tuple[str, str, str]:
        """Return prompt and completions: the prompt ends in a begun turn, a completion is what its messages add.

        A completion without a word is empty text, without the end of its turn, so that `encode_pairs` leaves it out.

        Raises:
          TemplateError: whatever the template raises, or the rendered prompt is not how the whole dialogue begins.
        """
        start = self.render(prompt, add_generation_prompt=True)
        return start, self._completion(start, prompt, chosen), self._completion(start, prompt, rejected)

    def _completion(self, start: str, prompt: Sequence[Message], messages: Sequence[Message]) -> str:
        if not any(content.strip() for _, content in messages):
            return ""
        whole = self.render([*prompt, *messages], add_generation_prompt=False)
        if not whole.startswith(start):
            shown = f"...{start[-_SHOWN:]}" if len(start) > _SHOWN else start
            raise TemplateError(
                f"{self.source}: prompt and answer do not begin with the prompt as it is alone ({shown!r})"
            )
        return whole.removeprefix(start)


def load_chat_template(folder: str | Path) -> ChatTemplate | None:
    """Read the chat template of a checkpoint folder.

    Args:
      folder: may have ``chat_template.jinja``, or else ``chat_template`` in ``tokenizer_config.json``: a template, or a
        list of named ones, of which ``default`` is taken. Special tokens are those of ``tokenizer_config.json`` and, where
        it has none, of ``special_tokens_map.json``.

    Returns:
      The template, None where there is none.

    Raises:
      UserError: a file cannot be read, or there is no default among the named ones.
      TemplateError: the template does not parse.
    """
    folder = Path(folder)
    config = _read_object(folder / CONFIG)
    tokens = _read_object(folder / "special_tokens_map.json") | config
    if (folder / FILE).exists():
        path, text = folder / FILE, _read_text(folder / FILE)
    elif config.get("chat_template") is not None:
        path = folder / CONFIG
        text = _default(path, config["chat_template"])
    else:
        return None
    return ChatTemplate(text, _special_tokens(tokens), str(path))


def _default(path: Path, value: object) -> str:
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}.get("default")
    if not isinstance(value, str):
        raise UserError(f"{path}: chat_template is neither text nor a list of named ones with 'default' among them")
    return value


def _special_tokens(values: Mapping[str, object]) -> dict[str, str]:
    """A token is its text, or an object that has it as ``content``."""
    found = {name: values.get(name) for name in _TOKENS}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


class _Generation(ext.Extension):
    """``{% generation %}``, with which templates mark the assistant's words: written as any other block."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _environment() -> jinja2.Environment:
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _TODAY.strftime}
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
