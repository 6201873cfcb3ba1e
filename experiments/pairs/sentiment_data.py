"""What the sentiment experiment is made from: read, checked and encoded before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from entangle import data, models
from entangle.errors import UserError
from entangle.types import Params
from experiments.pairs import pair_data, references, stages
from experiments.pairs.sentiment_config import SPLICED, TWEETS, CorpusSettings, SentimentConfig

PairMaker = Callable[[Sequence[data.LabelledText]], list[data.PreferenceRecord]]
"""Pairs of labelled texts that ``data.balanced`` returned."""

TWEET_PROMPT = "Tweet:"


class Materials(NamedTuple):
    """What the runs are made from.

    Attributes:
      tokenizer: the checkpoint's, or one trained on the corpus.
      model: the policy.
      checkpoint: parameters of the base model, or None where it is to be pretrained.
      text: tokens to pretrain on, one stream of int32; empty with a checkpoint.
      pairs: pair set -> both splits, encoded.
      report: pair set -> split -> lines that tell what became of its pairs.
    """

    tokenizer: data.Tokenizer
    model: models.LanguageModel
    checkpoint: Params | None
    text: np.ndarray
    pairs: dict[str, stages.PreferenceData]
    report: dict[str, dict[str, list[str]]]


def gather(settings: SentimentConfig, known: Sequence[str] = tuple(data.PAIR_SETS)) -> Materials:
    """Read, check and encode everything that a wrong flag or folder can spoil, before anything is written.

    Args:
      settings: the configuration.
      known: the pair sets that the experiment is about.

    Raises:
      UserError: bad input.
    """
    if unknown := [name for name in settings.sets if name not in known]:
        raise UserError(f"unknown pair set {unknown[0]!r}: choose from {', '.join(known)}")
    if not settings.sets:
        raise UserError("--sets: at least one pair set is needed")
    if settings.preset == "paper" and settings.data == "embedded":
        raise UserError("--preset paper: name real data with --data (and a pretrained GPT-2 folder with --model)")
    materials = gather_sets(settings, settings.sets)
    base = pair_data.Checkpoint(materials.model, materials.checkpoint, materials.tokenizer)
    references.check(settings, base, materials.pairs)
    return materials


def known_sets() -> list[str]:
    """Names of all pair sets that labelled texts are made into."""
    return [*data.PAIR_SETS, TWEETS, SPLICED]


def gather_sets(settings: CorpusSettings, sets: Sequence[str]) -> Materials:
    """Read, check and encode what runs on these pair sets are made from.

    Args:
      settings: of the runs.
      sets: of ``known_sets()``.

    Raises:
      UserError: bad input.
    """
    pair_data.check(settings)
    if settings.model not in models.PRESETS and not Path(settings.model).is_dir():
        raise UserError(f"--model {settings.model}: neither a preset ({', '.join(models.PRESETS)}) nor a folder")
    makers = {name: _of_labels(settings, name) for name in data.PAIR_SETS}
    makers[TWEETS] = lambda texts: tweet_pairs(texts, settings.labels)
    makers[SPLICED] = lambda texts: spliced_pairs(texts, settings.labels)
    corpus = _read_corpus(settings)
    checkpoint, text = None, np.zeros(0, np.int32)
    if settings.model in models.PRESETS:
        tokenizer = _train_tokenizer(settings, corpus)
        shape = models.preset(settings.model, tokenizer.vocab_size)
        pair_data.check_length(settings, settings.model, shape)
        model = models.language_model(shape)
        text = data.encode_text(corpus.text, tokenizer)
        windows = len(text) // settings.max_length
        pair_data.check_size("base", settings.base, windows, f"windows of {settings.max_length} tokens")
    else:
        model, checkpoint, tokenizer, *_ = pair_data.load_checkpoint(settings, settings.model)
    if "single_token" in sets:
        data.require_single_tokens(tokenizer, [f" {word}" for word in _words(settings)])
    pairs, report = {}, {}
    for name in sets:
        train, held_out = (
            makers[name](data.balanced(texts, settings.labels, count))
            for texts, count in ((corpus.train, settings.train_pairs), (corpus.held_out, settings.held_out_pairs))
        )
        # No end-of-text token: it would be an identical suffix of one token, also in single_token.
        pairs[name], report[name] = pair_data.encode(settings, tokenizer, name, train, held_out, add_eos=False)
    model = pair_data.with_head(settings, model, pairs.values())
    return Materials(tokenizer, model, checkpoint, text, pairs, report)


def tweet_pairs(texts: Sequence[data.LabelledText], labels: Sequence[str]) -> list[data.PreferenceRecord]:
    """Pair whole tweets: one with the second label is chosen, to be kept, one with the first rejected, to be forgotten.

    Example:
      >>> from entangle.data import LabelledText
      >>> from experiments.pairs.sentiment_data import tweet_pairs
      >>> bad, good = LabelledText("so bad", "negative", "x:1"), LabelledText("so good", "positive", "x:2")
      >>> tweet_pairs([bad, good], ("negative", "positive"))[0][:3]
      ('Tweet:', ' so good', ' so bad')
    """
    forget, retain = ([text for text in texts if text.label == label] for label in labels)
    return [
        data.PreferenceRecord(TWEET_PROMPT, f" {keep.text}", f" {drop.text}", f"{keep.source} against {drop.source}")
        for keep, drop in zip(retain, forget, strict=False)
    ]


def spliced_pairs(texts: Sequence[data.LabelledText], labels: Sequence[str]) -> list[data.PreferenceRecord]:
    """Tweet pairs of every overlap: the rejected tweet's last words are the chosen one's, no word in the first pair, one more
    in the next, and so on, from the start again where none of its own would be left.

    At the end they stand in unlike contexts, where equal tokens entangle (arXiv 2410.13828, section 4.2); at the beginning
    their gradients would be one and the same on both sides.

    Example:
      >>> from entangle.data import LabelledText
      >>> from experiments.pairs.sentiment_data import spliced_pairs
      >>> said = {"negative": ["so very bad", "not at all"], "positive": ["so good now", "I do like"]}
      >>> texts = [LabelledText(text, label, "x:1") for label, both in said.items() for text in both]
      >>> [(pair.chosen, pair.rejected) for pair in spliced_pairs(texts, ("negative", "positive"))]
      [(' so good now', ' so very bad'), (' I do like', ' not at like')]
    """
    found = []
    for place, pair in enumerate(tweet_pairs(texts, labels)):
        chosen, rejected = pair.chosen.split(), pair.rejected.split()
        cut = place % max(1, min(len(chosen), len(rejected)))
        kept = rejected[: len(rejected) - cut]
        found.append(pair._replace(rejected=" " + " ".join([*kept, *chosen[len(chosen) - cut :]])))
    return found


def _of_labels(settings: CorpusSettings, name: str) -> PairMaker:
    return lambda texts: data.sentiment_pairs(texts, name, settings.labels, _words(settings))


def _words(settings: CorpusSettings) -> tuple[str, str]:
    return settings.label_words or settings.labels


def _read_corpus(settings: CorpusSettings) -> data.SentimentCorpus:
    if settings.data in ("embedded", "sentiment140") and settings.labels != data.LABELS:
        names = " and ".join(data.LABELS)
        raise UserError(f"--labels {' '.join(settings.labels)}: the {settings.data} data has {names} only")
    if settings.data == "embedded":
        return data.embedded_corpus()
    if settings.data == "sentiment140":
        return data.read_tfds_sentiment140(settings.data_dir)
    return data.read_tweeteval(settings.data, settings.labels)


def _train_tokenizer(settings: CorpusSettings, corpus: data.SentimentCorpus) -> data.Tokenizer:
    # The completions are in the text that the BPE learns from, often enough that each label becomes one token.
    completions = [f" {word}{suffix}" for word in _words(settings) for suffix in data.PAIR_SETS.values()]
    return data.train_bpe([*corpus.text, *completions * (1000 + len(corpus.text) // 10)], settings.vocab_size)
