"""Preference files as experiments take them: read, divided by prompt and encoded, with what became of their lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from entangle import data
from entangle.errors import UserError
from experiments.pairs import pair_data, stages
from experiments.pairs.pair_config import PairSettings

PAIR_SET = "preferences"
"""What the pairs of preference files are called beside the named pair sets."""

CHAT_TEMPLATES = ("auto", "own", "hh")
"""What ``--chat-template`` can be."""


class Records(NamedTuple):
    """The pairs of one or two files, no prompt on both sides.

    Attributes:
      train: to train on.
      held_out: to look at.
      lines: what became of the files' lines.
      templated: whether a chat template wrote them, special tokens and ends of turns included.
    """

    train: list[data.PreferenceRecord]
    held_out: list[data.PreferenceRecord]
    lines: list[str]
    templated: bool = False


def chat_template(which: str, folder: str) -> data.ChatTemplate | None:
    """The chat template that ``--chat-template`` asks for, None for hh-rlhf's form.

    Args:
      which: own, auto (the same where there is one) or hh.
      folder: the checkpoint's.

    Raises:
      UserError: no such choice, no template where one is asked for, or a broken one.

    Example:
      >>> from experiments.pairs.preference_files import chat_template
      >>> chat_template("chatml", ".")
      Traceback (most recent call last):
      entangle.errors.UserError: --chat-template chatml: choose from auto, own, hh
    """
    if which not in CHAT_TEMPLATES:
        raise UserError(f"--chat-template {which}: choose from {', '.join(CHAT_TEMPLATES)}")
    template = None if which == "hh" else data.load_chat_template(folder)
    if which == "own" and template is None:
        raise UserError(f"--chat-template own: {folder} has none, in chat_template.jinja or tokenizer_config.json")
    return template


def read_records(
    file: str, held_out: str = "", template: data.ChatTemplate | None = None, *, chat: bool = False
) -> Records:
    """Read one or two preference files and divide them by prompt.

    Args:
      file: .jsonl or .jsonl.gz.
      held_out: a second one; without it every eighth prompt of the first is held out.
      template: writes chat messages out, instead of hh-rlhf's form.
      chat: whether pairs of text are refused.

    Raises:
      UserError: bad input.
    """
    form = template or data.hh_rlhf
    records, found = data.read_preferences(file, form)
    lines, others, text = found.lines(), None, found.text_lines
    if held_out:
        others, found = data.read_preferences(held_out, form)
        lines, text = lines + found.lines(), text + found.text_lines
    templated = template is not None and len(text) < len(records) + len(others or ())
    if text and (chat or templated):
        raise UserError(f"{text[0]}: text, no chat messages for the chat template; --chat-template hh takes both")
    if template is not None and templated:
        lines.append(f"chat messages are written by {Path(template.source).name}")
    try:
        train, kept = data.divide_by_prompt(records, others)
    except UserError as error:
        raise _of_the_files(f"{error} with --held-out", lines) from None
    if others is not None:
        lines.append(f"{len(records) - len(train)} training pairs left out: their prompt is held out")
    return Records(train, kept, lines, templated)


def encode_records(
    settings: PairSettings, tokenizer: data.Tokenizer, records: Records, trained: Sequence[str]
) -> tuple[stages.PreferenceData, dict[str, list[str]]]:
    """Encode the first ``train_pairs`` and ``held_out_pairs`` records.

    Args:
      settings: of the runs.
      tokenizer: the model's.
      records: what the files hold.
      trained: the stages that take batches of the training pairs.

    Returns:
      Both splits, and lines that tell what became of the files' lines and of each split's pairs.

    Raises:
      UserError: too few pairs.
    """
    train, held_out, lines = records.train, records.held_out, list(records.lines)
    for flag, kept, most in (("train", train, settings.train_pairs), ("held-out", held_out, settings.held_out_pairs)):
        if len(kept) > most:
            lines.append(f"the first {most} of {len(kept)} {flag} pairs are taken (--{flag}-pairs)")
    try:
        pairs, report = pair_data.encode(
            settings,
            tokenizer,
            PAIR_SET,
            train[: settings.train_pairs],
            held_out[: settings.held_out_pairs],
            add_eos=not records.templated,
            templated=records.templated,
            trained=trained,
        )
    except UserError as error:
        raise _of_the_files(str(error), lines) from None
    return pairs, {"files": lines, **report}


def _of_the_files(error: str, lines: Sequence[str]) -> UserError:
    """Where pairs are too few, a reader wants to know what became of the files' lines."""
    return UserError(f"{error} ({'; '.join(line.strip() for line in lines)})")
