"""Text pairs to token arrays of one shape, with a report of every pair that was changed or left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from entangle.data.records import PreferenceRecord
from entangle.data.tokenization import Tokenizer
from entangle.errors import UserError

_SHOWN = 3


class EncodedPairs(NamedTuple):
    """N encoded pairs, side 0 chosen and side 1 rejected, padded on the right with the end-of-text token.

    Attributes:
      tokens: ``[N, 2, T]`` int32, prompt then completion.
      completion_mask: ``[N, 2, T]`` bool, true on the completion's tokens, its end-of-text included, never on padding.
      sources: the N sources, in order.
    """

    tokens: np.ndarray
    completion_mask: np.ndarray
    sources: list[str]


class EncodingReport(NamedTuple):
    """What became of the pairs; each tuple holds the sources concerned, in order.

    Attributes:
      total: number of pairs given.
      kept: number of pairs encoded.
      prompt_cut: kept, but the prompt lost tokens on its left.
      too_long: left out, a completion does not fit in ``max_length`` beside one prompt token.
      empty: left out, a completion has no text but whitespace.
      equal: left out, both completions are the same tokens.
    """

    total: int
    kept: int
    prompt_cut: tuple[str, ...]
    too_long: tuple[str, ...]
    empty: tuple[str, ...]
    equal: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the report as lines to print.

        Example:
          >>> EncodingReport(3, 2, (), (), ("a.jsonl:2",), ()).lines()
          ['2 of 3 pairs encoded', '  left out, empty completion: 1 (a.jsonl:2)']
        """
        named = (
            ("prompt cut on the left", self.prompt_cut),
            ("left out, completion too long", self.too_long),
            ("left out, empty completion", self.empty),
            ("left out, chosen equals rejected", self.equal),
        )
        return [
            f"{self.kept} of {self.total} pairs encoded",
            *(f"  {what}: {len(sources)} ({_first_few(sources)})" for what, sources in named if sources),
        ]


def encode_pairs(
    records: Sequence[PreferenceRecord],
    tokenizer: Tokenizer,
    max_length: int,
    add_eos: bool,
    *,
    templated: bool = False,
) -> tuple[EncodedPairs, EncodingReport]:
    """Encode pairs to ``[N, 2, max_length]``.

    Prompt and completion are tokenised apart, so both sides begin with the same prompt tokens. A prompt that is too
    long beside the longer completion loses tokens on its left, on both sides alike; completions are never cut. An
    empty prompt becomes the end-of-text token, which is what a language model has seen before a text: a completion's
    first token needs something to be predicted from.

    Args:
      records: the pairs.
      tokenizer: the tokeniser.
      max_length: T, the same for every set, so that one compilation serves all.
      add_eos: end completions with the end-of-text token.
      templated: a chat template wrote prompt and completion, as one text: special tokens are read out of it, and a
        completion's tokens are what it adds to the prompt's, if these stay as they are.

    Returns:
      The arrays and the report.

    Raises:
      UserError: no pair is left.

    Example:
      >>> from entangle.data import sentiment_pairs, embedded_corpus, train_bpe
      >>> pairs = sentiment_pairs(embedded_corpus(4, 0, 0).train, "single_token")
      >>> tokenizer = train_bpe([pair.prompt + pair.chosen for pair in pairs], vocab_size=300)
      >>> encoded, report = encode_pairs(pairs, tokenizer, max_length=128, add_eos=False)
      >>> encoded.tokens.shape, report.lines()
      ((4, 2, 128), ['4 of 4 pairs encoded'])
    """
    records = list(records)  # they may be stored on disk: read them once
    found: dict[str, list[str]] = {"prompt_cut": [], "too_long": [], "empty": [], "equal": []}
    rows: list[tuple[list[int], list[int], list[int]]] = []
    sources: list[str] = []
    token_lists = _token_lists(records, tokenizer, add_eos, templated)
    for record, (prompt, chosen, rejected) in zip(records, token_lists, strict=True):
        room = max_length - max(len(chosen), len(rejected))
        problem = _problem(record, chosen, rejected, room)
        if problem:
            found[problem].append(record.source)
            continue
        if len(prompt) > room:
            found["prompt_cut"].append(record.source)
        rows.append((prompt[-room:], chosen, rejected))
        sources.append(record.source)
    report = EncodingReport(len(records), len(rows), **{name: tuple(names) for name, names in found.items()})
    if not rows:
        raise UserError(
            f"no pair is left to train on at {max_length} tokens: " + "; ".join(map(str.strip, report.lines()))
        )
    return EncodedPairs(*_fill(rows, max_length, tokenizer.eos_id), sources), report


def _token_lists(
    records: Sequence[PreferenceRecord], tokenizer: Tokenizer, add_eos: bool, templated: bool
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    prompts, *completions = ([record[field] for record in records] for field in range(3))
    prompt_ids = tokenizer.encode_many(prompts, special_tokens=templated)
    if templated:
        ids = [_continuations(tokenizer, prompts, prompt_ids, texts) for texts in completions]
    else:
        ids = [tokenizer.encode_many(texts) for texts in completions]
    end = [tokenizer.eos_id] if add_eos else []
    for prompt, chosen, rejected in zip(prompt_ids, *ids, strict=True):
        yield prompt or [tokenizer.eos_id], chosen + end, rejected + end


def _continuations(
    tokenizer: Tokenizer, prompts: Sequence[str], prompt_ids: Sequence[list[int]], completions: Sequence[str]
) -> list[list[int]]:
    """Completions' tokens in the one text that a template writes: a tokeniser can add a space before a text of its own.

    Where a token of that text holds the end of the prompt and the beginning of the completion, it is tokenised apart.
    """
    together = map("".join, zip(prompts, completions, strict=True))
    whole = tokenizer.encode_many(list(together), special_tokens=True)
    apart = tokenizer.encode_many(completions, special_tokens=True)
    return [
        ids[len(prompt) :] if ids[: len(prompt)] == prompt else completion
        for prompt, ids, completion in zip(prompt_ids, whole, apart, strict=True)
    ]


def _problem(record: PreferenceRecord, chosen: list[int], rejected: list[int], room: int) -> str | None:
    if not record.chosen.strip() or not record.rejected.strip():
        return "empty"
    if chosen == rejected:
        return "equal"
    return "too_long" if room < 1 else None


def _fill(
    rows: list[tuple[list[int], list[int], list[int]]], max_length: int, padding: int
) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(rows), 2, max_length), padding, np.int32)
    mask = np.zeros((len(rows), 2, max_length), np.bool_)
    for index, (prompt, *completions) in enumerate(rows):
        for side, completion in enumerate(completions):
            end = len(prompt) + len(completion)
            tokens[index, side, :end] = prompt + completion
            mask[index, side, len(prompt) : end] = True
    return tokens, mask


def _first_few(sources: tuple[str, ...]) -> str:
    return ", ".join(sources[:_SHOWN]) + (", ..." if len(sources) > _SHOWN else "")
